"""One layer into a directory that has files already: whiteouts carried out, directories merged, no mark of an overlay left.

The layer is unpacked and verified beside the directory first. Only then do its files move into place, each by a rename, a
new subtree by a single one; so whatever is wrong with a layer, the directory stays as it was. What the file system refuses
even then is undone step by step (journal.py).
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from overlaykit._ext import inroot
from overlaykit.errors import InvalidLayer
from overlaykit.overlay.apply import apply_layer
from overlaykit.overlay.below import DIRECTORY, changeable, open_directory, open_to_change, remove_tree
from overlaykit.overlay.journal import Journal, move
from overlaykit.tree.losses import Losses
from overlaykit.tree.regular import normal_target
from overlaykit.tree.table import Flag, Kind, StrPath, Tree
from overlaykit.tree.tarball import USUAL, Limits, Readable
from overlaykit.tree.whiteout import WhiteoutFormat

NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)


def fold_layer(
    stream: Readable,
    directory: StrPath,
    *,
    verify: Callable[[], None] = lambda: None,
    limits: Limits = USUAL,
    losses: Losses | None = None,
) -> Tree:
    """The Tree of the layer whose uncompressed tar is `stream`, once `directory` shows what the layer does to it.

    verify is called when the whole stream has been read, before anything in `directory` changes. The layer is unpacked into
    a folder beside `directory`, which must be on the same file system. Raises what `apply_layer` and `verify` raise, and
    then `directory` is as it was.
    """
    home = Path(directory).resolve(strict=True)
    root_fd = os.open(home, DIRECTORY)
    try:
        with scratch_folder(f".{home.name}-", home.parent) as staging:
            tree = apply_layer(stream, staging, whiteouts=WhiteoutFormat.NONE, limits=limits, losses=losses)
            verify()
            fold(tree, staging, root_fd)
            return tree
    finally:
        os.close(root_fd)


@contextlib.contextmanager
def scratch_folder(prefix: str, parent: StrPath) -> Iterator[Path]:
    """A new folder in `parent` that goes with all in it, which may be deeper than Python recurses."""
    folder = tempfile.mkdtemp(prefix=prefix, dir=parent)
    try:
        yield Path(folder)
    finally:
        discard(folder)


def discard(staging: StrPath) -> None:
    """Remove what is left in the staging folder, and it."""
    parent, name = os.path.split(os.fspath(staging))
    home = os.open(parent, DIRECTORY)
    try:
        remove_tree(home, os.fsencode(name))
    finally:
        os.close(home)


def fold(tree: Tree, staging: StrPath, root_fd: int, *, undo: bool = True) -> None:
    """Move what `apply_layer` made of layer `tree` in `staging` into the directory root_fd, and do there what it says.

    Directories that their owner may not write to are made so for as long as it takes. Whatever goes wrong, all is put back
    as it was before it is raised; undo: False for who throws the directory away then.
    """
    aside = f"{os.fspath(staging)}.old"
    os.mkdir(aside, 0o700)
    try:
        staging_fd = os.open(staging, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            aside_fd = os.open(aside, DIRECTORY)
            try:
                _Fold(tree, Journal(root_fd, aside_fd, keep=undo)).run(staging_fd, root_fd)
            finally:
                os.close(aside_fd)
        finally:
            os.close(staging_fd)
    finally:
        discard(aside)


class _Merging(NamedTuple):
    """A directory of both, and what is still to be done in it."""

    row: int
    children: list[int]  # the last comes next
    staged: int
    target: int
    before: os.stat_result  # of the target, and of the staged one
    wanted: os.stat_result


class _Fold:
    """One layer on its way from the staging folder into the directory."""

    def __init__(self, tree: Tree, journal: Journal) -> None:
        self.tree = tree
        self.journal = journal

    def run(self, staging_fd: int, root_fd: int) -> None:
        self._lend(staging_fd, root_fd)
        try:
            self._walk(staging_fd, root_fd)
        except BaseException:  # Ctrl-C, too
            self.journal.undo()
            raise

    def _walk(self, staging_fd: int, root_fd: int) -> None:
        stack: list[_Merging] = []
        try:
            self._enter(stack, 0, staging_fd, root_fd, b".")
            while stack:
                at = stack[-1]
                if not at.children:
                    self._leave(stack.pop())
                    continue
                self._move(stack, at, at.children.pop())
        finally:
            for at in reversed(stack):
                os.close(at.staged)
                os.close(at.target)

    def _enter(self, stack: list[_Merging], row: int, staged_fd: int, target_fd: int, name: bytes) -> None:
        """Go on in directory `name` of both. If it is opaque its names go; its attributes stay if nobody wrote new ones."""
        wanted, before = _lstat(staged_fd, name), _lstat(target_fd, name)
        staged = open_to_change(staged_fd, name)
        try:
            target = open_to_change(target_fd, name)
        except OSError:
            os.close(staged)
            raise
        stack.append(_Merging(row, [*self.tree.children(row)][::-1], staged, target, before, wanted))
        self.journal.entered(self.tree.paths[row], target, before)
        if self.tree.flags[row] & Flag.OPAQUE:
            for gone in os.listdir(target):
                self.journal.set_aside(target, self.tree.paths[row], os.fsencode(gone), replaced=False)

    def _move(self, stack: list[_Merging], at: _Merging, row: int) -> None:
        """What row `row` does to its name in directory `at`."""
        home, _, name = self.tree.paths[row].rpartition(b"/")
        kind = self.tree.kind[row]
        try:
            there = _lstat(at.target, name)
        except FileNotFoundError:
            there = None
        was_dir = there is not None and stat.S_ISDIR(there.st_mode)
        if kind == Kind.WHITEOUT:
            if there is not None:
                self.journal.set_aside(at.target, home, name, replaced=False)
        elif kind == Kind.DIR and was_dir:
            self._enter(stack, row, at.staged, at.target, name)
        else:
            # A device that this user may not make is in the layer, so what has its name goes; but it is not on disk.
            unmade = kind in (Kind.CHAR, Kind.BLOCK) and not _has(at.staged, name)
            if there is not None:
                over = not (was_dir or kind == Kind.DIR or unmade)  # one rename puts a file in another's place
                self.journal.set_aside(at.target, home, name, replaced=over)
            if not unmade:
                self.journal.placed(home, name)
                move(name, at.staged, name, at.target)

    def _leave(self, at: _Merging) -> None:
        """Give a merged directory the layer's attributes, or its own time back where the layer says nothing of it."""
        try:
            if self.tree.flags[at.row] & Flag.IMPLIED:
                os.fchmod(at.target, stat.S_IMODE(at.before.st_mode))
                os.utime(at.target, ns=(at.before.st_atime_ns, at.before.st_mtime_ns))
                return
            if (at.wanted.st_uid, at.wanted.st_gid) != (at.before.st_uid, at.before.st_gid):
                os.fchown(at.target, at.wanted.st_uid, at.wanted.st_gid)
            names = os.listxattr(at.staged)
            for name in set(os.listxattr(at.target)) - set(names):
                os.removexattr(at.target, name)
            for name in names:
                os.setxattr(at.target, name, os.getxattr(at.staged, name))
            os.fchmod(at.target, stat.S_IMODE(at.wanted.st_mode))
            mtime_ns = int(self.tree.mtime_ns[at.row])  # the staging folder's own has moved on with what left it
            os.utime(at.target, ns=(at.before.st_atime_ns, mtime_ns))
        finally:
            os.close(at.staged)
            os.close(at.target)

    def _lend(self, staged_fd: int, root_fd: int) -> None:
        """Give the staging folder names of the files that hard links of the layer name and that are in the directory.

        So they move like all others, and what is not there is known before anything has moved.
        """
        for row in np.flatnonzero((self.tree.flags & Flag.LOWER_LINK) != 0).tolist():
            folder, _, name = self.tree.paths[row].rpartition(b"/")
            target = self.tree.links[int(self.tree.link[row])]
            target_folder, _, target_name = normal_target(target).rpartition(b"/")
            home = open_directory(staged_fd, folder)
            try:
                try:
                    there = inroot.open_in_root(root_fd, target_folder or b".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
                except OSError as e:
                    if e.errno not in NOT_THERE:
                        raise
                    raise self._no_such_file(row, target) from None
                try:
                    if not _has(there, target_name) or stat.S_ISDIR(_lstat(there, target_name).st_mode):
                        raise self._no_such_file(row, target)
                    before = os.stat(".", dir_fd=home)
                    with changeable(home):
                        os.link(target_name, name, src_dir_fd=there, dst_dir_fd=home, follow_symlinks=False)
                    os.utime(b"/proc/self/fd/%d" % home, ns=(before.st_atime_ns, before.st_mtime_ns))
                finally:
                    os.close(there)
            finally:
                os.close(home)

    def _no_such_file(self, row: int, target: bytes) -> InvalidLayer:
        return InvalidLayer(f"{self.tree.path(row)!r}: a hard link to {os.fsdecode(target)!r}, a file that is nowhere")


def _lstat(folder: int, name: bytes) -> os.stat_result:
    return os.stat(name, dir_fd=folder, follow_symlinks=False)


def _has(folder: int, name: bytes) -> bool:
    try:
        _lstat(folder, name)
    except FileNotFoundError:
        return False
    return True
