"""Who a container's programs run as: USER of its config, looked up in its own /etc/passwd and /etc/group."""

from __future__ import annotations

import os
import stat

from overlaykit.errors import NotFound
from overlaykit.overlay.osnames import OsNames

PASSWD, GROUP = "/etc/passwd", "/etc/group"
LONGEST = 1 << 20  # bytes of either file that are looked at: both are the image's, and need not be what they seem


def user_ids(fs: OsNames, user: str) -> tuple[int, int]:
    """(uid, gid) of "", "NAME", "UID", "NAME:GROUP" or "UID:GID" in the tree `fs`. NotFound for a name that is not there."""
    name, _, group = user.partition(":")
    if not name:
        name = "0"
    row = _row(fs, PASSWD, name, 2)
    if row is None and not name.isdecimal():
        raise NotFound(f"user {name} is not in the container's /etc/passwd")
    uid = int(row[2]) if row else int(name)
    if not group:
        return uid, int(row[3]) if row else 0
    found = None if group.isdecimal() else _row(fs, GROUP, group, 2)
    if found is None and not group.isdecimal():
        raise NotFound(f"group {group} is not in the container's /etc/group")
    return uid, int(found[2]) if found else int(group)


def _row(fs: OsNames, path: str, name: str, id_field: int) -> list[str] | None:
    """The fields of the line for `name`, which may be the id; None without one."""
    try:
        # O_NONBLOCK: it need not be a file, and nobody may be at the other end of a fifo.
        fd = fs.open_fd(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return None  # an image without users: ids will do
    with open(fd, "rb", buffering=0) as file:
        text = file.read(LONGEST) if stat.S_ISREG(os.fstat(fd).st_mode) else b""
    for line in (text or b"").decode(errors="surrogateescape").splitlines():
        fields = line.split(":")
        ids = fields[id_field:][: 2 if path == PASSWD else 1]
        if ids and all(id.isdecimal() for id in ids) and name in (fields[0], ids[0]):
            return fields
    return None
