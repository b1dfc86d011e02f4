"""Layers onto disk: each once in a store, by whoever wants it first, and several of one image side by side."""

from __future__ import annotations

import logging
import os
from functools import partial
from pathlib import Path

from overlaykit.errors import NotFound
from overlaykit.oci import Digest, Image, Layer
from overlaykit.oci.abreast import Turn, abreast
from overlaykit.overlay.apply import apply_layer
from overlaykit.store.leases import Leases
from overlaykit.store.packing import LeasedLayout, report
from overlaykit.store.snapshots import COMMITTED, Snapshotter
from overlaykit.tree import Losses, Tree


def blobs_and_layers(image: Image) -> set[str]:
    """Everything that an image is made of, as leases name it: its blobs, and its layers where they are unpacked."""
    manifest = image.manifest
    return {image.digest, manifest.config.digest, *(layer.digest for layer in manifest.layers), *image.chain_ids}


def hold_image(image: Image, layout: LeasedLayout) -> None:
    """Keep `image` from being collected while the lease of `layout` lasts. NotFound if it has been already."""
    layout.lease.add(*blobs_and_layers(image))
    if not layout.has(image.digest):
        raise NotFound(f"no image {image}: it has just been removed")


def unpack(image: Image, layout: LeasedLayout, snapshots: Snapshotter, leases: Leases) -> str | None:
    """The chain_id of `image`, whose layers are all committed snapshots now. None if it has no layers."""
    hold_image(image, layout)
    jobs: list[_Job] = []
    below: str | None = None
    for chain_id, layer in zip(image.chain_ids, image.layers, strict=True):
        if not snapshots.has(chain_id):
            jobs.append(_Job(layer, chain_id, below, snapshots, leases))
        below = chain_id
    if len(jobs) == 1:
        jobs[0](Turn())
    elif jobs:
        abreast(jobs)
    # Without root it is always so that owners are kept in the tree alone.
    losses = [loss for job in jobs for loss in job.losses]
    report(f"image {image}", losses, level=logging.WARNING if os.geteuid() == 0 else logging.INFO)
    return below


class _Job:
    """One layer to unpack. Whoever wants the same one, in this process or another, waits, and finds it done."""

    def __init__(self, layer: Layer, chain_id: str, below: str | None, snapshots: Snapshotter, leases: Leases) -> None:
        self.layer, self.chain_id, self.below = layer, chain_id, below
        self.snapshots, self.leases = snapshots, leases
        self.losses: Losses = []

    def __call__(self, turn: Turn) -> None:
        with self.leases.hold(f"unpack-{Digest(self.chain_id).encoded}") as lease:
            if self.snapshots.has(self.chain_id):
                return
            directory = self.snapshots.write_directory(partial(self._write, turn), lease)
            turn.wait()
            self.snapshots.record(directory.name, self.chain_id, self.below, kind=COMMITTED)

    def _write(self, turn: Turn, directory: Path) -> Tree:
        def lowers() -> list[tuple[Path, Tree]]:
            turn.wait()
            return self.snapshots.layers(self.below) if self.below else []

        with self.layer.uncompressed() as stream:
            tree = apply_layer(
                turn.reading(stream), directory, whiteouts=self.snapshots.whiteouts, lowers=lowers, losses=self.losses
            )
            stream.drain()
            return tree
