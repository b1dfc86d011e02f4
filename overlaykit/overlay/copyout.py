"""A directory of a merged tree or of another copied to the host, with modes, owners, times, xattrs, hard links and holes."""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress
from pathlib import Path

from overlaykit._ext import copyup
from overlaykit.overlay.osnames import OsNames, join
from overlaykit.tree.table import StrPath

AT_FDCWD, NOREPLACE, EXCHANGE = -100, 1, 2  # renameat2(2)


def move_names(source: Path, target: StrPath) -> None:
    """Move all that is in directory `source` to `target`, which gets its attributes. Names that `target` has stay."""
    source_fd = os.open(source, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        st = os.fstat(source_fd)  # before names that leave set its time
        target_fd = os.open(target, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for name in map(os.fsencode, os.listdir(source_fd)):
                with suppress(FileExistsError):
                    copyup.rename_at(source_fd, name, target_fd, name, NOREPLACE)
            _copy_attributes(st, {n: os.getxattr(source, n) for n in os.listxattr(source)}, target)
            os.fsync(target_fd)
        finally:
            os.close(target_fd)
    finally:
        os.close(source_fd)


def exchange(a: StrPath, b: StrPath) -> None:
    """Let two names of one file system change places, in one step (renameat2(2))."""
    copyup.rename_at(AT_FDCWD, os.fsencode(a), AT_FDCWD, os.fsencode(b), EXCHANGE)


def copy_tree(view: OsNames, source: str, target: Path) -> None:
    """A new directory `target` with all that directory `source` of `view` has, and its attributes."""
    first: dict[tuple[int, int], Path] = {}
    todo = [(source, target, False)]
    while todo:  # without recursion: a tree may be deeper than Python goes
        path, place, is_full = todo.pop()
        if is_full:  # every name made in it set its time
            _copy_attributes(view.stat(path), _xattrs_of(view, path, follow=True), place)
            continue
        place.mkdir(mode=0o700)
        todo.append((path, place, True))
        for entry in view.scandir(path):
            if entry.is_dir(follow_symlinks=False):
                todo.append((join(path, entry.name), place / entry.name, False))
            else:
                _copy_name(view, join(path, entry.name), place / entry.name, first)


def _copy_name(view: OsNames, path: str, place: Path, first: dict[tuple[int, int], Path]) -> None:
    st = view.lstat(path)
    other = first.setdefault((st.st_dev, st.st_ino), place) if st.st_nlink > 1 else place
    if other != place:
        os.link(other, place, follow_symlinks=False)
        return
    if stat.S_ISLNK(st.st_mode):
        os.symlink(view.readlink(path), place)
    elif stat.S_ISREG(st.st_mode):
        _copy_file(view, path, place)
    else:
        os.mknod(place, st.st_mode, st.st_rdev)
    _copy_attributes(st, _xattrs_of(view, path), place)


def _xattrs_of(view: OsNames, path: str, *, follow: bool = False) -> dict[str, bytes]:
    names = view.listxattr(path, follow_symlinks=follow)
    return {name: view.getxattr(path, name, follow_symlinks=follow) for name in names}


def _copy_file(view: OsNames, source: str, target: Path) -> None:
    read = view.open_fd(source, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        write = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            copyup.copy_data(read, write, os.fstat(read).st_size)
        finally:
            os.close(write)
    finally:
        os.close(read)


def _copy_attributes(st: os.stat_result, xattrs: dict[str, bytes], target: StrPath) -> None:
    """Give `target` owner, xattrs, mode and times, in this order: a chown takes capabilities and setuid away."""
    if os.geteuid() == 0:
        os.chown(target, st.st_uid, st.st_gid, follow_symlinks=False)
    for name, value in xattrs.items():
        try:
            os.setxattr(target, name, value, follow_symlinks=False)
        except OSError as e:
            # Docker ignores a file system without them; without root, trusted.* and security.* are not ours to give.
            if e.errno != errno.ENOTSUP and (e.errno != errno.EPERM or os.geteuid() == 0):
                raise
    if not stat.S_ISLNK(st.st_mode):
        os.chmod(target, stat.S_IMODE(st.st_mode))
    os.utime(target, ns=(st.st_atime_ns, st.st_mtime_ns), follow_symlinks=False)
