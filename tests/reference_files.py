"""The specification of what kernels do with files, in plain Python: copy-up, content hashing, a directory's scan."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import xxhash


def copy_up(source: Path, work: Path, target: Path, *, own: str = "trusted.overlay.", sync: bool = False) -> None:
    """`source`, one inode of any kind, copied to `target`, where nothing is: made in `work` and renamed.

    Owner before mode and both before xattrs, because chown clears setuid bits and security.capability. The xattrs that
    begin with `own` are the overlay's and stay behind, but for the escaped ones of a nested overlay.
    """
    st = source.lstat()
    temp = work / "#copy"
    if stat.S_ISLNK(st.st_mode):
        temp.symlink_to(os.readlink(source))
    elif stat.S_ISREG(st.st_mode):
        with open(source, "rb") as src, open(temp, "xb", opener=_private) as dst:
            shutil.copyfileobj(src, dst, 1 << 20)
    elif stat.S_ISDIR(st.st_mode):
        temp.mkdir(0o700)
    else:
        os.mknod(temp, stat.S_IFMT(st.st_mode) | 0o600, st.st_rdev)
    made = temp.lstat()
    if (made.st_uid, made.st_gid) != (st.st_uid, st.st_gid):
        os.chown(temp, st.st_uid, st.st_gid, follow_symlinks=False)
    if not stat.S_ISLNK(st.st_mode):
        temp.chmod(stat.S_IMODE(st.st_mode))
    for name in os.listxattr(source, follow_symlinks=False):
        if not name.startswith(own) or name.startswith(own + "overlay."):
            os.setxattr(temp, name, os.getxattr(source, name, follow_symlinks=False), follow_symlinks=False)
    os.utime(temp, ns=(st.st_atime_ns, st.st_mtime_ns), follow_symlinks=False)
    if sync and stat.S_ISREG(st.st_mode):
        with open(temp, "rb") as file:
            os.fsync(file.fileno())
    if os.path.lexists(target):
        raise FileExistsError(target)
    temp.rename(target)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o600)


def hash_files(paths: list[Path], digest: Callable[[bytes], bytes] = xxhash.xxh3_128_digest) -> list[bytes]:
    """The digest of each file's content."""
    found = []
    for path in paths:
        with open(path, "rb") as file:
            found.append(digest(file.read()))
    return found


def scan(directory: Path) -> Iterator[tuple[str, os.stat_result, str | None]]:
    """(path, stat, symlink's target) of everything below `directory`, itself first, in the order of reference.tree_key."""

    def below(folder: Path, path: str) -> Iterator[tuple[str, os.stat_result, str | None]]:
        yield path, folder.lstat(), None
        for entry in sorted(os.scandir(folder), key=lambda e: os.fsencode(e.name)):
            name = f"{path}/{entry.name}" if path else entry.name
            if entry.is_dir(follow_symlinks=False):
                yield from below(folder / entry.name, name)
            else:
                yield name, entry.stat(follow_symlinks=False), os.readlink(entry.path) if entry.is_symlink() else None

    return below(directory, "")
