"""Places that files are copied from and to, and how they are written down:

box:/etc/motd          in a container, by name or id
volume:data:/dump      in a volume
image:debian:12:/etc   in an image, to read only
./motd, /etc/motd      on the host; ./a:b and /a:b too, since a name with a slash in it is no container's
"""

from __future__ import annotations

import os
import posixpath
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from overlaykit.errors import InvalidReference, NotFound
from overlaykit.overlay import View
from overlaykit.overlay.folder import Folder
from overlaykit.overlay.osnames import OsNames
from overlaykit.overlay.stack import fail
from overlaykit.store.unpacking import unpack
from overlaykit.store.users import user_ids
from overlaykit.tree.table import StrPath
from overlaykit.tree.whiteout import WhiteoutFormat

if TYPE_CHECKING:
    from overlaykit.store.store import Store

MAX_LINKS = 10  # symlinks that a destination may lead through before somebody made a loop; Docker's number on the host


@dataclass(frozen=True, slots=True)
class Place:
    """One path in one file system. `prefix` and `path` together are what its user wrote, as far as that was needed.

    path   absolute and clean; what ends in "/" asks for a directory, what ends in "/." for what is in one
    tree   tells places in the same file system: equal for them, None on the host
    user   gives the ids of who a container's programs run as; None where there are no programs
    """

    fs: OsNames
    path: str
    prefix: str = ""
    tree: str | None = None
    user: Callable[[], tuple[int, int]] | None = None

    @property
    def is_host(self) -> bool:
        return self.tree is None

    @property
    def wants_directory(self) -> bool:
        return self.path.endswith(("/", "/."))

    @property
    def wants_contents(self) -> bool:
        """What is in the directory is meant, not the directory: `dir/.`, and the root, which has no name to go by."""
        return self.path.endswith("/.") or self.path == "/"

    @contextmanager
    def naming(self) -> Iterator[None]:
        """OSErrors raised inside say which place the path is in."""
        try:
            yield
        except OSError as e:
            if not getattr(e, "has_place", False):
                e.has_place = True  # type: ignore[attr-defined]
                e.filename, e.filename2 = self.prefix + os.fsdecode(e.filename or self.path), None
            raise

    def lookup(self, path: str) -> os.stat_result | None:
        """lstat of `path`; None if nothing is there. The other errors are raised."""
        try:
            return self.fs.lstat(path)
        except FileNotFoundError:
            return None

    def resolved(self) -> str:
        """The path with a symlink that it ends in followed as far as it leads, also to where nothing is. ELOOP."""
        path = self.path.rstrip("/") or "/"
        for _ in range(MAX_LINKS):
            st = self.lookup(path)
            if st is None or not stat.S_ISLNK(st.st_mode):
                return path
            path = posixpath.join(posixpath.dirname(path), self.fs.readlink(path))
        raise fail(40, self.path)  # ELOOP


def split(address: str) -> tuple[str, str, str]:
    """(kind, name, path) of an address. kind: host, container, volume or image. InvalidReference."""
    head, colon, path = address.partition(":")
    if not colon or head.startswith((".", "/")) or "/" in head:
        return "host", "", address
    if head in ("volume", "image") and path and not path.startswith("/"):
        name, sign, rest = path.partition(":/")
        if not sign:
            example = {"volume": "volume:data:/dump", "image": "image:debian:12:/etc"}[head]
            raise InvalidReference(f"{address}: which path in the {head}?", hint=f"write {example}")
        return head, name, f"/{rest}"
    if not head:
        raise InvalidReference(f"{address}: no container before the colon")
    return "container", head, path


def clean(path: str, base: str = "/") -> str:
    """`path` below `base` without dots, as text; what its end asks for stays: "dir/" and "dir/."."""
    if not path:
        raise fail(2, path)  # ENOENT, as for any empty path
    whole = posixpath.normpath("/" + posixpath.join(base, path).lstrip("/"))
    last = path.rpartition("/")[2]
    if last == ".":
        return f"{whole.rstrip('/')}/."
    return f"{whole.rstrip('/')}/" if last == "" else whole


@contextmanager
def opened(store: Store, address: StrPath, *, writing: bool = False) -> Iterator[Place]:
    """The place of `address`, open; an address that is no str is a path on the host. NotFound, InUse."""
    kind, name, path = split(address) if isinstance(address, str) else ("host", "", os.fspath(address))
    with ExitStack() as stack:
        if kind == "host":
            yield Place(Folder("/"), clean(path, os.getcwd()))
        elif kind == "image":
            if writing:
                raise InvalidReference(f"{address}: images never change", hint="copy into a container, and commit it")
            yield Place(stack.enter_context(_image(store, name)), clean(path), f"image:{name}:", f"image {name}")
        elif kind == "volume":
            volume = store.volume(name)
            if writing and volume.is_snapshot:
                raise InvalidReference(f"{address}: a snapshot never changes", hint=f"overlaykit volume clone {name} NEW")
            folder = Folder(stack.enter_context(volume.mounted()))
            stack.callback(folder.close)
            yield Place(folder, clean(path), f"volume:{name}:", f"volume {name}")
        else:
            container = store.container(name)
            lease = stack.enter_context(store.leases.hold())
            container.hold(lease)
            fs: OsNames
            if mounted := container.mounted_at():
                fs = Folder(mounted[0])  # what the kernel has is the kernel's to change, and to show
            elif writing:
                if not store.is_open(container.id):
                    stack.callback(container.close)
                fs = container.fs
            else:
                fs = stack.enter_context(container.view(lease))

            def ids() -> tuple[int, int]:
                return user_ids(fs, container.config.user or "")

            yield Place(fs, clean(path or "/"), f"{name}:", f"container {container.id}", ids)


@contextmanager
def _image(store: Store, name: str) -> Iterator[View]:
    with store.operation() as layout:
        top = unpack(store.image(name), layout, store.snapshots, store.leases)
        if top is None:
            raise NotFound(f"image {name} has no files")
        lowers, trees = store.snapshots.lowers(top), store.snapshots.trees(top)
        with View(lowers, trees=trees, userxattr=store.snapshots.whiteouts is WhiteoutFormat.USERXATTR) as view:
            yield view
