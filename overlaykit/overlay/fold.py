"""One layer into a directory that has files already: whiteouts carried out, directories merged, no mark of an overlay left.

The layer is unpacked and verified beside the directory first. Only then do its files move into place, each by a rename, a
new subtree by a single one; so whatever is wrong with a layer, the directory stays as it was.
"""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from overlaykit.overlay.apply import apply_layer
from overlaykit.overlay.below import DIRECTORY, remove_tree
from overlaykit.tree.losses import Losses
from overlaykit.tree.regular import normal_target
from overlaykit.tree.table import Flag, Kind, StrPath, Tree
from overlaykit.tree.tarball import Readable
from overlaykit.tree.whiteout import WhiteoutFormat


def fold_layer(
    stream: Readable, directory: StrPath, *, verify: Callable[[], None] = lambda: None, losses: Losses | None = None
) -> Tree:
    """The Tree of the layer whose uncompressed tar is `stream`, once `directory` shows what the layer does to it.

    verify is called when the whole stream has been read, before anything in `directory` changes. The layer is unpacked into
    a folder beside `directory`, which must be on the same file system. Raises what `apply_layer` and `verify` raise, and
    then `directory` is as it was.
    """
    home = Path(directory).resolve(strict=True)
    root_fd = os.open(home, DIRECTORY)
    try:
        staging = tempfile.mkdtemp(prefix=f".{home.name}-", dir=home.parent)
        try:
            tree = apply_layer(stream, staging, whiteouts=WhiteoutFormat.NONE, losses=losses)
            verify()
            staging_fd = os.open(staging, DIRECTORY)
            try:
                _Fold(tree).run(staging_fd, root_fd)
            finally:
                os.close(staging_fd)
            return tree
        finally:
            shutil.rmtree(staging)
    finally:
        os.close(root_fd)


class _Merging(NamedTuple):
    """A directory of both, and what is still to be done in it."""

    row: int
    children: list[int]  # the last comes next
    staged: int
    target: int
    before: os.stat_result


class _Fold:
    """One layer on its way from the staging folder into the directory."""

    def __init__(self, tree: Tree) -> None:
        self.tree = tree

    def run(self, staging_fd: int, root_fd: int) -> None:
        stack: list[_Merging] = []
        try:
            if self.tree.flags[0] & Flag.OPAQUE:
                _clear(root_fd)
            self._enter(stack, 0, os.dup(staging_fd), os.dup(root_fd))
            while stack:
                at = stack[-1]
                if not at.children:
                    self._leave(stack.pop())
                    continue
                self._move(stack, at, at.children.pop())
        finally:
            for at in stack:
                os.close(at.staged)
                os.close(at.target)
        self._link(root_fd)

    def _enter(self, stack: list[_Merging], row: int, staged: int, target: int) -> None:
        stack.append(_Merging(row, [*self.tree.children(row)][::-1], staged, target, os.fstat(target)))

    def _move(self, stack: list[_Merging], at: _Merging, row: int) -> None:
        """What row `row` does to its name in directory `at`."""
        name = self.tree.paths[row].rpartition(b"/")[2]
        kind, flags = self.tree.kind[row], self.tree.flags[row]
        if flags & Flag.LOWER_LINK:
            return  # when all is in place: its target may be on its way
        try:
            there = os.stat(name, dir_fd=at.target, follow_symlinks=False)
        except FileNotFoundError:
            there = None
        was_dir = there is not None and stat.S_ISDIR(there.st_mode)
        if kind == Kind.WHITEOUT:
            if there is not None:
                _remove(at.target, name)
        elif kind == Kind.DIR and was_dir:
            staged = os.open(name, DIRECTORY, dir_fd=at.staged)
            try:
                target = os.open(name, DIRECTORY, dir_fd=at.target)
            except OSError:
                os.close(staged)
                raise
            if flags & Flag.OPAQUE:  # its names go; its attributes stay if nobody wrote new ones
                _clear(target)
            self._enter(stack, row, staged, target)
        else:
            if there is not None and (was_dir or kind == Kind.DIR):
                _remove(at.target, name)
            os.rename(name, name, src_dir_fd=at.staged, dst_dir_fd=at.target)

    def _leave(self, at: _Merging) -> None:
        """Give a merged directory the layer's attributes, or its own time back where the layer says nothing of it."""
        try:
            if self.tree.flags[at.row] & Flag.IMPLIED:
                os.utime(at.target, ns=(at.before.st_atime_ns, at.before.st_mtime_ns))
                return
            now = os.fstat(at.staged)
            if (now.st_uid, now.st_gid) != (at.before.st_uid, at.before.st_gid):
                os.fchown(at.target, now.st_uid, now.st_gid)
            os.fchmod(at.target, stat.S_IMODE(now.st_mode))
            names = os.listxattr(at.staged)
            for name in set(os.listxattr(at.target)) - set(names):
                os.removexattr(at.target, name)
            for name in names:
                os.setxattr(at.target, name, os.getxattr(at.staged, name))
            mtime_ns = int(self.tree.mtime_ns[at.row])  # the staging folder's own has moved on with what left it
            os.utime(at.target, ns=(at.before.st_atime_ns, mtime_ns))
        finally:
            os.close(at.staged)
            os.close(at.target)

    def _link(self, root_fd: int) -> None:
        """Hard links to files that were there before this layer."""
        for row in range(len(self.tree)):
            if not self.tree.flags[row] & Flag.LOWER_LINK:
                continue
            folder, _, name = self.tree.paths[row].rpartition(b"/")
            target_folder, _, target = normal_target(self.tree.links[int(self.tree.link[row])]).rpartition(b"/")
            home = _open(root_fd, folder)
            try:
                other = _open(root_fd, target_folder)
                try:
                    before = os.fstat(home)
                    _remove(home, name)
                    os.link(target, name, src_dir_fd=other, dst_dir_fd=home, follow_symlinks=False)
                    os.utime(home, ns=(before.st_atime_ns, before.st_mtime_ns))
                finally:
                    os.close(other)
            finally:
                os.close(home)


def _clear(folder: int) -> None:
    for name in os.listdir(folder):
        _remove(folder, os.fsencode(name))


def _remove(folder: int, name: bytes) -> None:
    """Whatever `name` in `folder` is, with all below it; nothing if it is not there."""
    try:
        os.unlink(name, dir_fd=folder)
    except FileNotFoundError:
        pass
    except (IsADirectoryError, PermissionError):
        remove_tree(folder, name)


def _open(root_fd: int, path: bytes) -> int:
    fd = os.dup(root_fd)
    for part in path.split(b"/") if path else ():
        try:
            below = os.open(part, DIRECTORY, dir_fd=fd)
        finally:
            os.close(fd)
        fd = below
    return fd
