"""The descriptors that are open, for tests that see whether a piece of work leaves one."""

from __future__ import annotations

import gc
import os


def open_descriptors() -> list[str]:
    """The names in /proc/self/fd, to compare with later ones. What earlier tests left to the collector is closed by now: a
    collection that came in the midst of the work would close it, and there would be fewer."""
    gc.collect()
    return os.listdir("/proc/self/fd")
