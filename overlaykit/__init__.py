"""The layer engine of containers as a library: images, layers, writable layers and volumes, in process.

    store = overlaykit.Store("/path/to/root")
    image = store.import_rootfs("rootfs.tar", "base:1")
    container = store.create(image, name="box")
    container.fs.unlink("/etc/motd")
    container.commit("mine:1").save("mine.tar")

A name is imported when it is first used, so that `import overlaykit` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "overlaykit.store": "Container MountSpec Snapshot Snapshotter Store StoredImage Volume",
    "overlaykit.overlay": "Mount Overlay View mount unmount",
    "overlaykit.oci": "Digest Image ImageIndex Layer Layout Platform Reference open_image",
    "overlaykit.oci.disk": "PackedLayer apply_layer pack_layer squash_layers unpack",
    "overlaykit.tree": "Change Entry Flag Kind Loss Tree WhiteoutFormat changes diff index_tar merge scan squash write_tar",
    "overlaykit.tree.blame": "Touch Waste blame waste",
    "overlaykit.errors": (
        "AlreadyExists DigestMismatch InUse IntegrityError InvalidImage InvalidLayer InvalidReference NotFound "
        "OverlaykitError SizeMismatch UnsafePath Unsupported"
    ),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names.split()}

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
    from overlaykit.overlay import Mount, Overlay, View, mount, unmount
    from overlaykit.store import Container, MountSpec, Snapshot, Snapshotter, Store, StoredImage, Volume
    from overlaykit.tree import (
        Change,
        Entry,
        Flag,
        Kind,
        Loss,
        Tree,
        WhiteoutFormat,
        changes,
        diff,
        index_tar,
        merge,
        scan,
        squash,
        write_tar,
    )
    from overlaykit.tree.blame import Touch, Waste, blame, waste

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
    "Loss",
    "Mount",
    "MountSpec",
    "NotFound",
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


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'overlaykit' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(home), name)
    return value


def __dir__() -> list[str]:
    return __all__
