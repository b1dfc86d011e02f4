"""One layer onto an empty directory, in one pass over its tar: the directory becomes a lower of an overlay.

Files are made as their bytes go by. Whiteouts, opaque marks, hard links, xattrs and the attributes of directories wait
until the whole layer has been seen, so that the order of entries in the tar cannot matter.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from overlaykit._ext import extract
from overlaykit.errors import InvalidLayer
from overlaykit.overlay.below import open_directory
from overlaykit.overlay.incoming import Incoming
from overlaykit.tree.diff import hidden
from overlaykit.tree.losses import Loss, Losses
from overlaykit.tree.merge import merge
from overlaykit.tree.regular import find_target, regular
from overlaykit.tree.table import Entry, Flag, Kind, Mask, Rows, Strings, StrPath, Tree, first_names
from overlaykit.tree.tarball import ROW, USUAL, Limits, Readable, TarReader, Window
from overlaykit.tree.whiteout import OPAQUE, WhiteoutFormat, inner_to_own, oci_names

Lowers = Sequence[tuple[StrPath, Tree]]
LIVES_ELSEWHERE = (errno.ENOTSUP, errno.EPERM, errno.ENODATA)  # an xattr that this file system or user cannot set


def apply_layer(
    stream: Readable,
    directory: StrPath,
    *,
    whiteouts: WhiteoutFormat = WhiteoutFormat.OVERLAY,
    lowers: Lowers | Callable[[], Lowers] = (),
    limits: Limits = USUAL,
    losses: Losses | None = None,
) -> Tree:
    """The Tree of the layer whose uncompressed tar is `stream`, unpacked into the existing, empty `directory`.

    The stream is read to its end, so a verifying one has seen every byte when this returns. lowers: the layers below,
    bottom first, as (directory, Tree), or a function that gives them and is only called once the stream was read: they
    lend their attributes to directories that this layer implies, and the files that its hard links name. whiteouts: how
    whiteouts and opaque marks are made; NONE makes neither, and they are in the Tree alone, where hard links to files of
    lower layers then stay links too. What the file system or the user's rights cannot keep is appended to `losses`; the
    Tree has it all the same. Without root that is owners and devices.

    Raises InvalidLayer or UnsafePath for a tar that breaks the format, OSError for what the file system refuses. Whatever
    happens, nothing outside `directory` is made or changed; after an error the caller throws the directory away.
    """
    losses = [] if losses is None else losses
    root_fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return _Application(root_fd, whiteouts, lowers, losses).run(TarReader(stream, limits))
    finally:
        os.close(root_fd)


class _Application(Incoming):
    """One apply at work. It ends with the tree; nothing of it is kept."""

    def __init__(
        self, root_fd: int, whiteouts: WhiteoutFormat, lowers: Lowers | Callable[[], Lowers], losses: Losses
    ) -> None:
        super().__init__(root_fd, losses)
        self.whiteouts = whiteouts
        self._lowers = lowers

    def run(self, windows: Iterable[Window]) -> Tree:
        try:
            return self._finish(self.make(windows))
        finally:
            self.close()

    def _finish(self, table: Tree) -> Tree:
        is_link = (table.flags & Flag.LOWER_LINK) != 0
        # `layer` has no meaning yet: it takes along which rows were links, and so were not made while they went by.
        tree = regular(table.with_columns(layer=is_link), oci_names=True)
        link_rows = np.flatnonzero((tree.layer != 0) & (tree.kind != Kind.WHITEOUT))
        tree = tree.with_columns(layer=np.zeros(len(tree)))
        tree = self._make_links(tree, link_rows)
        tree = self._without_false_whiteouts(tree)
        if self.whiteouts is WhiteoutFormat.OCI:
            self._make_oci_marks(tree)
        elif self.whiteouts is not WhiteoutFormat.NONE:
            rows = _whiteouts(tree)
            self._nodes(tree, rows, np.full(len(rows), -1, np.int64))
        self._make_implied(tree)
        self._set_xattrs(tree)
        self._set_directories(tree)
        return tree

    @property
    def lowers(self) -> Lowers:
        # No cached_property: before Python 3.12 all objects share its lock, and this may wait for another layer's apply.
        if callable(self._lowers):
            self._lowers = self._lowers()
        return self._lowers

    @cached_property
    def merged(self) -> Tree:
        """What the layers below show. Ask for `lowers` first, for the reason given there."""
        return merge([t for _, t in self.lowers])

    def _unmade(self, tree: Tree) -> Mask:
        """Which rows are devices that `_refuse_devices` left out."""
        unmade: Mask = (tree.kind == Kind.CHAR) | (tree.kind == Kind.BLOCK)
        if unmade.any() and self.makes_devices:
            unmade &= (tree.kind == Kind.CHAR) & (tree.rdev == 0)
        return unmade

    def _make_links(self, tree: Tree, rows: Rows) -> Tree:
        """The tree, its hard links made: within the layer as links, to a lower layer's file as a copy of it."""
        unmade = self._unmade(tree)
        for row in np.flatnonzero(unmade).tolist():
            with suppress(FileNotFoundError):  # what an earlier entry of the path has made
                self.make_room(tree.paths[row], is_dir=False)
        for row in rows[unmade[rows]].tolist():
            self.losses.append(Loss(tree.path(row), "a hard link to a device that was not made"))
        is_first = (tree.hardlink >= 0) & ~unmade
        is_first[rows] = False
        first = np.flatnonzero(is_first)
        groups, index = np.unique(tree.hardlink[first], return_index=True)
        is_lower = (tree.flags[rows] & Flag.LOWER_LINK) != 0
        inner = rows[~is_lower & ~unmade[rows]]
        self._nodes(tree, inner, first[index[np.searchsorted(groups, tree.hardlink[inner])]])
        if is_lower.any() and (self.lowers or self.whiteouts is not WhiteoutFormat.NONE):
            return self._copy_lowers(tree, rows[is_lower].tolist())
        return tree

    def _copy_lowers(self, tree: Tree, rows: list[int]) -> Tree:
        """The tree with `rows`, hard links to lower layers' files, made copies of those; names of one file stay together."""
        names = ("kind", "flags", "mode", "uid", "gid", "size", "mtime_ns", "rdev", "link", "xattrs", "hardlink")
        columns = {name: getattr(tree, name).copy() for name in names}
        links, sets = [*tree.links], [*tree.xattr_sets]
        first = first_names(self.merged)
        copies: dict[int, int] = {}  # the first row here, by the file's first row in self.merged
        group = int(tree.hardlink.max(initial=-1)) + 1
        for row in rows:
            target = tree.links[int(tree.link[row])]
            found = find_target(self.merged, target)
            if found < 0 or self.merged.kind[found] == Kind.DIR:
                raise InvalidLayer(f"{tree.path(row)!r}: a hard link to {os.fsdecode(target)!r}, a file that no layer has")
            copy = copies.setdefault(int(first[found]), row)
            if copy != row:
                self._nodes(tree, np.array([row]), np.array([copy]))
                if columns["hardlink"][copy] < 0:
                    columns["hardlink"][copy] = group
                    group += 1
                for name in names:
                    columns[name][row] = columns[name][copy]
                continue
            entry = self._copy_lower(found, tree.paths[row])
            self.losses.append(Loss(tree.path(row), "a hard link to a lower layer's file became a copy of it"))
            for name in ("kind", "mode", "uid", "gid", "size", "mtime_ns", "rdev"):
                columns[name][row] = getattr(entry, name)
            columns["flags"][row] &= ~np.uint8(Flag.LOWER_LINK)
            columns["link"][row] = columns["xattrs"][row] = -1
            if entry.link is not None:
                columns["link"][row] = len(links)
                links.append(os.fsencode(entry.link))
            if entry.xattrs:
                columns["xattrs"][row] = len(sets)
                sets.append(entry.xattrs)
        if self.whiteouts is WhiteoutFormat.NONE:
            return tree
        return replace(tree.with_columns(**columns), links=Strings.of(links), xattr_sets=tuple(sets))

    def _copy_lower(self, found: int, path: bytes) -> Entry:
        """Copy the file of row `found` of self.merged to `path`; returns its row."""
        entry = self.merged.entry(found)
        one = np.zeros(1, ROW)
        one["kind"], one["mode"], one["mtime_ns"], one["rdev"] = entry.kind, entry.mode, entry.mtime_ns, entry.rdev
        one["uid"], one["gid"] = (entry.uid, entry.gid) if self.me == 0 else (self.me, self.mine)
        link = os.fsencode(entry.link or "")
        one["path_end"], one["link_end"] = len(path), len(link)
        alone = Window(one, Strings.of([path]), Strings.of([link]), memoryview(b"\0"), 0)
        if entry.size == 0:
            self.create(alone, np.zeros(1, np.uint8))
        else:
            with open(self._open_lower(found), "rb") as content:
                one["size"] = entry.size  # none of it is in the window, so the file stays open
                self.create(alone, np.zeros(1, np.uint8))
                while self.tail is not None:
                    data = content.read(min(1 << 20, self.tail.left))
                    if not data:
                        raise OSError(errno.EIO, f"the lower file is shorter than {entry.size} bytes", entry.path)
                    self.tail = self.tail.feed(memoryview(data), self)
        if entry.xattrs:
            folder = open_directory(self.root_fd, path.rpartition(b"/")[0])
            try:
                self._write_xattrs(folder, path, entry.xattrs)
            finally:
                os.close(folder)
        return entry

    def _open_lower(self, found: int) -> int:
        """A descriptor to read the content of row `found` of self.merged, by whichever of its names its layer has."""
        group = self.merged.hardlink[found]
        for row in [found] if group < 0 else np.flatnonzero(self.merged.hardlink == group).tolist():
            directory, lower = self.lowers[int(self.merged.layer[row])]
            path = self.merged.paths[row]
            if lower.find(path) < 0:
                continue
            root_fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                folder = open_directory(root_fd, path.rpartition(b"/")[0])
            finally:
                os.close(root_fd)
            try:
                return os.open(path.rpartition(b"/")[2], os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
            finally:
                os.close(folder)
        raise InvalidLayer(f"{self.merged.path(found)!r}: no lower layer has it under one of its names")

    def _without_false_whiteouts(self, tree: Tree) -> Tree:
        """The tree without char devices 0:0: they were not made, since an overlay takes them for whiteouts."""
        false = (tree.kind == Kind.CHAR) & (tree.rdev == 0)
        return tree.take(~false) if false.any() else tree

    def _make_oci_marks(self, tree: Tree) -> None:
        """Whiteouts and opaque marks as the files that a tar has."""
        paths = oci_names(tree, _whiteouts(tree), np.flatnonzero((tree.flags & Flag.OPAQUE) != 0))
        rows = np.zeros(len(paths), ROW)
        names = Strings.of(paths)
        rows["path_end"], rows["mode"], rows["uid"], rows["gid"] = names.start[1:], 0o600, self.me, self.mine
        window = Window(rows, names, Strings.of([b""] * len(paths)), memoryview(b"\0"), 0)
        self.create(window, np.zeros(len(paths), np.uint8))

    def _make_implied(self, tree: Tree) -> None:
        """Directories of which the tar has no more than marks in them: nothing has made these yet."""
        rows = np.flatnonzero((tree.flags & (Flag.IMPLIED | Flag.OPAQUE)) != 0)
        self._attributes(tree, rows[rows > 0], {**self._own(tree), "mode": np.full_like(tree.mode, 0o700)})

    def _own(self, tree: Tree) -> dict[str, npt.NDArray[Any]]:
        """Columns for `extract.attributes` that change no owner."""
        return {
            "mode": tree.mode,
            "uid": np.full_like(tree.uid, self.me),
            "gid": np.full_like(tree.gid, self.mine),
            "mtime_ns": tree.mtime_ns,
        }

    def _attributes(self, tree: Tree, rows: Rows, columns: dict[str, npt.NDArray[Any]]) -> None:
        done, failed = extract.attributes(
            self.root_fd,
            tree.paths.arena,
            tree.paths.start,
            rows,
            columns["mode"],
            columns["uid"],
            columns["gid"],
            columns["mtime_ns"],
            self.me,
            self.mine,
        )
        if failed:
            raise OSError(failed, os.strerror(failed), tree.path(int(rows[done])))

    def _nodes(self, tree: Tree, rows: Rows, targets: Rows) -> None:
        done = 0
        while True:
            made, failed = extract.nodes(self.root_fd, tree.paths.arena, tree.paths.start, rows[done:], targets[done:])
            done += made
            if not failed:
                return
            path = tree.paths[int(rows[done])]
            # What an earlier entry of the path made is still there: links were left out while the others went by.
            if failed != errno.EEXIST or not self.make_room(path, is_dir=False):
                raise OSError(failed, os.strerror(failed), os.fsdecode(path))

    def _set_xattrs(self, tree: Tree) -> None:
        marks = self.whiteouts not in (WhiteoutFormat.NONE, WhiteoutFormat.OCI)
        prefix = self.whiteouts.xattr_prefix if marks else ""
        marked = (tree.xattrs >= 0) | (((tree.flags & Flag.OPAQUE) != 0) & marks)
        folder, home = -1, b""
        try:
            for row in np.flatnonzero(marked & ~self._unmade(tree)).tolist():
                entry = tree.entry(row)
                values = inner_to_own(entry.xattrs, prefix) if prefix else dict(entry.xattrs)
                path = tree.paths[row]
                if folder < 0 or path.rpartition(b"/")[0] != home:
                    if folder >= 0:
                        os.close(folder)
                        folder = -1
                    home = path.rpartition(b"/")[0]
                    folder = open_directory(self.root_fd, home)
                self._write_xattrs(folder, path, values)
                if marks and entry.flags & Flag.OPAQUE:
                    self._write_xattrs(folder, path, {prefix + OPAQUE: b"y"}, must=True)
        finally:
            if folder >= 0:
                os.close(folder)

    def _write_xattrs(self, folder: int, path: bytes, values: Mapping[str, bytes], *, must: bool = False) -> None:
        """Set xattrs of `path`, whose directory is open. must: none may be lost."""
        # The last component is not followed, and it has no name in a directory of its own when it is the root.
        place = b"/proc/self/fd/%d/%s" % (folder, path.rpartition(b"/")[2] or b".")
        for key, value in values.items():
            try:
                try:
                    os.setxattr(place, key, value, follow_symlinks=False)
                except PermissionError as e:
                    mode = os.stat(place, follow_symlinks=False).st_mode
                    if e.errno != errno.EACCES or stat.S_ISLNK(mode):
                        raise
                    # user.* asks for the right to write, which a read-only file does not give to its owner either
                    os.chmod(place, stat.S_IMODE(mode) | stat.S_IWUSR)
                    try:
                        os.setxattr(place, key, value, follow_symlinks=False)
                    finally:
                        os.chmod(place, stat.S_IMODE(mode))
            except OSError as e:
                if must or e.errno not in LIVES_ELSEWHERE:
                    raise OSError(e.errno, f"xattr {key}: {e.strerror}", os.fsdecode(path)) from None
                self.losses.append(Loss(os.fsdecode(path), f"xattr {key}: {e.strerror}"))

    def _set_directories(self, tree: Tree) -> None:
        """Owner, mode and times of directories, the deepest first.

        Those that nobody wrote have what the layers below say, where no opaque directory is in between.
        """
        columns = {name: np.ascontiguousarray(getattr(tree, name)) for name in ("mode", "uid", "gid", "mtime_ns")}
        implied = np.flatnonzero(((tree.flags & Flag.IMPLIED) != 0) & ~hidden(tree))
        if len(implied) and self.lowers:
            merged = self.merged
            for name in columns:
                columns[name] = columns[name].copy()
            for row in implied.tolist():
                lower = merged.find(tree.paths[row])
                if lower >= 0 and merged.kind[lower] == Kind.DIR:
                    for name, column in columns.items():
                        column[row] = getattr(merged, name)[lower]
        if self.me != 0:
            columns |= {name: column for name, column in self._own(tree).items() if name in ("uid", "gid")}
        rows = np.flatnonzero(tree.kind == Kind.DIR)[:0:-1]  # the root last, by its descriptor
        self._attributes(tree, np.ascontiguousarray(rows), columns)
        mode, uid, gid, mtime_ns = (int(c[0]) for c in columns.values())
        os.fchown(self.root_fd, uid, gid)
        os.fchmod(self.root_fd, mode)
        os.utime(self.root_fd, ns=(mtime_ns, mtime_ns))
        if self.me != 0 and ((tree.uid != self.me) | (tree.gid != self.mine)).any():
            self.losses.append(
                Loss("", f"owners: only root can set them; all files belong to {self.me}:{self.mine} on disk")
            )


def _whiteouts(tree: Tree) -> Rows:
    """The whiteouts to make: none below an opaque directory. Nothing of a lower layer shows there, and readdir would list
    them."""
    rows: Rows = np.flatnonzero(tree.kind == Kind.WHITEOUT)
    opaque = (tree.flags & Flag.OPAQUE) != 0
    if not opaque.any():
        return rows
    covered = np.zeros(len(tree) + 1, np.int64)
    np.add.at(covered, np.flatnonzero(opaque), 1)
    np.add.at(covered, tree.ends[opaque], -1)
    shown: Rows = rows[np.cumsum(covered)[rows] == 0]
    return shown
