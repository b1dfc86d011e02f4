"""Changes of a container's tree with a trap in each, and the image of two layers that they are made in.

What a container writes through a mount is told by plain calls of os, so that one set of changes goes through the kernel's
overlay, fuse-overlayfs and whatever a peer has mounted.
"""

from __future__ import annotations

import errno
import io
import os
import shutil
import socket
import stat
import struct
import tarfile
from pathlib import Path

import imagefiles
from rootfs import CAP_NET_RAW, member

NO_UTF8 = os.fsdecode(b"\xff\xfe no utf-8")
NOBODY = 2**32 - 1
RIGHTS = [(0x01, 6, NOBODY), (0x02, 4, 1000), (0x04, 4, NOBODY), (0x10, 4, NOBODY), (0x20, 4, NOBODY)]
# u::rw- u:1000:r-- g::r-- m::r-- o::r--, as linux/posix_acl_xattr.h has them
ACL = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *right) for right in RIGHTS)
SPARSE = 3 << 20  # bytes


def layers(base: Path) -> list[bytes]:
    """The tars of the image: the root filesystem `base`, and a layer whose own marks must not come back."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name in ("etc/.wh.hostname", "lib/deep/er/.wh..wh..opq"):
            tar.addfile(member(name, 0o600))
        for name in (
            "opt",
            "opt/tree",
            "opt/tree/sub",
            "opt/tree/sub/er",
            "opt/moved",
            "opt/moved/in",
            "opt/again",
            "opt/list",
        ):
            tar.addfile(member(name, 0o755, type=tarfile.DIRTYPE))
        tar.addfile(member("lib/deep/er", 0o711, type=tarfile.DIRTYPE))
        for name in (
            "lib/deep/er/new",
            "opt/tree/a",
            "opt/tree/sub/b",
            "opt/tree/sub/er/c",
            "opt/moved/in/x",
            "opt/moved/y",
        ):
            tar.addfile(member(name, 0o644, size=len(name)), io.BytesIO(name.encode()))
        for name in ("opt/again/old", "opt/again/same", "opt/mode", "opt/owner", "opt/time", "opt/both", "opt/attribute"):
            tar.addfile(member(name, 0o644, size=9000), io.BytesIO(bytes(range(250)) * 36))
        for name in ("opt/list/1", "opt/list/2", "opt/one", "opt/two", "opt/three", "opt/four", "opt/five"):
            tar.addfile(member(name, 0o644, size=2), io.BytesIO(b"x\n"))
        tar.addfile(member("opt/six", 0o644, type=tarfile.LNKTYPE, linkname="opt/five"))
        tar.addfile(member("opt/link", 0o777, type=tarfile.SYMTYPE, linkname="tree"))
    return [base.read_bytes(), out.getvalue()]


def image(base: Path, path: Path, tag: str) -> Path:
    """The docker-archive of the image at `path`, named `tag`."""
    return imagefiles.write(path, imagefiles.docker_20(layers(base), tag=tag), form="tar")


def write(path: Path, content: bytes | str) -> None:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def change(root: Path, *, longest: int = 255, to_directory: bool = True, devices: bool = True) -> None:
    """Make the changes in the tree at `root`. As root; everything that an ordinary file system takes.

    longest: bytes that a name may have. to_directory: whether directories with something in them take the places of others.
    devices: False for who is root in a user namespace alone, and can make none.
    """
    add(root, "n" * longest)
    if devices:
        os.mknod(root / "srv/new/char", stat.S_IFCHR | 0o620, os.makedev(1, 5))
        os.mknod(root / "srv/new/block", stat.S_IFBLK | 0o660, os.makedev(7, 300))
        (root / "dev/console").unlink()
    alter(root)
    remove_and_replace(root)
    if to_directory:
        (root / "opt/two").unlink()
        (root / "opt/two/inner").mkdir(parents=True)
        write(root / "opt/two/inner/file", "2\n")
        (root / "lib/link").unlink()
        (root / "lib/link").mkdir()
        write(root / "lib/link/x", "x\n")
    rename(root)


def add(root: Path, long: str) -> None:
    new = root / "srv/new"
    new.mkdir(parents=True)
    for name in ("empty", "sticky", "shared", NO_UTF8, long, "a\nb\\c:d,e"):
        (new / name).mkdir()
    (new / "sticky").chmod(0o1777)
    (new / "shared").chmod(0o2775)
    write(new / NO_UTF8 / long, "long\n")
    deep = new
    for _ in range(12):
        deep /= "deep-" * 8
    deep.mkdir(parents=True)
    write(deep / "bottom", "deep\n")
    write(new / "early", "before 1970\n")
    write(new / "late", "to the nanosecond\n")
    write(new / "setuid", "#!/bin/sh\n")
    (new / "setuid").chmod(0o6755)
    write(new / "capable", "#!/bin/sh\n")
    os.setxattr(new / "capable", "security.capability", CAP_NET_RAW)
    write(new / "attributes", "x")
    os.setxattr(new / "attributes", "user.empty", b"")
    os.setxattr(new / "attributes", "user.binary", bytes(range(256)))
    os.setxattr(new / "shared", "user.of.a.directory", b"d")
    os.symlink("nowhere", new / "dangling")
    os.symlink("/etc/passwd", new / "absolute")
    os.lchown(new / "dangling", 7, 8)
    os.mkfifo(new / "fifo", 0o640)
    with open(new / "sparse", "wb") as file:
        file.seek(1 << 20)
        file.write(b"in the middle")
        file.truncate(SPARSE)
    write(new / "name 1", "three names\n")
    os.link(new / "name 1", new / "name 2")
    os.link(new / "name 1", root / "etc/name 3")
    os.link(new / "fifo", new / "fifo too")
    os.utime(new / "early", ns=(0, -86_400_500_000_000))
    os.utime(new / "late", ns=(0, 1_600_000_000_123_456_789))
    # Relative, since a socket's path must be short.
    here = os.open(".", os.O_RDONLY)
    try:
        os.chdir(new)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind("socket")
    finally:
        os.fchdir(here)
        os.close(here)


def alter(root: Path) -> None:
    with open(root / "var/log/messages", "ab") as file:
        file.write(b"more\n")
    os.truncate(root / "home/user/notes", 10)
    (root / "opt/mode").chmod(0o600)
    os.chown(root / "opt/owner", 1000, 100)
    os.utime(root / "opt/time", ns=(0, 1_500_000_000_000_000_001))
    (root / "opt/both").chmod(0o640)
    os.chown(root / "opt/both", 1, 2)
    os.setxattr(root / "opt/attribute", "user.new", b"1")
    os.removexattr(root / "etc/motd", "user.colour")
    (root / "opt").chmod(0o750)
    os.chown(root / "home", 5, 5)
    os.lchown(root / "opt/link", 3, 3)
    (root / "lib/deep/er").chmod(0o555)
    # A name of a file with three: it gets an inode of its own.
    with open(root / "etc/primo", "ab") as file:
        file.write(b"more\n")
    os.link(root / "opt/one", root / "opt/one too")
    os.link(root / "opt/five", root / "srv/five too")


def remove_and_replace(root: Path) -> None:
    for name in ("etc/empty", "lib/dangling", "lib/deep/uno", "tmp/queue"):
        (root / name).unlink()
    shutil.rmtree(root / "etc/conf.d")
    for name in ("opt/list/1", "opt/list/2"):
        (root / name).unlink()
    # Directory to file, file to fifo, symlink to file.
    shutil.rmtree(root / "opt/tree/sub")
    write(root / "opt/tree/sub", "a file\n")
    (root / "opt/three").unlink()
    os.mkfifo(root / "opt/three")
    (root / "var/run").unlink()
    write(root / "var/run", "no link\n")
    # Away and made again, with one name as it was, one other, and links among the new ones.
    shutil.rmtree(root / "opt/again")
    (root / "opt/again").mkdir(0o700)
    write(root / "opt/again/same", "other\n")
    os.link(root / "opt/again/same", root / "opt/again/linked")
    shutil.rmtree(root / "home/user")
    (root / "home/user").mkdir()
    # What is made and goes again leaves no mark, or one that hides nothing.
    write(root / "srv/gone", "x")
    (root / "srv/gone").unlink()
    shutil.rmtree(root / "lib/deep/er")
    (root / "lib/deep/er").mkdir()
    write(root / "lib/deep/er/data", "back\n")


def rename(root: Path) -> None:
    (root / "opt/four").rename(root / "srv/four moved")
    (root / "srv/new/empty").rename(root / "srv/empty moved")
    move(root / "opt/moved", root / "srv/moved")
    write(root / "srv/moved/in/added", "x\n")
    (root / "srv/moved/y").unlink()
    (root / "opt/moved").mkdir()  # a new directory in the place of the one that went
    write(root / "opt/moved/fresh", "x\n")


def move(source: Path, target: Path) -> None:
    """As mv does it: where the overlay does not rename a lower directory (EXDEV), copied and removed."""
    try:
        source.rename(target)
    except OSError as e:
        if e.errno != errno.EXDEV:
            raise
        shutil.copytree(source, target, symlinks=True)
        shutil.rmtree(source)


def attributes(root: Path) -> None:
    """Access control lists and xattrs that only root sees, on what is new and on what was there."""
    os.setxattr(root / "srv/new/attributes", "system.posix_acl_access", ACL)
    os.setxattr(root / "opt/attribute", "system.posix_acl_access", ACL)
    os.setxattr(root / "srv/new/attributes", "trusted.some", b"1")


def nested(root: Path) -> None:
    """xattrs of an overlay whose layers lie in this one."""
    os.setxattr(root / "srv/new/shared", "trusted.overlay.opaque", b"y")
    os.setxattr(root / "srv/new/attributes", "trusted.overlay.origin", b"o")
    os.setxattr(root / "srv/new/attributes", "user.overlay.origin", b"o")
