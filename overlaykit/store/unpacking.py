"""Layers onto disk: each once in a store, by whoever wants it first."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from overlaykit.errors import NotFound
from overlaykit.oci import Image, Layer
from overlaykit.overlay.apply import apply_layer
from overlaykit.store.leases import Lease, Leases
from overlaykit.store.packing import LeasedLayout, report
from overlaykit.store.snapshots import Snapshotter
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
    losses: Losses = []
    below: str | None = None
    for chain_id, layer in zip(image.chain_ids, image.layers, strict=True):
        if not snapshots.has(chain_id):
            # Whoever wants the same layer waits here, and finds it done.
            with leases.hold(f"unpack-{chain_id.encoded}") as lease:
                if not snapshots.has(chain_id):
                    _apply(layer, chain_id, below, snapshots, lease, losses)
        below = chain_id
    # Without root it is always so that owners are kept in the tree alone.
    report(f"image {image}", losses, level=logging.WARNING if os.geteuid() == 0 else logging.INFO)
    return below


def _apply(layer: Layer, chain_id: str, below: str | None, snapshots: Snapshotter, lease: Lease, losses: Losses) -> None:
    lowers = snapshots.layers(below) if below else []

    def write(directory: Path) -> Tree:
        with layer.uncompressed() as stream:
            tree = apply_layer(stream, directory, whiteouts=snapshots.whiteouts, lowers=lowers, losses=losses)
            stream.drain()
            return tree

    snapshots.apply(chain_id, below, write, lease)
