"""ROOT/reserve: room on the disk that is kept for the time when there is none, so that something can be removed then."""

from __future__ import annotations

import os
from contextlib import suppress

SIZE = 256 << 10  # bytes: what SQLite's log and the leases of a few removals take


def give_up_if_full(root: str | os.PathLike[str]) -> None:
    """Give the room up if there is less than that beside it. Who closes the store keeps it anew if it can."""
    disk = os.statvfs(root)
    if disk.f_bavail * disk.f_frsize < SIZE:
        with suppress(FileNotFoundError):
            os.unlink(os.path.join(root, "reserve"))
