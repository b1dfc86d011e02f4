"""Running a piece of a test without root's rights, wherever the tests themselves run."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

SOMEBODY = 1000  # user and group id


@contextlib.contextmanager
def somebody(*directories: Path) -> Iterator[None]:
    """Everything within is done as an ordinary user, to whom `directories` belong. Nothing changes if that is so already."""
    if os.geteuid() != 0:
        yield
        return
    for directory in directories:
        os.chown(directory, SOMEBODY, SOMEBODY)
        for above in directory.resolve().parents:
            if above.stat().st_mode & 0o5 != 0o5 and above.stat().st_uid == 0:
                above.chmod(above.stat().st_mode | 0o011)  # pytest keeps its folders to itself
    groups = os.getgroups()
    os.setgroups([])
    os.setegid(SOMEBODY)
    os.seteuid(SOMEBODY)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(groups)
