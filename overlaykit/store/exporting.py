"""Export: what a container shows, as one tar."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, BinaryIO

from overlaykit.overlay.contents import Contents
from overlaykit.store.packing import report
from overlaykit.tree import Losses, merge, write_tar
from overlaykit.tree.table import StrPath

if TYPE_CHECKING:
    from overlaykit.store.containers import Container
    from overlaykit.store.store import Store


def export(store: Store, container: Container, out: StrPath | BinaryIO, *, losses: Losses | None = None) -> None:
    """What Container.export does. A file that cannot be written whole is removed."""
    if isinstance(out, str | os.PathLike):
        with open(out, "wb") as file:
            try:
                export(store, container, file, losses=losses)
            except BaseException:
                os.unlink(out)
                raise
        return
    lost: Losses = [] if losses is None else losses
    with store.leases.hold() as lease:
        container.hold(lease)
        lower, own = container.lower(), container.upper()
        image = [(tree, Contents(tree, directory)) for directory, tree in store.snapshots.image_layers(container.id)]
        changeset = container.changeset(lower, own)
        shown = merge([lower, changeset])
        changed = own.contents(changeset)

        def content(row: int) -> int:
            path = shown.paths[row]
            if shown.layer[row]:
                return changed(changeset.find(path))
            tree, contents = image[int(lower.layer[lower.find(path)])]
            return contents(tree.find(path))

        write_tar(shown, content, out, losses=lost)
    if losses is None:
        report(f"export {container.name}", lost)
