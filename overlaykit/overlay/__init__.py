"""What a stack does: lower, upper, work, merged."""

from overlaykit.overlay.entries import DirEntry
from overlaykit.overlay.inside import run_inside
from overlaykit.overlay.mount import Mount, bind_mount, mount, mount_fuse, overlay_mount, unmount
from overlaykit.overlay.paths import OverlayPath
from overlaykit.overlay.probe import Features, probe
from overlaykit.overlay.view import View
from overlaykit.overlay.writable import Overlay

__all__ = [
    "DirEntry",
    "Features",
    "Mount",
    "Overlay",
    "OverlayPath",
    "View",
    "bind_mount",
    "mount",
    "mount_fuse",
    "overlay_mount",
    "probe",
    "run_inside",
    "unmount",
]
