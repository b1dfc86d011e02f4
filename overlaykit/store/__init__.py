"""What lasts: images, layers, containers, volumes, under one root folder."""

from overlaykit.store.collect import Freed
from overlaykit.store.containers import Container
from overlaykit.store.disk import Usage
from overlaykit.store.images import StoredImage
from overlaykit.store.mountspec import MountSpec
from overlaykit.store.snapshots import Snapshot, Snapshotter
from overlaykit.store.store import Removed, Store, default_root
from overlaykit.store.volumes import Volume

__all__ = [
    "Container",
    "Freed",
    "MountSpec",
    "Removed",
    "Snapshot",
    "Snapshotter",
    "Store",
    "StoredImage",
    "Usage",
    "Volume",
    "default_root",
]
