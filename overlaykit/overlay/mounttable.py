"""What is mounted where, as the kernel has it: proc(5), /proc/pid/mountinfo. Blanks and commas stand there in octal."""

from __future__ import annotations

import os
import re
from pathlib import Path

from overlaykit.tree.table import StrPath

TABLE = Path("/proc/self/mountinfo")


def mounts_of(upper: Path) -> list[Path]:
    """Where overlays with this upper are mounted, the oldest first."""
    return [place for _, place in overlays_of(upper)]


def overlays_of(upper: Path, table: Path = TABLE) -> list[tuple[int, Path]]:
    """The same with the number of each mount. table: of another process, which may be in another mount namespace."""
    found = []
    for line in table.read_bytes().splitlines():
        front, _, back = line.partition(b" - ")
        kind, _, options = back.split(b" ", 2)
        if kind == b"overlay" and os.fsencode(upper) in [
            _unescaped(option[9:]) for option in options.split(b",") if option.startswith(b"upperdir=")
        ]:
            words = front.split(b" ")
            found.append((int(words[0]), Path(os.fsdecode(_unescaped(words[4])))))
    return found


def mounted_below(place: Path) -> list[Path]:
    """What is mounted in the directories below `place`, the oldest first."""
    prefix = os.fsencode(place) + b"/"
    return [Path(os.fsdecode(path)) for path in _points() if path.startswith(prefix)]


def is_mounted(place: StrPath) -> bool:
    """Whether something is mounted at `place`, a path without symlinks. os.path.ismount misses binds of the same disk."""
    return os.fsencode(place) in _points()


def _points() -> list[bytes]:
    return [_unescaped(line.split(b" ")[4]) for line in TABLE.read_bytes().splitlines()]


def _unescaped(text: bytes) -> bytes:
    return re.sub(rb"\\([0-7]{3})", lambda m: bytes([int(m[1], 8)]), text)
