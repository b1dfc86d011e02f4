"""One row of a tree as a value: what kind it is, and all that a layer says of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum, IntFlag


class Kind(IntEnum):
    """What a row is. The numbers are stored: never change one."""

    FILE = 0
    DIR = 1
    SYMLINK = 2
    CHAR = 3
    BLOCK = 4
    FIFO = 5
    SOCKET = 6
    WHITEOUT = 7


class Flag(IntFlag):
    """What else a row says. The numbers are stored: never change one."""

    NONE = 0
    OPAQUE = 1  # a directory that hides all lower names under it
    IMPLIED = 2  # a directory nobody wrote down: it says nothing but that it is one
    LOWER_LINK = 4  # a hard link to a name of a lower layer, `link`; what it is, only the lower layer knows


Xattrs = Mapping[str, bytes]
IMPLIED_MODE = 0o755  # of a directory that no layer wrote; owned by root, at time 0


@dataclass(frozen=True, slots=True)
class Entry:
    """One row. `path` is relative without a leading slash, "" for the root; bytes that are no UTF-8 as os.fsdecode has them.

    `size` counts bytes and is 0 for what is not a file; `hardlink` is the number that all names of one file share, -1 for a
    file of one name; `offset` is where the content begins in the layer's uncompressed tar, -1 where it is on disk.
    """

    path: str
    kind: Kind = Kind.FILE
    mode: int = 0
    uid: int = 0
    gid: int = 0
    size: int = 0
    mtime_ns: int = 0
    rdev: int = 0
    link: str | None = None
    xattrs: Xattrs = field(default_factory=dict)
    hardlink: int = -1
    flags: Flag = Flag.NONE
    offset: int = -1
    layer: int = 0
