"""What fsck finds otherwise in a layer's directory than its Tree says; and deep, what else could be wrong: contents, xattrs,
times of directories, and the Tree itself, all held against the layer's blob."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from overlaykit.oci import Layer
from overlaykit.overlay.verify import unlike_contents
from overlaykit.tree import Entry, Flag, Kind, Tree

Difference = tuple[str, str, str]  # kind of finding, path in the layer, text
ATTRIBUTES = ("kind", "mode", "uid", "gid", "size", "mtime_ns", "link", "rdev")
COMPARED = (*ATTRIBUTES, "xattrs", "flags")


def differences(tree: Tree, on_disk: Tree, *, deep: bool = False) -> Iterator[Difference]:
    """What a layer's directory has otherwise than its Tree. deep: xattrs and times of directories too."""
    root = os.geteuid() == 0
    names = [name for name in ATTRIBUTES if root or name not in ("uid", "gid")]
    for entry in tree:
        row = on_disk.find(entry.path)
        if row < 0:
            device = entry.kind in (Kind.CHAR, Kind.BLOCK, Kind.SOCKET)
            if not (device and (not root or entry.rdev == 0)):  # such cannot be made
                yield "missing-file", entry.path, "the layer has it, its directory has not"
            continue
        found = on_disk.entry(row)
        if entry.flags & Flag.IMPLIED or entry.kind == Kind.WHITEOUT == found.kind:
            continue
        for name in names:
            if name == "mtime_ns" and entry.kind == Kind.DIR and not deep:
                continue
            if getattr(entry, name) != getattr(found, name):
                text = f"{name} is {getattr(found, name)!s}, the layer says {getattr(entry, name)!s}"
                yield "changed-mode" if name == "mode" else "changed-file", entry.path, text
                break
        else:
            if deep and (text := _marks_differ(entry, found, all_xattrs=root)):
                yield "changed-xattrs", entry.path, text
    for path in on_disk.paths:
        if tree.find(path) < 0:
            yield "foreign-file", os.fsdecode(path), "no layer has it"


def _marks_differ(entry: Entry, found: Entry, *, all_xattrs: bool) -> str:
    """How xattrs and the opaque mark differ; "" if they do not."""
    if (entry.flags ^ found.flags) & Flag.OPAQUE:
        return "hides what is below it, and the layer does not" if found.flags & Flag.OPAQUE else "its opaque mark is gone"
    # Without root the others could not be given when it was unpacked.
    said, has = ({k: v for k, v in e.xattrs.items() if all_xattrs or k.startswith("user.")} for e in (entry, found))
    wrong = sorted(name for name in {*said, *has} if said.get(name) != has.get(name))
    return f"has other xattrs than the layer says: {', '.join(wrong)}" if wrong else ""


def deep_differences(layer: Layer, tree: Tree, on_disk: Tree, directory: Path) -> Iterator[Difference]:
    """What a layer's Tree, and the files in its directory, have otherwise than its blob, which is read. OverlaykitError.

    Of a file that is a hard link into a lower layer the content is not looked at here, but in that layer.
    """
    said = layer.tree()
    if tree != said and (path := _unlike_row(tree, said)) is not None:
        yield "damaged-tree", path, "its Tree says otherwise than its blob"
        return
    # What is missing, or of another kind or size, has been told.
    for path, error in unlike_contents(said, layer.uncompressed, on_disk, directory):
        if error is not None:
            yield "unreadable-file", path, f"cannot be read: {error.strerror}"
        else:
            yield "changed-content", path, "its content is not the layer's, though its size is"


def _unlike_row(tree: Tree, said: Tree) -> str | None:
    """The first path of which two Trees of one layer say otherwise; None if that is only what was looked up in lowers."""
    if len(tree) != len(said):
        return ""
    for mine, theirs in zip(tree, said, strict=True):
        looked_up = theirs.flags & (Flag.IMPLIED | Flag.LOWER_LINK)
        if mine.path != theirs.path or (not looked_up and any(getattr(mine, n) != getattr(theirs, n) for n in COMPARED)):
            return theirs.path
    return None
