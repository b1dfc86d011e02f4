"""Changes picked path by path: discarded, kept while all others go, or taken to another container.

Where a path's change can be undone by taking it out of the upper, it goes from there. Else, over frozen layers or under a
directory that was replaced, what the image has comes back on top: the state until then is frozen, the difference becomes
one more layer of the container's own, and a new upper lies on that.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from overlaykit.errors import InvalidReference, NotFound
from overlaykit.oci import LayerWriter
from overlaykit.overlay.apply import apply_layer
from overlaykit.overlay.contents import Contents
from overlaykit.store.disk import remove_tree
from overlaykit.store.packing import report
from overlaykit.store.snapshots import Layers, has_marks
from overlaykit.tree import Flag, Kind, Loss, Tree, diff, merge, scan, write_tar
from overlaykit.tree.graft import graft, restrict, without

if TYPE_CHECKING:
    from overlaykit.store.containers import Container
    from overlaykit.store.store import Store

ContentsOf = Callable[[Tree], Callable[[int], int]]  # opens the files of a tree by row


def discard(store: Store, container: Container, paths: Iterable[str]) -> list[str]:
    """What Container.discard does: the paths as they were understood."""
    wanted = inside(paths)
    with container.at_rest():
        state = _State(container)
        for path in wanted:
            if not state.touches(path):
                raise _unchanged(container, path)
        state.become(store, graft(state.now, state.image, wanted), wanted)
    return wanted


def keep(store: Store, container: Container, paths: Iterable[str]) -> list[str]:
    """What Container.keep does: the paths that were discarded."""
    kept = inside(paths)
    with container.at_rest():
        state = _State(container)
        for path in kept:
            if not state.touches(path):
                raise _unchanged(container, path)
        others = state.others(kept)
        state.become(store, graft(state.image, state.now, kept), others)
    return others


def apply_to(store: Store, source: Container, target: Container, paths: Iterable[str]) -> int:
    """How many entries were made, changed or taken away. What Container.apply_to does."""
    with store.leases.hold() as lease, target.at_rest():
        held = source.hold(lease)
        lower, own = source.lower(held), source.upper(held)
        changeset = source.changeset(lower, own)
        if wanted := inside(paths):
            for path in wanted:
                if changeset.find(path) < 0:
                    raise _unchanged(source, path)
            changeset = restrict(changeset, wanted)
        stack_on(store, target, changeset, own.contents)
        return sum(1 for entry in changeset if entry.path and not entry.flags & Flag.IMPLIED)


def _unchanged(container: Container, path: str) -> NotFound:
    return NotFound(f"container {container.name} has no change at /{path}", hint=f"overlaykit diff {container.name}")


def inside(paths: Iterable[str]) -> list[str]:
    """Paths as trees have them, relative to the root. InvalidReference for the root itself, or one with '..'."""
    found = []
    for path in paths:
        parts = [part for part in path.split("/") if part not in ("", ".")]
        if not parts or ".." in parts:
            raise InvalidReference(f"{path!r}: not a path of one entry in the container")
        found.append("/".join(parts))
    return found


class _State:
    """What a container shows, what its image shows, and what lies between."""

    def __init__(self, container: Container) -> None:
        self.container = container
        self.image = container.lower()
        self.own = container.upper()
        self.changes = container.changeset(self.image, self.own)
        self.now = merge([self.image, self.changes])

    def touches(self, path: str) -> bool:
        """Whether `path`, something under it, or a directory above it that was replaced, is changed."""
        above = ["/".join(path.split("/")[:n]) for n in range(1, path.count("/") + 1)]
        return self.changes.find(path) >= 0 or any(self._replaced(p) for p in above)

    def _replaced(self, path: str) -> bool:
        row = self.changes.find(path)
        if row < 0:
            return False
        entry = self.changes.entry(row)
        return entry.kind != Kind.DIR or bool(entry.flags & Flag.OPAQUE)

    def others(self, kept: list[str]) -> list[str]:
        """The topmost changed paths that neither are, nor hold, nor lie under one of `kept`."""
        found: list[str] = []
        holds = {"/".join(path.split("/")[:n]) for path in kept for n in range(path.count("/") + 1)}
        done = ""
        for entry in self.changes:
            path = entry.path
            if path in holds or (done and path.startswith(done + "/")):
                continue
            if path not in kept:
                found.append(path)
            done = path
        return found

    def become(self, store: Store, wanted: Tree, undone: list[str]) -> None:
        """Let the container show `wanted`, in which the changes at the paths `undone` are not."""
        if not self._undone_in_place(store, wanted, undone):
            stack_on(store, self.container, diff(self.now, wanted), self._image_contents(store))

    def _undone_in_place(self, store: Store, wanted: Tree, undone: list[str]) -> bool:
        """Take the paths out of the upper, each in one step, if that is all there is to do: whether it was."""
        snapshots = store.snapshots
        directory = snapshots.directory(self.container.id)
        raw = scan(directory / "fs", whiteouts=snapshots.whiteouts)
        if snapshots.own_layers(self.container.id) or any(has_marks(x, snapshots.whiteouts) for x in raw.xattr_sets):
            return False
        left = without(self.changes, undone)
        if _timeless(merge([self.image, left])) != _timeless(wanted):
            return False
        for path in undone:
            _remove(directory, path)
        return True

    def _image_contents(self, store: Store) -> ContentsOf:
        """Opens what comes back from the image."""
        layers = [(tree, Contents(tree, directory)) for directory, tree in store.snapshots.image_layers(self.container.id)]

        def open_path(path: bytes) -> int:
            tree, contents = layers[int(self.image.layer[self.image.find(path)])]
            return contents(tree.find(path))

        return lambda tree: lambda row: open_path(tree.paths[row])


def _timeless(tree: Tree) -> Tree:
    """`tree` without the times of its directories, which nobody can restore and no diff tells."""
    return tree.with_columns(mtime_ns=tree.mtime_ns * (tree.kind != Kind.DIR))


def _remove(directory: Path, path: str) -> None:
    """Take `path` out of the upper in `directory`: out of sight at once. Its parent keeps its time."""
    target = directory / "fs" / path
    if not os.path.lexists(target):
        return
    above = target.parent.stat()
    gone = directory / "work" / f"#discard-{secrets.token_hex(4)}"
    target.rename(gone)
    os.utime(target.parent, ns=(above.st_atime_ns, above.st_mtime_ns))
    if gone.is_dir() and not gone.is_symlink():
        remove_tree(gone)
    else:
        gone.unlink()


def stack_on(store: Store, container: Container, changeset: Tree, contents: ContentsOf) -> None:
    """Freeze the container, and put `changeset` on top as one more layer of its own: whole, or not at all, in one step.

    The caller has the container at rest. What the layer cannot carry is logged.
    """
    snapshots, losses = store.snapshots, list[Loss]()
    with store.operation() as layout:
        # By way of a blob, which nobody needs afterwards: what unpacks layers gives it marks, modes and owners.
        with LayerWriter(layout, "none") as out:
            write_tar(changeset, contents(changeset), out, subsecond=True, losses=losses)
            blob = out.commit()

        def write(lowers: Layers, directory: Path) -> Tree:
            with blob.uncompressed() as stream:
                tree = apply_layer(stream, directory, whiteouts=snapshots.whiteouts, lowers=lowers, losses=losses)
                stream.drain()
                return tree

        # The lock that keeps others away is that of the upper as it is: there must be no other one in between.
        snapshots.freeze(container.id, layout.lease, stack=write)
        store.drop(layout.lease)
    report(f"container {container.name}", losses)
