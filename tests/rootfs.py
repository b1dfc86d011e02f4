"""A root filesystem small enough for every test: a static busybox, and one name of each kind that layers can carry."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

MTIME = 1_700_000_000  # seconds: 2023-11-14
CAP_NET_RAW = bytes.fromhex("0100000200200000000000000000000000000000")  # security.capability, version 2: what ping has

DIRS = {"": 0o755, "bin": 0o755, "dev": 0o755, "etc": 0o755, "etc/conf.d": 0o750, "home": 0o755, "home/user": 0o700}
DIRS |= {"lib": 0o755, "lib/deep": 0o755, "lib/deep/er": 0o755, "tmp": 0o1777, "var": 0o755, "var/log": 0o2775}
APPLETS = ["cat", "chmod", "chown", "cp", "echo", "id", "ln", "ls", "mkdir", "mkfifo", "mknod", "mv", "rm", "rmdir"]
APPLETS += ["sh", "sleep", "stat", "touch", "true", "truncate"]
FILES = {
    "etc/passwd": (b"root:x:0:0:root:/:/bin/sh\nuser:x:1000:1000::/home/user:/bin/sh\n", 0o644),
    "etc/hostname": (b"small\n", 0o644),
    "etc/motd": (b"welcome\n", 0o644),
    "etc/empty": (b"", 0o600),
    "etc/conf.d/a": (b"a=1\n", 0o640),
    "etc/conf.d/b": (b"b=2\n", 0o640),
    "home/user/notes": (b"one\ntwo\n" * 500, 0o600),
    "lib/deep/er/data": (bytes(range(256)) * 64, 0o444),
    "lib/deep/one": (b"1\n", 0o644),
    "lib/deep/two": (b"2\n", 0o644),
    "var/log/messages": (b"line\n" * 1000, 0o640),
    "bin/setuid": (b"#!/bin/sh\n", 0o4755),
    "bin/capable": (b"#!/bin/sh\n", 0o755),
    "etc/na\u00efve name": (b"utf-8\n", 0o644),
    "etc/\udcff\udcfe": (b"no utf-8\n", 0o644),
    "lib/" + "long-name-" * 20: (b"over 100 bytes\n", 0o644),
}
OWNERS = {"home/user": (1000, 1000), "home/user/notes": (1000, 1000), "var/log": (0, 4), "var/log/messages": (3, 4)}
SYMLINKS = {"etc/mtab": "/proc/mounts", "lib/link": "deep/one", "lib/dangling": "nowhere", "var/run": "../tmp"}
HARDLINKS = {"lib/deep/uno": "lib/deep/one", "etc/primo": "lib/deep/one"}
XATTRS = {"bin/capable": {"security.capability": CAP_NET_RAW}, "etc/motd": {"user.colour": b"blue"}}
DEVICES = {"dev/null": (1, 3, 0o666), "dev/console": (5, 1, 0o600)}


def write(tar: Path, *, busybox: Path | None = None) -> None:
    """Write the root filesystem to `tar` (PAX form, times in whole seconds), with `busybox` as /bin's programs."""
    with tarfile.open(tar, "w", format=tarfile.PAX_FORMAT, encoding="utf-8", errors="surrogateescape") as out:
        for name, mode in DIRS.items():
            out.addfile(member(name or ".", mode, type=tarfile.DIRTYPE))
        if busybox is not None:
            program = busybox.read_bytes()
            out.addfile(member("bin/busybox", 0o755, size=len(program)), io.BytesIO(program))
            for applet in APPLETS:
                out.addfile(member(f"bin/{applet}", 0o777, type=tarfile.SYMTYPE, linkname="busybox"))
        for name, (content, mode) in FILES.items():
            out.addfile(member(name, mode, size=len(content)), io.BytesIO(content))
        for name, target in SYMLINKS.items():
            out.addfile(member(name, 0o777, type=tarfile.SYMTYPE, linkname=target))
        for name, target in HARDLINKS.items():
            out.addfile(member(name, FILES[target][1], type=tarfile.LNKTYPE, linkname=target))
        for name, (major, minor, mode) in DEVICES.items():
            out.addfile(member(name, mode, type=tarfile.CHRTYPE, devmajor=major, devminor=minor))
        out.addfile(member("tmp/queue", 0o622, type=tarfile.FIFOTYPE))


def member(name: str, mode: int, **values: object) -> tarfile.TarInfo:
    """The header of one name, owner, time and xattrs as the tables above have them."""
    info = tarfile.TarInfo(name)
    info.mode, info.mtime = mode, MTIME
    info.uid, info.gid = OWNERS.get(name, (0, 0))
    for field, value in values.items():
        setattr(info, field, value)
    for attribute, value in XATTRS.get(name, {}).items():
        # tarfile writes PAX values as text; surrogateescape carries the bytes through.
        info.pax_headers[f"SCHILY.xattr.{attribute}"] = value.decode("utf-8", "surrogateescape")
    return info
