"""What an image is: digests, documents, references, layers, images, and where they are kept: layouts and archives."""

from __future__ import annotations

from typing import TYPE_CHECKING

from overlaykit.lazily import importing

_HOMES = {
    "overlaykit.oci.archive": "Archive open_image open_images",
    "overlaykit.oci.digest": "Digest DigestingReader VerifyingReader chain_ids",
    "overlaykit.oci.documents": "Descriptor Healthcheck History ImageConfig Index Manifest RootFS RuntimeConfig",
    "overlaykit.oci.image": "BlobImage Image ImageIndex find_image validate",
    "overlaykit.oci.layer": "BlobLayer Layer LayerWriter ingest_layer layer_from_tar",
    "overlaykit.oci.layout": "BlobWriter Layout",
    "overlaykit.oci.mutate": "annotate append new_image rebase with_config",
    "overlaykit.oci.pipeline": "LayerStream",
    "overlaykit.oci.platforms": "Platform",
    "overlaykit.oci.reference": "Reference",
    "overlaykit.oci.saving": "save save_images",
    "overlaykit.oci.streams": "Compression",
}

if TYPE_CHECKING:
    from overlaykit.oci.archive import Archive, open_image, open_images
    from overlaykit.oci.digest import Digest, DigestingReader, VerifyingReader, chain_ids
    from overlaykit.oci.documents import (
        Descriptor,
        Healthcheck,
        History,
        ImageConfig,
        Index,
        Manifest,
        RootFS,
        RuntimeConfig,
    )
    from overlaykit.oci.image import BlobImage, Image, ImageIndex, find_image, validate
    from overlaykit.oci.layer import BlobLayer, Layer, LayerWriter, ingest_layer, layer_from_tar
    from overlaykit.oci.layout import BlobWriter, Layout
    from overlaykit.oci.mutate import annotate, append, new_image, rebase, with_config
    from overlaykit.oci.pipeline import LayerStream
    from overlaykit.oci.platforms import Platform
    from overlaykit.oci.reference import Reference
    from overlaykit.oci.saving import save, save_images
    from overlaykit.oci.streams import Compression

__all__ = [
    "Archive",
    "BlobImage",
    "BlobLayer",
    "BlobWriter",
    "Compression",
    "Descriptor",
    "Digest",
    "DigestingReader",
    "Healthcheck",
    "History",
    "Image",
    "ImageConfig",
    "ImageIndex",
    "Index",
    "Layer",
    "LayerStream",
    "LayerWriter",
    "Layout",
    "Manifest",
    "Platform",
    "Reference",
    "RootFS",
    "RuntimeConfig",
    "VerifyingReader",
    "annotate",
    "append",
    "chain_ids",
    "find_image",
    "ingest_layer",
    "layer_from_tar",
    "new_image",
    "open_image",
    "open_images",
    "rebase",
    "save",
    "save_images",
    "validate",
    "with_config",
]

__getattr__ = importing(__name__, _HOMES)
