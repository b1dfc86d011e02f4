"""What lasts: images, layers, containers, volumes, under one root folder."""

from overlaykit.store.collect import Freed
from overlaykit.store.containers import Container
from overlaykit.store.disk import Usage
from overlaykit.store.frozen import NamedSnapshot
from overlaykit.store.fsck import Finding
from overlaykit.store.images import StoredImage
from overlaykit.store.mountspec import MountSpec
from overlaykit.store.pruning import Pruned
from overlaykit.store.sizes import StoreUsage
from overlaykit.store.snapshots import Snapshot, Snapshotter
from overlaykit.store.store import Removed, Store, default_root
from overlaykit.store.volumes import Volume

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
