"""cp: from one place to another, as `docker cp` does it, and further: any place to any other, patterns, excludes, owners.

SRC is     and DST is       then
a file     absent           it becomes DST, whose directory must be there; "DST/" is refused
a file     a file           it takes DST's place
a file     a directory      it goes into it, under its own name
a directory  absent         its contents become those of the new directory DST
a directory  a file         is refused
a directory  a directory    it goes into it, under its own name; SRC/. puts only its contents there

A symlink that DST is is followed, one that SRC is is not, unless `follow` or a slash behind it says so. Links on the way
always are, inside the container.
"""

from __future__ import annotations

import errno
import os
import posixpath
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, BinaryIO

from overlaykit.errors import InvalidReference, Unsupported
from overlaykit.overlay.folder import Folder
from overlaykit.overlay.osnames import join
from overlaykit.overlay.patterns import MAGIC
from overlaykit.overlay.stack import fail
from overlaykit.store import tarstreams
from overlaykit.store.items import Advance, Item, walk
from overlaykit.store.loading import Counter, Progress
from overlaykit.store.packing import report
from overlaykit.store.places import Place, opened
from overlaykit.store.putting import Owners, Putter
from overlaykit.tree import Losses
from overlaykit.tree.table import StrPath

if TYPE_CHECKING:
    from overlaykit.store.store import Store


@dataclass
class Copied:
    """What was copied: entries of all kinds, bytes of content, and what could not be kept."""

    entries: int = 0
    size: int = 0
    losses: Losses = field(default_factory=list)


def copy(
    store: Store,
    sources: Sequence[StrPath | BinaryIO],
    target: StrPath | BinaryIO,
    *,
    follow: bool = False,
    owner: str | None = None,
    exclude: Iterable[str] = (),
    progress: Progress | None = None,
) -> Copied:
    """What Store.cp does, from any number of sources."""
    copied = Copied()
    advance = Counter(progress, "copy", 0).add
    with ExitStack() as stack:
        places: list[Place | BinaryIO] = [
            stack.enter_context(opened(store, source)) if isinstance(source, str | os.PathLike) else source
            for source in sources
        ]
        into = stack.enter_context(opened(store, target, writing=True)) if isinstance(target, str | os.PathLike) else target
        if all(not isinstance(place, Place) or place.is_host for place in [*places, into]):
            raise InvalidReference(
                "neither SRC nor DST is in a container", hint="write CONTAINER:PATH, volume:NAME:/PATH or image:NAME:/PATH"
            )
        found = [each for place in places for each in _matches(place, follow)]
        if len(found) > 1 and not (isinstance(into, Place) and _is_directory(into)):
            raise InvalidReference(f"{len(found)} sources want a directory that is there", hint="make it first")
        for source in found:
            if isinstance(into, Place):
                _copy_to(source, into, copied, Owners(owner, into), tuple(exclude), advance)
            else:
                assert isinstance(source, Source)  # streams at both ends are no container
                _copy_out(source, into, copied, tuple(exclude), advance)
    report("cp", copied.losses)
    return copied


@dataclass(frozen=True)
class Source:
    """Something that is there to be copied: `path` without links in it, and the name that its copy gets by itself."""

    place: Place
    path: str
    name: str
    is_dir: bool

    def items(self, exclude: tuple[str, ...], advance: Advance) -> Iterator[Item]:
        return walk(self.place, self.path, exclude, advance)


def _matches(place: Place | BinaryIO, follow: bool) -> list[Source | BinaryIO]:
    """What the path of a place names: itself, if it is there; else everything that it is a pattern for. OSError."""
    if not isinstance(place, Place):
        return [place]
    with place.naming():
        try:
            return [_source(place, place.path, follow)]
        except FileNotFoundError:
            if not MAGIC.search(place.path) or not (paths := sorted(place.fs.path("/").fs.iglob(place.path))):
                raise
    with place.naming():
        return [_source(place, path, follow) for path in paths]


def _source(place: Place, path: str, follow: bool) -> Source:
    st = place.fs.stat(path, follow_symlinks=follow or path.endswith("/."))
    resolved = path.rstrip("/") or "/"
    if follow or path.endswith(("/", "/.")):
        resolved = str(place.fs.path(path).resolve())
    name = "" if path.endswith("/.") or path == "/" else posixpath.basename(path.rstrip("/"))
    return Source(place, resolved, name, stat.S_ISDIR(st.st_mode))


def _is_directory(place: Place) -> bool:
    with place.naming():
        return place.fs.isdir(place.path)


def _copy_to(
    source: Source | BinaryIO, target: Place, copied: Copied, owners: Owners, exclude: tuple[str, ...], advance: Advance
) -> None:
    with target.naming():
        if isinstance(source, Source):
            path, into = _landing(source, target)
            _refuse_loops(source, target, path)
            items = source.items(exclude, advance)
        else:
            path, into = target.resolved(), True
            if not target.fs.isdir(path):
                raise fail(errno.ENOTDIR, path)
            items = tarstreams.read(source, exclude, advance)
        place = _anchored(path) if target.is_host else replace(target, path=path)
    putter = Putter(place, owners, copied.losses, into=into, makes_parents=not isinstance(source, Source))
    with place.naming():
        for item in items:
            putter.put(item)
            copied.entries += 1
            copied.size += item.entry.size
        putter.finish()


def _anchored(path: str) -> Place:
    """`path` on the host as a place in its directory: whoever swaps one below for a link meanwhile leads nowhere else."""
    directory, name = posixpath.split(path)
    return Place(Folder(directory), f"/{name}", directory.rstrip("/"))


def _landing(source: Source, target: Place) -> tuple[str, bool]:
    """Where the copy of `source` is to stand, and whether it only goes into a directory that is there. OSError."""
    path = target.resolved()
    st = target.lookup(path)
    if st is not None and stat.S_ISDIR(st.st_mode):
        return (join(path, source.name), False) if source.name else (path, True)
    if target.wants_directory and (st is not None or not source.is_dir):
        raise fail(errno.ENOTDIR if st is not None else errno.ENOENT, target.path)
    if st is not None:
        if source.is_dir:
            raise fail(errno.ENOTDIR, path)
        return path, False
    parent = posixpath.dirname(path)
    if not stat.S_ISDIR(target.fs.stat(parent).st_mode):
        raise fail(errno.ENOTDIR, parent)
    return path, False


def _refuse_loops(source: Source, target: Place, path: str) -> None:
    """Unsupported for a directory that is to be copied into itself: it would never end."""
    if not source.is_dir:
        return
    # A volume or a bind may be in several containers, or be the target itself.
    shown = {_inode(place) for place in source.place.fs.host_paths(source.path, below=True)} - {None}
    for place in target.fs.host_paths(posixpath.dirname(path)) if shown else ():
        while _inode(place) not in shown:
            if place in ("/", ""):
                break
            place = posixpath.dirname(place)
        else:
            what = f"{source.place.prefix}{source.path}"
            raise Unsupported(f"{what} cannot be copied into itself: {target.prefix}{path} is in a directory that it shows")
    if not target.is_host and source.place.tree == target.tree:
        real = str(target.fs.path(posixpath.dirname(path)).resolve())
        if f"{real}/".startswith(f"{source.path.rstrip('/')}/"):
            raise Unsupported(f"{source.place.prefix}{source.path} cannot be copied into itself: {target.prefix}{path}")


def _inode(path: str) -> tuple[int, int] | None:
    try:
        st = os.stat(path)
    except OSError:  # it has just been removed, or is in a tmpfs that is mounted nowhere
        return None
    return st.st_dev, st.st_ino


def _copy_out(source: Source, out: BinaryIO, copied: Copied, exclude: tuple[str, ...], advance: Advance) -> None:
    with source.place.naming():
        items = list(source.items(exclude, advance))
        copied.entries += len(items)
        copied.size += sum(item.entry.size for item in items)
        tarstreams.write(source.place.fs, source.path, source.name, items, out, copied.losses, advance)
