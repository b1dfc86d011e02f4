"""An upper directory as the changeset that it is: marks that only an overlay understands are resolved.

Besides whiteouts and opaque directories the kernel leaves two kinds of marks, if it was told to (redirect_dir, metacopy). A
*redirect* on a directory says that its lower part has another path: it was renamed. A *metacopy* is a file's attributes
without its data, which is still in the lower file. A layer has neither: the renamed directory becomes one that has it all,
the metacopy a file with its data.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from overlaykit.errors import InvalidLayer
from overlaykit.overlay.contents import Contents
from overlaykit.tree.merge import merge, squash
from overlaykit.tree.regular import regular
from overlaykit.tree.scan import scan
from overlaykit.tree.table import Entry, Flag, Kind, Strings, StrPath, Tree, from_entries
from overlaykit.tree.whiteout import METACOPY, REDIRECT, WhiteoutFormat


class UpperLayer:
    """What an upper directory says on top of its lowers: `tree`, a changeset without marks, and the content of its files.

    directory   the upper; nobody may write to it meanwhile
    lowers      (directory, Tree) of each layer below, bottom first
    whiteouts   OVERLAY or USERXATTR: how the upper was written

    Raises InvalidLayer for a mark that leads nowhere, OSError for what cannot be read.
    """

    def __init__(
        self,
        directory: StrPath,
        lowers: Sequence[tuple[StrPath, Tree]],
        *,
        whiteouts: WhiteoutFormat = WhiteoutFormat.OVERLAY,
    ) -> None:
        self._directory = directory
        self._lowers = lowers
        self._marks = tuple(whiteouts.xattr_prefix + name for name in (REDIRECT, METACOPY))
        self._moved: list[tuple[str, str]] = []  # for each layer of moved rows: where they are now, where they were
        self._data: dict[str, str] = {}  # for each metacopy: the path of its data in the lowers
        raw = scan(directory, whiteouts=whiteouts)
        if any(mark in xattrs for xattrs in raw.xattr_sets for mark in self._marks):
            self._below = merge([tree for _, tree in lowers])
            self.tree = self._resolve(raw)
        else:
            self.tree = raw
        self._own = Contents(self.tree, directory)

    def contents(self, tree: Tree) -> Callable[[int], int]:
        """Opens the files of `tree`, whose paths are some of `self.tree`'s: a `content` for write_tar."""
        return lambda row: self._open(self.tree.find(tree.paths[row]))

    def _open(self, row: int) -> int:
        path, layer = self.tree.path(row), int(self.tree.layer[row])
        if path in self._data and layer == len(self._moved):
            return self._open_lower(self._data[path])
        if layer < len(self._moved):
            now, was = self._moved[layer]
            return self._open_lower(was + path[len(now) :])
        return self._own(row)

    def _open_lower(self, path: str) -> int:
        row = self._below.find(path)
        directory, tree = self._lowers[int(self._below.layer[row])]
        return Contents(tree, directory)(tree.find(path))

    def _resolve(self, raw: Tree) -> Tree:
        """`raw` without marks: the subtrees that were renamed as layers of their own below it, squashed."""
        redirect_mark, metacopy_mark = self._marks
        layers: list[Tree] = []
        marked = np.array([redirect_mark in xattrs for xattrs in raw.xattr_sets] + [False])
        renamed = np.concatenate([[0], np.cumsum(marked[raw.xattrs] & (raw.kind == Kind.DIR))])
        flags = raw.flags.copy()
        lower_path: dict[int, str | None] = {}  # of each directory: what it merges with; None: nothing
        for row in range(len(raw)):
            entry = raw.entry(row)
            redirect = entry.xattrs.get(redirect_mark)
            home = lower_path.get(int(raw.parents[row])) if row else None
            name = entry.path.rpartition("/")[2]
            was: str | None = "" if row == 0 else None if home is None else f"{home}/{name}".lstrip("/")
            if redirect is not None:
                to = os.fsdecode(redirect)
                # A relative one is a name in the same lower directory; an absolute one begins at the overlay's root.
                was = to[1:] if to.startswith("/") else None if home is None else f"{home}/{to}".lstrip("/")
            if entry.kind == Kind.DIR:
                if entry.flags & Flag.OPAQUE:
                    was = None
                    if renamed[raw.ends[row]] > renamed[row]:
                        # It hides what is below it, but not what was renamed into it: so its mark goes in between.
                        layers.append(regular(from_entries([Entry(entry.path, Kind.DIR, flags=Flag.OPAQUE | Flag.IMPLIED)])))
                        self._moved.append((entry.path, ""))
                        flags[row] &= ~np.uint8(Flag.OPAQUE)
                lower_path[row] = was
                if redirect is not None:
                    layers.append(self._renamed(entry.path, was))
                    self._moved.append((entry.path, was or ""))
            elif metacopy_mark in entry.xattrs:
                found = -1 if was is None else self._below.find(was)
                if was is None or found < 0 or self._below.kind[found] != Kind.FILE:
                    raise InvalidLayer(f"{entry.path!r}: a metacopy whose data, /{was}, no layer below has")
                self._data[entry.path] = was
        plain = tuple({k: v for k, v in xattrs.items() if k not in self._marks} for xattrs in raw.xattr_sets)
        top = replace(raw.with_columns(flags=flags), xattr_sets=plain)
        bare = np.array([not xattrs for xattrs in plain] + [False])
        top = top.with_columns(xattrs=np.where(bare[top.xattrs], -1, top.xattrs))
        return squash([*layers, top])

    def _renamed(self, path: str, was: str | None) -> Tree:
        """The rows of the lowers at and below directory `was` as a layer that has them, and only them, at `path`."""
        row = -1 if was is None else self._below.find(was)
        if row < 0 or self._below.kind[row] != Kind.DIR:
            raise InvalidLayer(f"{path!r}: a redirect to /{was}, which no layer below has as a directory")
        part = self._below.take(np.arange(row, int(self._below.ends[row])))
        old, new = self._below.paths[row], os.fsencode(path)
        part = replace(part, paths=Strings.of([new + p[len(old) :] for p in part.paths]))
        flags = part.flags.copy()
        flags[0] |= np.uint8(Flag.OPAQUE)
        return regular(part.with_columns(flags=flags))
