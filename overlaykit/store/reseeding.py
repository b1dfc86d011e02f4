"""Reseeding: a volume that was filled from an image gets what a newer image has, and keeps what its user made of it.

Three states are compared, name by name: the seed (what the volume was filled with), the volume, and the new image.

    seed = volume     nobody changed it here: it becomes what the image has, or goes with it
    seed = image      the image has nothing new: the volume's stays
    volume = image    both have come to the same
    all differ        a conflict: the volume's stays, and is listed

The seed is a mark for each name: a hash of kind, mode, owner, target, xattrs and content. Times do not count.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from overlaykit.errors import NotFound, Unsupported
from overlaykit.overlay import View
from overlaykit.overlay.copyout import copy_tree
from overlaykit.overlay.osnames import join
from overlaykit.store.disk import copy_directory_attributes, remove_tree
from overlaykit.store.drivers import DATA
from overlaykit.store.filling import Seeding
from overlaykit.store.volume import Volume
from overlaykit.store.volumes import Volumes
from overlaykit.tree import Kind, scan
from overlaykit.tree.fingerprint import fingerprint


@dataclass
class Reseeded:
    """What became of a volume: paths in it that were added, updated and removed, and conflicts, which stay as they were."""

    added: list[str] = field(default_factory=list)
    updated: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    conflicts: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Marks:
    """A mark for each name in a directory, "" for itself, and which of them are directories."""

    of: Mapping[str, str]
    directories: frozenset[str] = frozenset()

    def is_directory(self, path: str) -> bool:
        return path in self.directories


def marks(directory: Path) -> Marks:
    """The marks of everything in `directory`."""
    tree = scan(directory)
    prints = fingerprint(tree, directory)
    found: dict[str, str] = {}
    directories = set()
    for row, entry in enumerate(tree):
        facts = (entry.kind, entry.mode, entry.uid, entry.gid, entry.rdev, entry.link, sorted(entry.xattrs.items()))
        content = (entry.size, *map(int, prints[row])) if entry.kind == Kind.FILE else ()
        said = repr((*facts, *content)).encode("utf-8", "surrogateescape")
        found[entry.path] = hashlib.blake2b(said, digest_size=16).hexdigest()
        if entry.kind == Kind.DIR:
            directories.add(entry.path)
    return Marks(found, frozenset(directories))


def seeding(path: str) -> Seeding:
    """What writes the seed of a copy of `path` of an image."""

    def write(files: Path, seed: Path) -> None:
        _write(seed, path, marks(files))

    return write


def _write(seed: Path, path: str, found: Marks) -> None:
    seed.write_text(json.dumps({"path": path, "marks": found.of}))


def reseed(volumes: Volumes, volume: Volume, view: View, path: str | None = None, *, dry_run: bool = False) -> Reseeded:
    """Give the volume what `path` of `view` has. path: None for where its files came from. dry_run: only say what would be.

    All or nothing, and made aside: what stays is linked, not copied. InUse while somebody uses the volume; NotFound if it
    was not filled from an image, or `path` is no directory there; Unsupported if the store does not keep its files.
    """
    if volume.stored != DATA:
        raise Unsupported(f"volume {volume.name}: only files that the store keeps as they are can be reseeded")
    with volumes.at_rest(volume) as data:
        try:
            seed = json.loads((volume.directory / "seed").read_bytes())
        except FileNotFoundError:
            hint = "only what the image filled when a container was created knows what is its user's"
            raise NotFound(f"volume {volume.name} was not filled from an image", hint=hint) from None
        source = path or seed["path"]
        if not view.isdir(source):
            raise NotFound(f"the image has no directory {source}")
        result = Reseeded()
        site = volume.site()

        def make(aside: Path) -> None:
            nonlocal result
            copy_tree(view, source, aside / "image")
            ours, new = marks(data), marks(aside / "image")
            chosen, result = plan(Marks(seed["marks"]), ours, new)
            if not dry_run:
                _build(aside / "files", chosen, {"volume": data, "image": aside / "image"}, ours, new)
                _write(aside / "seed", source, new)
            remove_tree(aside / "image")

        if dry_run:
            aside = volume.directory / "swapping"
            aside.mkdir(mode=0o700)
            try:
                make(aside)
            finally:
                remove_tree(aside)
        else:
            site.swap(make)
    return result


def plan(seed: Marks, ours: Marks, new: Marks) -> tuple[dict[str, str], Reseeded]:
    """Where each name is to come from, "volume" or "image", and what that changes."""
    chosen: dict[str, str] = {}
    conflicts, taken = set(), set()
    for path in sorted({*seed.of, *ours.of, *new.of}):
        was, here, there = seed.of.get(path), ours.of.get(path), new.of.get(path)
        if here != there and here == was:
            taken.add(path)
            if there is not None:
                chosen[path] = "image"
            continue
        if here != there and there != was:
            conflicts.add(path)
        if here is not None:
            chosen[path] = "volume"
    # What stays needs its directory, whatever the image makes of that.
    for path in sorted(chosen, reverse=True):
        parent = _parent(path)
        while path and chosen[path] == "volume" and not _is_directory(parent, chosen, ours, new):
            if parent in new.of:
                conflicts.add(parent)
            chosen[parent] = "volume"
            taken.discard(parent)
            path, parent = parent, _parent(parent)
    # What is new needs one too, and the volume may have none there.
    for path in sorted(chosen):
        if path and chosen[path] == "image" and not _is_directory(_parent(path), chosen, ours, new):
            del chosen[path]
            taken.discard(path)
            conflicts.add(path)
    result = Reseeded(conflicts=sorted(conflicts))
    for path in sorted(taken):
        kind = result.removed if path not in new.of else result.added if path not in ours.of else result.updated
        kind.append(path)
    return chosen, result


def _parent(path: str) -> str:
    return path.rpartition("/")[0]


def _is_directory(path: str, chosen: Mapping[str, str], ours: Marks, new: Marks) -> bool:
    source = chosen.get(path)
    return source is not None and (ours if source == "volume" else new).is_directory(path)


def _build(target: Path, chosen: Mapping[str, str], sources: Mapping[str, Path], ours: Marks, new: Marks) -> None:
    """The new directory `target` with each name from where it was chosen to come from: files as links, none is copied."""
    directories = []
    for path in sorted(chosen):
        source = sources[chosen[path]]
        if (ours if chosen[path] == "volume" else new).is_directory(path):
            (target / path).mkdir(mode=0o700)
            directories.append((source / path, target / path))
        else:
            os.link(join(str(source), path), join(str(target), path), follow_symlinks=False)
    for source, made in reversed(directories):
        copy_directory_attributes(source, made, without="\0")  # all of them
