"""What lasts: images, layers, containers, volumes, under one root folder."""

from __future__ import annotations

from typing import TYPE_CHECKING

from overlaykit.lazily import importing

_HOMES = {
    "overlaykit.store.collect": "Freed",
    "overlaykit.store.containers": "Container",
    "overlaykit.store.disk": "Usage",
    "overlaykit.store.frozen": "NamedSnapshot",
    "overlaykit.store.fsck": "Finding",
    "overlaykit.store.images": "StoredImage",
    "overlaykit.store.mountspec": "MountSpec",
    "overlaykit.store.pruning": "Pruned",
    "overlaykit.store.removing": "Removed",
    "overlaykit.store.sizes": "StoreUsage",
    "overlaykit.store.snapshots": "Snapshot Snapshotter",
    "overlaykit.store.roots": "default_root",
    "overlaykit.store.store": "Store",
    "overlaykit.store.volume": "Volume",
}

if TYPE_CHECKING:
    from overlaykit.store.collect import Freed
    from overlaykit.store.containers import Container
    from overlaykit.store.disk import Usage
    from overlaykit.store.frozen import NamedSnapshot
    from overlaykit.store.fsck import Finding
    from overlaykit.store.images import StoredImage
    from overlaykit.store.mountspec import MountSpec
    from overlaykit.store.pruning import Pruned
    from overlaykit.store.removing import Removed
    from overlaykit.store.roots import default_root
    from overlaykit.store.sizes import StoreUsage
    from overlaykit.store.snapshots import Snapshot, Snapshotter
    from overlaykit.store.store import Store
    from overlaykit.store.volume import Volume

__all__ = [
    "Container",
    "Finding",
    "Freed",
    "MountSpec",
    "NamedSnapshot",
    "Pruned",
    "Removed",
    "Snapshot",
    "Snapshotter",
    "Store",
    "StoreUsage",
    "StoredImage",
    "Usage",
    "Volume",
    "default_root",
]

__getattr__ = importing(__name__, _HOMES)
