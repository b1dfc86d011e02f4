"""The layer engine of containers as a library: images, layers, writable layers and volumes, in process.

    store = overlaykit.Store("/path/to/root")
    image = store.import_rootfs("rootfs.tar", "base:1")
    container = store.create(image, name="box")
    container.fs.unlink("/etc/motd")
    container.commit("mine:1").save("mine.tar")

A name is imported when it is first used, so that `import overlaykit` costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from overlaykit.lazily import importing

__version__ = "0.1.0"

_HOMES = {
    "overlaykit.store": "Container MountSpec Snapshot Snapshotter Store StoredImage Volume",
    "overlaykit.overlay": "Mount Overlay View mount unmount",
    "overlaykit.oci": "Digest Image ImageIndex Layer Layout Platform Reference open_image",
    "overlaykit.oci.disk": "PackedLayer apply_layer pack_layer squash_layers unpack",
    "overlaykit.oci.origins": "Origin",
    "overlaykit.oci.sources": "compare",
    "overlaykit.oci.trees": "changes diff merge scan squash",
    "overlaykit.tree": "Change Entry Flag Kind Loss Tree WhiteoutFormat index_tar write_tar",
    "overlaykit.tree.blame": "Touch Waste blame waste",
    "overlaykit.tree.tarball": "Limits",
    "overlaykit.errors": (
        "AlreadyExists DigestMismatch InUse IntegrityError InvalidImage InvalidLayer InvalidReference NotFound "
        "OverlaykitError SizeMismatch UnsafePath Unsupported"
    ),
}

if TYPE_CHECKING:
    from overlaykit.errors import (
        AlreadyExists,
        DigestMismatch,
        IntegrityError,
        InUse,
        InvalidImage,
        InvalidLayer,
        InvalidReference,
        NotFound,
        OverlaykitError,
        SizeMismatch,
        UnsafePath,
        Unsupported,
    )
    from overlaykit.oci import Digest, Image, ImageIndex, Layer, Layout, Platform, Reference, open_image
    from overlaykit.oci.disk import PackedLayer, apply_layer, pack_layer, squash_layers, unpack
    from overlaykit.oci.origins import Origin
    from overlaykit.oci.sources import compare
    from overlaykit.oci.trees import changes, diff, merge, scan, squash
    from overlaykit.overlay import Mount, Overlay, View, mount, unmount
    from overlaykit.store import Container, MountSpec, Snapshot, Snapshotter, Store, StoredImage, Volume
    from overlaykit.tree import Change, Entry, Flag, Kind, Loss, Tree, WhiteoutFormat, index_tar, write_tar
    from overlaykit.tree.blame import Touch, Waste, blame, waste
    from overlaykit.tree.tarball import Limits

__all__ = [
    "AlreadyExists",
    "Change",
    "Container",
    "Digest",
    "DigestMismatch",
    "Entry",
    "Flag",
    "Image",
    "ImageIndex",
    "InUse",
    "IntegrityError",
    "InvalidImage",
    "InvalidLayer",
    "InvalidReference",
    "Kind",
    "Layer",
    "Layout",
    "Limits",
    "Loss",
    "Mount",
    "MountSpec",
    "NotFound",
    "Origin",
    "Overlay",
    "OverlaykitError",
    "PackedLayer",
    "Platform",
    "Reference",
    "SizeMismatch",
    "Snapshot",
    "Snapshotter",
    "Store",
    "StoredImage",
    "Touch",
    "Tree",
    "UnsafePath",
    "Unsupported",
    "View",
    "Volume",
    "Waste",
    "WhiteoutFormat",
    "__version__",
    "apply_layer",
    "blame",
    "changes",
    "compare",
    "diff",
    "index_tar",
    "merge",
    "mount",
    "open_image",
    "pack_layer",
    "scan",
    "squash",
    "squash_layers",
    "unmount",
    "unpack",
    "waste",
    "write_tar",
]


__getattr__ = importing(__name__, _HOMES)


def __dir__() -> list[str]:
    return __all__
