"""What there is to copy: everything at and below a path, one thing after another, as an entry and a way to its content."""

from __future__ import annotations

import errno
import fnmatch
import os
import posixpath
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from overlaykit.overlay.contents import copy_content
from overlaykit.overlay.osnames import OsNames, join
from overlaykit.store.places import Place
from overlaykit.tree import Entry, Kind

Fill = Callable[[int], None]  # writes a file's content to a descriptor
Advance = Callable[[int], object]  # is told how many bytes more are done

KINDS = {
    stat.S_IFREG: Kind.FILE,
    stat.S_IFDIR: Kind.DIR,
    stat.S_IFLNK: Kind.SYMLINK,
    stat.S_IFCHR: Kind.CHAR,
    stat.S_IFBLK: Kind.BLOCK,
    stat.S_IFIFO: Kind.FIFO,
    stat.S_IFSOCK: Kind.SOCKET,
}


@dataclass(frozen=True, slots=True)
class Item:
    """One thing to copy. entry.path is relative to where the copy goes, "" for the copy itself.

    link: the path, relative likewise, of the item that it is another name of. fill: writes its content.
    """

    entry: Entry
    fill: Fill | None = None
    link: str | None = None


def walk(place: Place, top: str, exclude: tuple[str, ...], advance: Advance) -> Iterator[Item]:
    """Everything at and below `top` in tree order, a file's other names as links to the first. OSError with the place."""
    with place.naming():
        yield from _walk(place, top, exclude, advance)


def _walk(place: Place, top: str, exclude: tuple[str, ...], advance: Advance) -> Iterator[Item]:
    fs = place.fs
    first: dict[tuple[int, int], str] = {}
    todo = [""]
    while todo:
        relative = todo.pop()
        path = join(top, relative) if relative else top
        st = fs.lstat(path)
        entry = entry_of(fs, path, relative, st)
        link = None
        if st.st_nlink > 1 and entry.kind != Kind.DIR:
            link = first.setdefault((st.st_dev, st.st_ino), relative)
        yield Item(entry, _filler(place, path, advance), None if link == relative else link)
        if entry.kind == Kind.DIR:
            names = sorted((each.name for each in fs.scandir(path)), key=os.fsencode, reverse=True)
            below = [join(relative, name) for name in names]
            todo += [each for each in below if not excluded(each, exclude)]


def entry_of(fs: OsNames, path: str, relative: str, st: os.stat_result) -> Entry:
    """What is at `path`, as a row with the path `relative`."""
    kind = KINDS[stat.S_IFMT(st.st_mode)]
    return Entry(
        relative,
        kind,
        mode=stat.S_IMODE(st.st_mode),
        uid=st.st_uid,
        gid=st.st_gid,
        size=st.st_size if kind == Kind.FILE else 0,
        mtime_ns=st.st_mtime_ns,
        rdev=st.st_rdev if kind in (Kind.CHAR, Kind.BLOCK) else 0,
        link=fs.readlink(path) if kind == Kind.SYMLINK else None,
        xattrs=_xattrs(fs, path),
    )


def _xattrs(fs: OsNames, path: str) -> dict[str, bytes]:
    try:
        names = fs.listxattr(path, follow_symlinks=False)
        return {name: fs.getxattr(path, name, follow_symlinks=False) for name in names}
    except OSError as e:
        if e.errno not in (errno.ENOTSUP, errno.ENODATA):  # a file system without them; one that has just been removed
            raise
        return {}


def _filler(place: Place, path: str, advance: Advance) -> Fill:
    def fill(fd: int) -> None:
        with place.naming():
            source = open_file(place.fs, path)
        try:
            copy_content(source, fd, advance)
        finally:
            os.close(source)

    return fill


def open_file(fs: OsNames, path: str) -> int:
    """A descriptor to read file `path`. O_NONBLOCK: it may be a fifo by now, and nobody may be at its other end."""
    return fs.open_fd(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)


def excluded(path: str, patterns: tuple[str, ...]) -> bool:
    """Whether a pattern fits the path, relative to what is copied, or its last name. "*" is for slashes too, as in tar."""
    name = posixpath.basename(path)
    return any(fnmatch.fnmatchcase(path, p) or fnmatch.fnmatchcase(name, p) for p in patterns)
