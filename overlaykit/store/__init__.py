"""What lasts: images, layers, containers, under one root folder."""

from overlaykit.store.collect import Freed
from overlaykit.store.containers import Container
from overlaykit.store.disk import Usage
from overlaykit.store.images import StoredImage
from overlaykit.store.snapshots import Snapshot, Snapshotter
from overlaykit.store.store import Removed, Store, default_root

__all__ = ["Container", "Freed", "Removed", "Snapshot", "Snapshotter", "Store", "StoredImage", "Usage", "default_root"]
