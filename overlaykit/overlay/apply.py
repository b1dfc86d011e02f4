"""One layer onto an empty directory, in one pass over its tar: the directory becomes a lower of an overlay.

Files are made as their bytes go by. Whiteouts, opaque marks, hard links, xattrs and the attributes of directories wait
until the whole layer has been seen, so that the order of entries in the tar cannot matter.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from overlaykit._ext import extract, whiteout
from overlaykit.errors import InvalidLayer
from overlaykit.tree.losses import Loss, Losses
from overlaykit.tree.merge import merge
from overlaykit.tree.regular import inside, normal_target, regular
from overlaykit.tree.table import Flag, Kind, Rows, Strings, StrPath, Tree
from overlaykit.tree.tarball import (
    LINK,
    ROW,
    Readable,
    TableBuilder,
    TarReader,
    Window,
    read_map,
    sparse_map,
    sparse_rows,
    sparse_size,
)
from overlaykit.tree.whiteout import OPAQUE, WhiteoutFormat, inner_to_own

LIVES_ELSEWHERE = (errno.ENOTSUP, errno.EPERM, errno.ENODATA)  # an xattr that this file system or user cannot set


def apply_layer(
    stream: Readable,
    directory: StrPath,
    *,
    whiteouts: WhiteoutFormat = WhiteoutFormat.OVERLAY,
    lowers: Sequence[tuple[StrPath, Tree]] = (),
    losses: Losses | None = None,
) -> Tree:
    """The Tree of the layer whose uncompressed tar is `stream`, unpacked into the existing, empty `directory`.

    The stream is read to its end, so a verifying one has seen every byte when this returns. lowers: the layers below,
    bottom first, as (directory, Tree): they lend their attributes to directories that this layer implies, and the files
    that its hard links name. whiteouts: how whiteouts and opaque marks are made; NONE makes neither, and they
    are in the Tree alone, where hard links to files of lower layers then stay links too. What the file system or the user's rights cannot keep is appended to
    `losses`; the Tree has it all the same. Without root that is owners and devices.

    Raises InvalidLayer or UnsafePath for a tar that breaks the format, OSError for what the file system refuses. Whatever
    happens, nothing outside `directory` is made or changed; after an error the caller throws the directory away.
    """
    losses = [] if losses is None else losses
    root_fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return _Application(root_fd, whiteouts, lowers, losses).run(stream)
    finally:
        os.close(root_fd)


class _Application:
    """One apply at work. It ends with the tree; nothing of it is kept."""

    def __init__(
        self, root_fd: int, whiteouts: WhiteoutFormat, lowers: Sequence[tuple[StrPath, Tree]], losses: Losses
    ) -> None:
        self.root_fd = root_fd
        self.whiteouts = whiteouts
        self.lowers = lowers
        self.losses = losses
        self.me, self.mine = os.geteuid(), os.getegid()
        self.umask = _umask(root_fd)
        self.builder = TableBuilder()
        self.tail: _Tail | None = None  # the file whose content goes on in the next window

    def run(self, stream: Readable) -> Tree:
        try:
            for window in TarReader(stream):
                self._add(window)
            if self.tail is not None:
                raise AssertionError("the reader ended inside a file")
        finally:
            if self.tail is not None:
                os.close(self.tail.fd)
        table = self.builder.table()
        is_link = (table.flags & Flag.LOWER_LINK) != 0
        # `layer` has no meaning yet: it takes along which rows were links, and so were not made while they went by.
        tree = regular(table.with_columns(layer=is_link), oci_names=True)
        link_rows = np.flatnonzero(tree.layer)
        tree = tree.with_columns(layer=np.zeros(len(tree)))
        tree = self._make_links(tree, link_rows)
        tree = self._without_false_whiteouts(tree)
        if self.whiteouts is not WhiteoutFormat.NONE:
            self._make_whiteouts(tree)
        self._make_implied(tree)
        self._set_xattrs(tree)
        self._set_directories(tree)
        return tree

    # --- while the stream goes by -------------------------------------------------------------------------------

    def _add(self, window: Window) -> None:
        if window.first and self.tail is not None:
            self.tail = self.tail.feed(window.buffer[: window.first], self)
        sparse = {row: sparse_size(window, row) for row in sparse_rows(window)}
        rows = window.rows
        marks = np.zeros(len(rows), np.uint8)
        whiteout.classify(window.paths.arena, window.paths.start, marks)
        skip = ((marks != 0) | (rows["kind"] == LINK)).astype(np.uint8)
        skip[list(sparse)] = 1
        self._refuse_devices(window, skip)
        self.builder.add(window, sparse)
        if self.me != 0:  # the tree keeps the owners; the disk cannot
            rows["uid"], rows["gid"] = self.me, self.mine
        self._create(window, skip)
        for row in sparse:
            if marks[row] == 0:
                self._create_sparse(window, row, sparse[row])

    def _refuse_devices(self, window: Window, skip: npt.NDArray[np.uint8]) -> None:
        rows = window.rows
        device = (rows["kind"] == Kind.CHAR) | (rows["kind"] == Kind.BLOCK)
        refused = device if self.me != 0 else (rows["kind"] == Kind.CHAR) & (rows["rdev"] == 0)
        for row in np.flatnonzero(refused & (skip == 0)).tolist():
            skip[row] = 1
            rdev = int(rows["rdev"][row])
            why = "only root can make devices" if rdev else "on disk it would be a whiteout"
            name = f"device {os.major(rdev)}:{os.minor(rdev)}"
            self.losses.append(Loss(os.fsdecode(window.paths[row]), f"{name}: not made: {why}"))

    def _create(self, window: Window, skip: npt.NDArray[np.uint8]) -> None:
        rows, at = window.rows, 0
        raw = rows.view(np.uint8).reshape(-1)
        while True:
            at, failed, fd = extract.create(
                self.root_fd,
                window.buffer,
                raw,
                window.paths.arena,
                window.links.arena,
                skip,
                at,
                self.me,
                self.mine,
                self.umask,
            )
            if fd >= 0:
                self._follow(fd, window, len(rows) - 1)
            if not failed:
                return
            if failed == errno.EEXIST:
                if not self._make_room(window.paths[at], is_dir=rows["kind"][at] == Kind.DIR):
                    at += 1  # a directory that is there already
            elif failed == errno.ENOTDIR:
                self._create_where_it_leads(window, at)
                at += 1
            else:
                raise OSError(failed, os.strerror(failed), os.fsdecode(window.paths[at]))

    def _follow(self, fd: int, window: Window, row: int) -> None:
        """Keep `fd`, the last file of the window, for the content that is still to come."""
        entry = window.rows[row]
        self.tail = _Tail(
            fd,
            int(entry["size"]) - int(entry["here"]),
            int(entry["mode"]),
            int(entry["uid"]),
            int(entry["gid"]),
            int(entry["mtime_ns"]),
        )

    def _make_room(self, path: bytes, *, is_dir: bool) -> bool:
        """Take away what an earlier entry made at `path`. False if it is a directory and shall be one."""
        parent, _, name = path.rpartition(b"/")
        fd = _open_directory(self.root_fd, parent)
        try:
            if not stat.S_ISDIR(os.stat(name, dir_fd=fd, follow_symlinks=False).st_mode):
                os.unlink(name, dir_fd=fd)
            elif is_dir:
                return False
            else:
                shutil.rmtree(name, dir_fd=fd)
            return True
        finally:
            os.close(fd)

    def _create_where_it_leads(self, window: Window, row: int) -> None:
        """Make an entry whose parents are symlinks of this layer at the place to which they lead, inside the root."""
        table = self.builder.table()
        upto = len(table) - len(window.rows) + row
        links = {
            table.paths[i]: table.links[int(table.link[i])]
            for i in np.flatnonzero(table.kind[:upto] == Kind.SYMLINK).tolist()
        }
        path = window.paths[row]
        parent, _, name = path.rpartition(b"/")
        parent = inside(parent, links)
        moved = parent + b"/" + name if parent else name
        if moved == path:
            raise InvalidLayer(f"{os.fsdecode(path)!r} lies under an entry that is not a directory")
        one = window.rows[row : row + 1].copy()
        link = window.links[row]
        one["path_end"], one["link_end"] = len(moved), len(link)
        alone = Window(one, Strings.of([moved]), Strings.of([link]), window.buffer, 0)
        self._create(alone, np.zeros(1, np.uint8))

    def _create_sparse(self, window: Window, row: int, size: int) -> None:
        entry = window.rows[row]
        path = window.paths[row]
        one = window.rows[row : row + 1].copy()
        # An empty file first, by the same way as any other; then its pieces, each in its place.
        one["size"], one["here"], one["path_end"], one["link_end"] = 0, 0, len(path), 0
        self._create(Window(one, Strings.of([path]), Strings.of([b""]), window.buffer, 0), np.zeros(1, np.uint8))
        parent, _, name = path.rpartition(b"/")
        folder = _open_directory(self.root_fd, parent)
        try:
            fd = os.open(name, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
        finally:
            os.close(folder)
        pieces = sparse_map(window, row)
        tail = _SparseTail(
            fd,
            int(entry["size"]),
            int(entry["mode"]),
            int(entry["uid"]),
            int(entry["gid"]),
            int(entry["mtime_ns"]),
            pieces,
            size,
        )
        begin, here = int(entry["data"]), int(entry["here"])
        left = tail.feed(window.buffer[begin : begin + here], self)
        if left is not None:
            self.tail = left

    # --- when all has been seen ---------------------------------------------------------------------------------

    def _make_links(self, tree: Tree, rows: Rows) -> Tree:
        """The tree, its hard links made: within the layer as links, to a lower layer's file as a copy of it."""
        inner = [r for r in rows.tolist() if not tree.flags[r] & Flag.LOWER_LINK]
        made = np.ones(len(tree), np.bool_)
        made[rows] = False
        first = {int(g): int(r) for r, g in reversed([*enumerate(tree.hardlink)]) if g >= 0 and made[r]} if inner else {}
        targets = [first[int(tree.hardlink[r])] for r in inner]
        self._nodes(tree, np.array(inner, np.int64), np.array(targets, np.int64))
        for row in rows.tolist():
            if tree.flags[row] & Flag.LOWER_LINK and (self.lowers or self.whiteouts is not WhiteoutFormat.NONE):
                tree = self._copy_lower(tree, row)
        return tree

    def _copy_lower(self, tree: Tree, row: int) -> Tree:
        target = normal_target(tree.links[int(tree.link[row])])
        merged = merge([t for _, t in self.lowers])
        found = merged.find(target)
        if found < 0 or merged.kind[found] != Kind.FILE:
            raise InvalidLayer(f"{tree.path(row)!r}: a hard link to {os.fsdecode(target)!r}, a file that no layer has")
        directory, lower = self.lowers[int(merged.layer[found])]
        source_root = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            folder = _open_directory(source_root, target.rpartition(b"/")[0])
        finally:
            os.close(source_root)
        try:
            source = os.open(target.rpartition(b"/")[2], os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
        finally:
            os.close(folder)
        entry = lower.entry(lower.find(target))
        path = tree.paths[row]
        one = np.zeros(1, ROW)
        one["path_end"], one["mode"] = len(path), entry.mode
        one["uid"], one["gid"] = (entry.uid, entry.gid) if self.me == 0 else (self.me, self.mine)
        one["size"], one["mtime_ns"] = entry.size or 1, entry.mtime_ns  # size beyond what is here: it stays open
        self._create(Window(one, Strings.of([path]), Strings.of([b""]), memoryview(b"\0"), 0), np.zeros(1, np.uint8))
        assert self.tail is not None
        self.tail.left = entry.size
        with open(source, "rb") as content:
            while self.tail is not None:
                self.tail = self.tail.feed(memoryview(content.read(1 << 20)), self)
        if self.whiteouts is WhiteoutFormat.NONE:
            return tree
        self.losses.append(Loss(tree.path(row), "a hard link to a lower layer's file became a copy of it"))
        columns = {name: getattr(tree, name).copy() for name in ("flags", "mode", "uid", "gid", "size", "mtime_ns", "link")}
        columns["flags"][row] &= ~np.uint8(Flag.LOWER_LINK)
        columns["link"][row] = -1
        for name in ("mode", "uid", "gid", "size", "mtime_ns"):
            columns[name][row] = getattr(entry, name)
        return tree.with_columns(**columns)

    def _without_false_whiteouts(self, tree: Tree) -> Tree:
        """The tree without char devices 0:0: they were not made, since an overlay takes them for whiteouts."""
        false = (tree.kind == Kind.CHAR) & (tree.rdev == 0)
        return tree.take(~false) if false.any() else tree

    def _make_whiteouts(self, tree: Tree) -> None:
        """Whiteouts, but none below an opaque directory: nothing of a lower layer shows there, and readdir would list it."""
        opaque = (tree.flags & Flag.OPAQUE) != 0
        rows = np.flatnonzero(tree.kind == Kind.WHITEOUT)
        if opaque.any():
            covered = np.zeros(len(tree) + 1, np.int64)
            np.add.at(covered, np.flatnonzero(opaque), 1)
            np.add.at(covered, tree.ends[opaque], -1)
            rows = rows[np.cumsum(covered)[rows] == 0]
        self._nodes(tree, rows, np.full(len(rows), -1, np.int64))

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
        done, failed = extract.nodes(self.root_fd, tree.paths.arena, tree.paths.start, rows, targets)
        if failed:
            raise OSError(failed, os.strerror(failed), tree.path(int(rows[done])))

    def _set_xattrs(self, tree: Tree) -> None:
        marked = np.flatnonzero((tree.xattrs >= 0) | ((tree.flags & Flag.OPAQUE) != 0))
        marks = self.whiteouts in (WhiteoutFormat.OVERLAY, WhiteoutFormat.USERXATTR)
        prefix = self.whiteouts.xattr_prefix if marks else ""
        for row in marked.tolist():
            entry = tree.entry(row)
            values = inner_to_own(entry.xattrs, prefix) if prefix else dict(entry.xattrs)
            if marks and entry.flags & Flag.OPAQUE:
                values[prefix + OPAQUE] = b"y"
            parent, _, name = tree.paths[row].rpartition(b"/")
            fd = _open_directory(self.root_fd, parent)
            try:
                # The last component is not followed, and it has no name in a directory of its own when it is the root.
                place = b"/proc/self/fd/%d/%s" % (fd, name or b".")
                for key, value in values.items():
                    try:
                        os.setxattr(place, key, value, follow_symlinks=False)
                    except OSError as e:
                        if e.errno not in LIVES_ELSEWHERE or key == prefix + OPAQUE:
                            raise OSError(e.errno, f"xattr {key}: {e.strerror}", entry.path) from None
                        self.losses.append(Loss(entry.path, f"xattr {key}: {e.strerror}"))
            finally:
                os.close(fd)

    def _set_directories(self, tree: Tree) -> None:
        """Owner, mode and times of directories, the deepest first; those nobody wrote have what the layers below say."""
        columns = {name: np.ascontiguousarray(getattr(tree, name)) for name in ("mode", "uid", "gid", "mtime_ns")}
        implied = np.flatnonzero((tree.flags & Flag.IMPLIED) != 0)
        if len(implied) and self.lowers:
            merged = merge([t for _, t in self.lowers])
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


class _Tail:
    """A file whose content comes in pieces."""

    def __init__(self, fd: int, left: int, mode: int, uid: int, gid: int, mtime_ns: int) -> None:
        self.fd = fd
        self.left = left
        self.attributes = (mode, uid, gid, mtime_ns)

    def feed(self, data: memoryview, application: _Application) -> _Tail | None:
        """Write the next piece; None, and the file closed with all its attributes, when it was the last."""
        self.left -= len(data)
        self.write(data)
        if self.left > 0:
            return self
        try:
            failed = self.end(application)
        finally:
            os.close(self.fd)
            application.tail = None
        if failed:
            raise OSError(failed, os.strerror(failed))
        return None

    def write(self, data: memoryview) -> None:
        _write_all(self.fd, data)

    def end(self, application: _Application) -> int:
        failed: int = extract.finish(self.fd, *self.attributes, application.me, application.mine)
        return failed


class _SparseTail(_Tail):
    """The same with holes: `pieces` says where the content goes; None: it stands in front of the content."""

    def __init__(
        self,
        fd: int,
        left: int,
        mode: int,
        uid: int,
        gid: int,
        mtime_ns: int,
        pieces: list[tuple[int, int]] | None,
        size: int,
    ) -> None:
        super().__init__(fd, left, mode, uid, gid, mtime_ns)
        self.pieces = pieces
        self.size = size
        self.head = b""

    def write(self, data: memoryview) -> None:
        if self.pieces is None:
            self.head += data
            found = read_map(self.head)
            if found is None:
                if self.left <= 0:
                    raise InvalidLayer("a sparse file whose map is not whole")
                return
            self.pieces, used = found
            data, self.head = memoryview(self.head)[used:], b""
        while len(data) and self.pieces:
            offset, size = self.pieces[0]
            part = data[:size]
            os.lseek(self.fd, offset, os.SEEK_SET)
            _write_all(self.fd, part)
            data = data[len(part) :]
            self.pieces[0] = (offset + len(part), size - len(part))
            if len(part) == size:
                del self.pieces[0]

    def end(self, application: _Application) -> int:
        if self.pieces is None or any(size for _, size in self.pieces):
            raise InvalidLayer("a sparse file with less content than its map says")
        os.ftruncate(self.fd, self.size)
        return super().end(application)


def _write_all(fd: int, data: memoryview) -> None:
    while len(data):
        data = data[os.write(fd, data) :]


def _open_directory(root_fd: int, path: bytes) -> int:
    """A descriptor of directory `path` below root_fd, a component at a time, no symlink followed. The caller closes it."""
    fd = os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=root_fd)
    for part in path.split(b"/") if path else ():
        try:
            below = os.open(part, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
        finally:
            os.close(fd)
        fd = below
    return fd


def _umask(root_fd: int) -> int:
    """What the kernel takes off the modes of new files here; all bits if that cannot be known without changing it."""
    if "system.posix_acl_default" in os.listxattr(root_fd):
        return 0o777  # new files would get their modes from it
    try:
        with open("/proc/thread-self/status", "rb") as f:
            for line in f:
                if line.startswith(b"Umask:"):
                    return int(line.split()[1], 8)
    except OSError:
        pass  # no /proc: every file gets its mode by fchmod
    return 0o777
