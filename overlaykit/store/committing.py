"""Commit: a container's writable layer becomes the topmost layer of a new image."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec.structs import asdict

from overlaykit.errors import InUse
from overlaykit.oci import Compression, History, append, with_config
from overlaykit.overlay.pausing import paused, running_in
from overlaykit.store.instructions import apply_changes
from overlaykit.store.names import whole_name
from overlaykit.store.packing import now, pack, report, says_nothing
from overlaykit.store.unpacking import hold_image
from overlaykit.tree import Losses, against

if TYPE_CHECKING:
    from overlaykit.store.containers import Container
    from overlaykit.store.images import StoredImage
    from overlaykit.store.store import Store


def commit(
    store: Store,
    container: Container,
    name: str | None,
    *,
    author: str | None,
    message: str | None,
    changes: Iterable[str],
    compression: str,
    pause: bool,
) -> StoredImage:
    """What Container.commit does. A container without changes gives an image with the same layers, as in Docker."""
    whole = None if name is None else whole_name(name)
    runtime = apply_changes(container.config, changes)
    how = Compression.parse(compression)
    base = container.image
    losses: Losses = []
    with store.operation() as layout:
        hold_image(base, layout)
        container.hold(layout.lease)
        with _undisturbed(store.snapshots.fs(container.id), container, pause):
            lower, upper = container.lower(), container.upper()
            changeset = against(container.changeset(lower, upper), lower)
            told = History(
                created=now(), created_by=" ".join(container.config.cmd or ()) or None, author=author, comment=message
            )
            if says_nothing(changeset):
                image = with_config(base, history=told)
            else:
                layer = pack(layout, changeset, upper.contents(changeset), compression=how, losses=losses)
                image = append(base, layer, history=told)
            image = with_config(image, author=author or base.config.author, **asdict(runtime))
            stored = store.keep(layout, image, whole)
    report(f"commit {container.name}", losses)
    return stored


@contextmanager
def _undisturbed(upper: Path, container: Container, pause: bool) -> Iterator[None]:
    """What runs in the container stands still if `pause` says so. InUse if another process has its files open."""
    with ExitStack() as stack:
        if pause:
            stack.enter_context(paused(upper))
        try:
            stack.enter_context(container.quiet())
        except InUse:
            if not running_in(upper):  # else it is whoever started the program that waits with the lock in his hand
                raise
        yield
