"""Export: what a container shows, as one tar."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, BinaryIO

from overlaykit.oci.durable import whole_file
from overlaykit.overlay.contents import Contents
from overlaykit.store.packing import report
from overlaykit.tree import Losses, Tree, merge, write_tar
from overlaykit.tree.table import StrPath

if TYPE_CHECKING:
    from overlaykit.store.containers import Container
    from overlaykit.store.leases import Lease
    from overlaykit.store.store import Store


def export(store: Store, container: Container, out: StrPath | BinaryIO, *, losses: Losses | None = None) -> None:
    """What Container.export does: a file whole, or not at all."""
    if isinstance(out, str | os.PathLike):
        with whole_file(out) as file:
            export(store, container, file, losses=losses)
        return
    lost: Losses = [] if losses is None else losses
    with store.leases.hold() as lease:
        shown, content = shown_by(store, container, lease)
        write_tar(shown, content, out, losses=lost)
    if losses is None:
        report(f"export {container.name}", lost)


def shown_by(store: Store, container: Container, lease: Lease) -> tuple[Tree, Callable[[int], int]]:
    """The merged tree of a container, and what opens the files of its rows. All that it needs is kept by `lease`."""
    held = container.hold(lease)
    lower, own = container.lower(held), container.upper(held)
    image = [(tree, Contents(tree, directory)) for directory, tree in store.snapshots.stack(container.id, held)[0]]
    changeset = container.changeset(lower, own)
    shown = merge([lower, changeset])
    changed = own.contents(changeset)

    def content(row: int) -> int:
        path = shown.paths[row]
        if shown.layer[row]:
            return changed(changeset.find(path))
        tree, contents = image[int(lower.layer[lower.find(path)])]
        return contents(tree.find(path))

    return shown, content
