"""Who a program runs as: USER of an image and `docker exec --user`, by the /etc/passwd and /etc/group of the tree itself.

`user[:group]`, each a name or a number. A number that the files do not know is taken as it is; its group is 0 then. Without
`:group` all groups are taken that list the user.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from overlaykit.errors import NotFound, OverlaykitError
from overlaykit.overlay.osnames import OsNames

LARGEST = 1 << 20  # bytes of a file that are looked at: far more than those of a large site
FIELDS = 7  # of passwd; group has fewer
MOST = (1 << 31) - 1  # of a number, as runc has it
DIGITS = len(str(MOST))


@dataclass(frozen=True, slots=True)
class Identity:
    """User and group id, the ids of further groups, and what HOME is."""

    uid: int = 0
    gid: int = 0
    groups: Sequence[int] = ()
    home: str = "/root"


ROOT = Identity()


def identity(fs: OsNames, text: str) -> Identity:
    """Who `text` is in the tree of `fs`. NotFound for a name that its files do not have."""
    user, colon, group = text.partition(":")
    known = next(_matching(fs, "/etc/passwd", user or "0"), None)
    if known is None:
        name, uid, gid, home = "", _number(user or "0", text, "user", "passwd"), 0, "/"
    else:
        name, uid, gid, home = known[0], _number(known[2], text), _number(known[3] or "0", text), known[5]
    if colon and group:
        found = next(_matching(fs, "/etc/group", group), None)
        gid = _number(found[2], text) if found else _number(group, text, "group", "group")
        return Identity(uid, gid, (), home)
    listed = [row for row in _rows(fs, "/etc/group") if name and name in row[3].split(",")]
    return Identity(uid, gid, tuple(_number(row[2], text) for row in listed), home)


def _matching(fs: OsNames, path: str, wanted: str) -> Iterator[list[str]]:
    """The rows of this name or, for a number, of this id."""
    return (row for row in _rows(fs, path) if row[0] == wanted or (wanted.isdecimal() and row[2] == wanted))


def _rows(fs: OsNames, path: str) -> Iterator[list[str]]:
    """The fields of each line, those that are missing empty; no lines if there is no such file."""
    try:
        if not stat.S_ISREG(fs.stat(path).st_mode):
            return  # nobody opens a device, or waits for a fifo
        with fs.open(path, "rb") as file:
            lines = file.read(LARGEST).split(b"\n")
    except (FileNotFoundError, NotADirectoryError):
        return
    for line in lines:
        row = os.fsdecode(line).split(":")
        if line and b"\0" not in line:
            yield row + [""] * (FIELDS - len(row))


def _number(digits: str, text: str, kind: str = "number", file: str = "passwd") -> int:
    if not digits.isascii() or not digits.isdecimal():
        raise NotFound(f"user {text!r}: no {kind} {digits!r} in /etc/{file} of the container")
    if len(digits) > DIGITS or int(digits) > MOST:
        raise OverlaykitError(f"user {text!r}: {digits[: DIGITS + 1]} is no id", hint=f"ids go from 0 to {MOST}")
    return int(digits)
