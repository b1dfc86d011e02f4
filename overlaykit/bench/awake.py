"""Processors that do not fall asleep while we measure (Documentation/power/pm_qos_interface.rst; cyclictest does the same).

A FUSE server is another process: on an idle machine each operation wakes a sleeping processor, or does not, as the scheduler
happens to place the two; on a virtual machine that takes ten times as long as the operation. That is the machine's, and gone
as soon as somebody else has work for it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

LATENCY = "/dev/cpu_dma_latency"  # root's; whoever closes it, or ends, takes the wish back


def can_stay_awake() -> bool:
    return os.access(LATENCY, os.W_OK)


@contextmanager
def awake() -> Iterator[None]:
    """No processor sleeps meanwhile, where this user may ask for that."""
    if not can_stay_awake():
        yield
        return
    fd = os.open(LATENCY, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, bytes(4))  # microseconds that waking up may take
        yield
    finally:
        os.close(fd)
