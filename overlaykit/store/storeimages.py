"""The images of a store: how they come in, what they are called, how they are found."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from overlaykit.errors import NotFound
from overlaykit.oci import Archive, Compression, Digest, History, Image, Layout, Platform, RuntimeConfig, new_image
from overlaykit.store import apparent, images
from overlaykit.store.images import StoredImage
from overlaykit.store.instructions import apply_changes
from overlaykit.store.leases import Leases
from overlaykit.store.loading import Counter, Progress, about, add_documents, ingest_image, ingest_rootfs
from overlaykit.store.names import give_name, give_names, whole_name
from overlaykit.store.packing import LeasedLayout, now, report
from overlaykit.store.records import Records
from overlaykit.store.snapshots import Snapshotter
from overlaykit.store.unpacking import unpack
from overlaykit.tree import Losses, Tree
from overlaykit.tree.apparent import apparent_size
from overlaykit.tree.table import StrPath


class StoreImages:
    """The methods of Store that keep and find images."""

    root: Path
    layout: Layout
    records: Records
    snapshots: Snapshotter
    leases: Leases

    @contextmanager
    def operation(self) -> Iterator[LeasedLayout]:
        """The layout for one operation, with its lease: what the operation made goes if it fails."""
        with self.leases.hold() as lease:
            yield LeasedLayout(self.root, lease)

    def images(self) -> list[StoredImage]:
        """Every image, the newest first."""
        return images.listed(self.layout)

    def image(self, name: str) -> StoredImage:
        """The image called NAME[:TAG] or NAME@DIGEST, or that of a digest, an id or the beginning of an id. NotFound."""
        return images.find(self.layout, name)

    def load(
        self, path: StrPath, *, platform: Platform | str | None = None, progress: Progress | None = None
    ) -> list[StoredImage]:
        """The images in a docker-archive, OCI archive or OCI layout directory, which are in the store from now on.

        platform: of an index, the image for that one ("linux/arm64"), not for this machine. All of them, or with an error
        none: InvalidImage, InvalidLayer, IntegrityError.
        """
        wanted = Platform.parse(platform) if isinstance(platform, str) else platform
        with about(path), self.operation() as layout, Archive(path, platform=wanted) as archive:
            found = [([whole_name(name) for name in names], image) for names, image in archive.images]
            known = {pair for image in self.images() for pair in _layer_ids(image)}
            counter = Counter(progress, "load", sum(layer.size for _, image in found for layer in image.layers))
            sizes: dict[Digest, int] = {}

            def parsed(diff_id: Digest, tree: Tree) -> None:
                sizes[diff_id] = apparent_size(tree)

            kept = [(names, ingest_image(layout, image, known, counter, parsed)) for names, image in found]
            give_names(self.layout, [(descriptor, name) for names, descriptor in kept for name in (*names, None)])
            for diff_id, size in sizes.items():
                apparent.note(self.records, diff_id, size)
        return [StoredImage(self.layout, descriptor, names) for names, descriptor in kept]

    def import_rootfs(
        self,
        source: StrPath | BinaryIO,
        name: str | None = None,
        *,
        changes: Iterable[str] = (),
        message: str | None = None,
        platform: Platform | str | None = None,
        compression: str = "gzip",
        progress: Progress | None = None,
    ) -> StoredImage:
        """A new base image of a root filesystem: a directory, or a tar (also an open file) that may be compressed.

        changes: of the empty config, in a Dockerfile's words. compression: of a tar that is not compressed yet, or of a
        directory: gzip, zstd or none, with a level as in "zstd-19".
        """
        whole = None if name is None else whole_name(name)
        config = apply_changes(RuntimeConfig(), changes)
        how = Compression.parse(compression)
        where = Platform.parse(platform) if isinstance(platform, str) else platform
        shown = source if isinstance(source, str | os.PathLike) else "-"
        losses: Losses = []
        with about(shown), self.operation() as layout:
            layer = ingest_rootfs(layout, source, how, losses, progress)
            history = History(created=now(), comment=message or f"Imported from {os.path.basename(str(shown))}")
            image = new_image([layer], platform=where, config=config, history=[history], created=history.created)
            stored = self.keep(layout, image, whole)
        report(f"import {shown}", losses)
        return stored

    def tag(self, image: StoredImage | str, name: str) -> StoredImage:
        """The image, with `name` as one more name, which no other image has then. NotFound."""
        whole = whole_name(name)
        found = self.image(image) if isinstance(image, str) else image
        try:
            give_name(self.layout, found.descriptor, whole, known_as=[found.digest])
        except KeyError:
            raise NotFound(f"no image {found}: it has just been removed") from None
        return self.image(found.digest)

    def unpack(self, image: StoredImage) -> str | None:
        """The chain_id of the image, whose layers are all unpacked now, each once in the store. None if it has none."""
        with self.operation() as layout:
            return unpack(image, layout, self.snapshots, self.leases)

    def keep(self, layout: LeasedLayout, image: Image, name: str | None) -> StoredImage:
        """A new image whose layers are in `layout`: its documents kept too, then its whole name, if it has one."""
        descriptor = add_documents(layout, image)
        give_name(self.layout, descriptor, name)
        return StoredImage(self.layout, descriptor, [] if name is None else [name])


def _layer_ids(image: Image) -> Iterator[tuple[Digest, Digest]]:
    return ((layer.digest, layer.diff_id) for layer in image.layers)
