"""One processor for all that is measured, and for the servers and programs that it starts: they inherit it.

A FUSE server is another process. On two processors each operation wakes one from its sleep, or finds it awake, as the
scheduler happens to place the two, and on a virtual machine that takes longer than the operation: the ratios were two to
five times those of a machine that has other work too, and a quarter more or less for minutes at a time.
"""

from __future__ import annotations

import os


def pin() -> None:
    """This process stays on the last of its processors: interrupts tend to be dealt with on the first."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
