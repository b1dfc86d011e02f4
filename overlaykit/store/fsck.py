"""fsck: every blob, layer, Tree, row and directory of a store held against each other; what is wrong in words, and repaired
where there is another copy. Deep: what is unpacked of the layers too, file by file, against their blobs (layercheck.py).

A layer's directory and Tree come again from its blob, a Tree without a blob from the directory, a lost work directory, mode
or document of the layout from what it must be. What no other copy explains is never deleted: it moves to ROOT/lost+found,
with a note beside it.
"""

from __future__ import annotations

import fcntl
import os
import re
import stat
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from overlaykit.errors import InvalidReference, OverlaykitError
from overlaykit.oci import BlobImage, Descriptor, Digest, ImageIndex, Index, Layer, RuntimeConfig
from overlaykit.oci.documents import MAX_DOCUMENT, OCI_INDEX, canonical, is_index
from overlaykit.oci.durable import sync_directory, write_file
from overlaykit.overlay.apply import apply_layer
from overlaykit.overlay.copyout import exchange
from overlaykit.store.layercheck import deep_differences, differences
from overlaykit.store.lostfound import note, put_aside
from overlaykit.store.names import give_name, name_of, whole_name
from overlaykit.store.snapshots import ACTIVE, COMMITTED, Snapshot
from overlaykit.store.volumecheck import volume_problems
from overlaykit.tree import Tree, scan

if TYPE_CHECKING:
    from overlaykit.store.store import Store

MOST = 20  # differences told of one layer: who has more needs a new one anyway
CONTAINER_ID = re.compile(r"[0-9a-f]{64}\Z")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong.

    kind        a word for programs: damaged-blob, missing-layer, foreign-file, ...
    what        the digest, name or path
    text        what is wrong with it
    needed_by   images and containers that it matters to; () for none
    repairable  there is another copy, or nothing is lost by putting it right
    repaired    that has been done
    """

    kind: str
    what: str
    text: str
    needed_by: tuple[str, ...] = ()
    repairable: bool = False
    repaired: bool = False


@dataclass
class _Problem:
    finding: Finding
    mend: Callable[[], object] | None = None


def fsck(store: Store, *, repair: bool = False, deep: bool = False) -> list[Finding]:
    """What is wrong in `store`; [] for a sound one. repair: put right what can be, and say so in the findings.

    A store at work changes while it is looked at: what is found is looked at once more.
    """
    problems = _Check(store, deep).all()
    if problems:
        again = {(p.finding.kind, p.finding.what) for p in _Check(store, deep).all()}
        problems = [p for p in problems if (p.finding.kind, p.finding.what) in again]
    if not repair:
        return [p.finding for p in problems]
    done: list[Finding] = []
    refused: dict[tuple[str, str], str] = {}
    for _ in range(4):  # one repair may make another possible
        mended = 0
        for problem in problems:
            if problem.mend is not None:
                try:
                    problem.mend()
                except (OverlaykitError, OSError) as e:
                    refused[problem.finding.kind, problem.finding.what] = f"; left as it is: {e}"
                    continue
                done.append(replace(problem.finding, repaired=True))
                mended += 1
        problems = _Check(store, deep).all()
        if not mended or not problems:
            break
    left = {(p.finding.kind, p.finding.what) for p in problems}
    repaired = [f for f in dict.fromkeys(done) if (f.kind, f.what) not in left]
    told = [replace(f, text=f.text + refused.get((f.kind, f.what), "")) for f in (p.finding for p in problems)]
    return [*repaired, *told]


def needs(store: Store) -> dict[str, set[str]]:
    """Who needs it, for the digest of each blob and the chain_id of each layer that an image or a container has."""
    check = _Check(store)
    check.mark()
    return check.users


@dataclass
class _Check:
    """One look at everything."""

    store: Store
    deep: bool = False
    problems: list[_Problem] = field(default_factory=list)
    users: dict[str, set[str]] = field(default_factory=dict)  # who needs a blob or a layer
    blobs: set[str] = field(default_factory=set)  # what images and containers need
    layers: dict[str, tuple[Layer, str | None]] = field(default_factory=dict)  # by chain_id: its layer, the chain_id below
    bad: set[str] = field(default_factory=set)  # blobs that are not what they are called
    renewed: set[str] = field(default_factory=set)  # snapshots that were unpacked again

    def all(self) -> list[_Problem]:
        self._root()
        self._leftovers()
        if not self._configs() or not self._index():
            return self.problems  # without them nobody knows what is needed
        self._blobs()
        self._images()
        self._rows()
        self._directories()
        for kind, what, text, mend in volume_problems(self.store):
            self._add(kind, what, text, mend)
        for snapshot in self.store.snapshots.walk():
            self._snapshot(snapshot)
        return self.problems

    def _add(self, kind: str, what: object, text: str, mend: Callable[[], object] | None = None) -> None:
        needed_by = tuple(sorted(self.users.get(str(what), ())))
        self.problems.append(_Problem(Finding(kind, str(what), text, needed_by, mend is not None), mend))

    # --- the root -----------------------------------------------------------------------------------------------------

    def _root(self) -> None:
        root = self.store.root
        mode = stat.S_IMODE(root.stat().st_mode)
        if mode & 0o077:
            text = f"has mode {mode:04o}: others can reach files of images, setuid programs too; it should be 0700"
            self._add("permissions", root, text, lambda: root.chmod(0o700))
        for row in self.store.records.rows("PRAGMA integrity_check"):
            if row[0] != "ok":
                self._add("damaged-database", root / "store.db", str(row[0]))

    def _leftovers(self) -> None:
        store = self.store
        for kind, folder, mend in (
            ("stale-ingest", store.root / "ingest", store.layout.clear_stale_ingests),
            ("stale-lease", store.root / "leases", store.leases.recover),
        ):
            for path in sorted(folder.iterdir()):
                if path.name != "lock" and path.is_file() and _is_free(path):
                    self._add(kind, path, "left by an operation that was killed", mend)

    def _configs(self) -> bool:
        """Whether every container's row can be read."""
        good = True
        for row in self.store.records.rows("SELECT id, name, image, config FROM containers"):
            try:
                msgspec.json.decode(row["config"], type=RuntimeConfig)
            except ValueError as e:
                text = f"its configuration cannot be read: {e}; that of its image takes its place"
                self._add("half-written-row", f"container {row['name']}", text, partial(self._config_again, dict(row)))
                good = False
        return good

    def _config_again(self, row: dict[str, str]) -> None:
        self._note("container-config", row["id"][:12], row)
        layout, digest = self.store.layout, Digest(row["image"])
        image = BlobImage(layout, Descriptor(media_type="", digest=digest, size=layout.size(digest)))
        config = msgspec.json.encode(image.runtime, enc_hook=str.__str__).decode()
        self.store.records.execute("UPDATE containers SET config = ? WHERE id = ?", config, row["id"])

    def _index(self) -> bool:
        """Whether index.json can be read."""
        path = self.store.root / "index.json"
        try:
            self.store.layout.index()
        except OverlaykitError as e:
            text = f"{e}; every manifest among the blobs can be listed again, images of containers under their names"
            self._add("damaged-index", path, text, self._list_again)
            return False
        return True

    def _list_again(self) -> None:
        """A new index.json of the manifests that are here and are in no other one."""
        layout = self.store.layout
        path = self.store.root / "index.json"
        names = {str(c.record.image): c.record.image_name for c in self.store.containers()}
        found: dict[str, Descriptor] = {}
        inner: set[str] = set()
        for digest in layout.digests():
            if layout.size(digest) > MAX_DOCUMENT or not layout.verify(digest):
                continue
            with suppress(OverlaykitError):  # most blobs are no manifests
                descriptor = Descriptor(media_type="", digest=digest, size=layout.size(digest))
                if is_index(layout.read(digest), what=digest):
                    index = ImageIndex(layout, descriptor).index
                    inner |= {str(d.digest) for d in index.manifests}
                    found[digest] = msgspec.structs.replace(descriptor, media_type=index.media_type or OCI_INDEX)
                else:
                    image = BlobImage(layout, descriptor)
                    _ = image.config
                    found[digest] = image.descriptor
        self._put_aside(path, "it could not be read")
        write_file(path, canonical(Index(schema_version=2, media_type=OCI_INDEX, manifests=())))
        for key, descriptor in found.items():
            if key not in inner:
                name = names.get(key)
                with suppress(InvalidReference):  # a container may have been created by the image's id
                    give_name(layout, descriptor, None)
                    give_name(layout, descriptor, whole_name(name) if name else None)

    # --- blobs and images ---------------------------------------------------------------------------------------------

    def _blobs(self) -> None:
        layout = self.store.layout
        self.mark()
        for path in sorted((self.store.root / "blobs").rglob("*")):
            if path.is_dir() and not path.is_symlink():
                continue
            try:
                digest = Digest(f"{path.parent.name}:{path.name}")
            except InvalidReference:
                self._add("foreign-file", path, "no blob is called so", partial(self._put_aside, path, "no blob"))
                continue
            try:
                good = layout.verify(digest)
            except OverlaykitError:
                good = False
            if not good:
                self.bad.add(digest)
                mend = None if digest in self.blobs else partial(self._put_aside, path, "not what it is called")
                self._add("damaged-blob", digest, "its content has another digest; load or pull its image again", mend)

    def mark(self) -> None:
        for descriptor in self.store.layout.descriptors():
            self._mark_image(descriptor, f"image {name_of(descriptor) or descriptor.digest.short}")
        for container in self.store.containers():
            digest = container.record.image
            if self.store.layout.has(digest):
                size = self.store.layout.size(digest)
                self._mark_image(Descriptor(media_type="", digest=digest, size=size), f"container {container.name}")
            self._need(digest, f"container {container.name}")

    def _need(self, digest: str, user: str) -> None:
        self.blobs.add(str(digest))
        self.users.setdefault(str(digest), set()).add(user)

    def _mark_image(self, descriptor: Descriptor, user: str) -> None:
        self._need(descriptor.digest, user)
        try:
            if descriptor.is_index:
                for inner in ImageIndex(self.store.layout, descriptor).index.manifests:
                    if self.store.layout.has(inner.digest):  # one platform of ten may be here
                        self._mark_image(inner, user)
                return
            image = BlobImage(self.store.layout, descriptor)
            for blob in (image.manifest.config.digest, *(layer.digest for layer in image.manifest.layers)):
                self._need(blob, user)
            below = None
            for chain_id, layer in zip(image.chain_ids, image.layers, strict=True):
                self.users.setdefault(chain_id, set()).add(user)
                self.layers[chain_id], below = (layer, below), chain_id
        except (OverlaykitError, OSError):
            return  # told where its blobs are looked at

    def _images(self) -> None:
        layout = self.store.layout
        listed = {str(descriptor.digest): descriptor for descriptor in layout.descriptors()}
        for digest in sorted(self.blobs):
            if layout.has(digest):
                continue
            if digest in listed:
                text = "index.json names this manifest, and it is not there"
                self._add("missing-manifest", digest, text, partial(self._unlist, listed[digest]))
            elif any(record.record.image == digest for record in self.store.containers()):
                self._add("missing-image", digest, "a container's image is gone; load or pull it again")
            else:
                self._add("missing-blob", digest, "an image needs it, and it is not there; load or pull the image again")

    def _unlist(self, descriptor: Descriptor) -> None:
        self._note("index-entry", descriptor.digest.encoded[:12], msgspec.to_builtins(descriptor, enc_hook=str))
        self.store.layout.edit(lambda entries: [d for d in entries if d != descriptor])

    # --- rows and directories -----------------------------------------------------------------------------------------

    def _rows(self) -> None:
        records = self.store.records
        keys = {snapshot.key for snapshot in self.store.snapshots.walk()}
        for row in records.rows("SELECT * FROM containers"):
            if row["id"] not in keys:
                text = "its row names a writable layer that is not recorded"
                self._add("half-written-row", f"container {row['name']}", text, partial(self._drop_row, dict(row)))
        for table, rowid, parent, _ in records.rows("PRAGMA foreign_key_check"):
            mend = partial(self._drop_reference, table, rowid) if table == "container_snapshots" else None
            self._add("half-written-row", f"{table} {rowid}", f"refers to a row of {parent} that is not there", mend)

    def _drop_reference(self, table: str, rowid: int) -> None:
        rows = self.store.records.rows(f"SELECT * FROM {table} WHERE rowid = ?", rowid)
        self._note(table, str(rowid), {"why": "what it refers to is gone", "rows": [dict(row) for row in rows]})
        self.store.records.execute(f"DELETE FROM {table} WHERE rowid = ?", rowid)

    def _drop_row(self, row: dict[str, object]) -> None:
        self._note("container-row", str(row["id"])[:12], row)
        self.store.records.execute("DELETE FROM containers WHERE id = ?", row["id"])

    def _directories(self) -> None:
        snapshots = self.store.snapshots
        known = {snapshot.id for snapshot in snapshots.walk()}
        with self.store.leases.hold() as lease:
            held = self.store.leases.held(besides=lease)
        for path in sorted(snapshots.folder.iterdir()):
            if path.name not in known and f"snapshots/{path.name}" not in held:
                text = "a directory that no snapshot has"
                self._add("stray-directory", path, text, partial(self._put_aside, path, "no snapshot had it"))

    def _snapshot(self, snapshot: Snapshot) -> None:
        directory = self.store.snapshots.folder / snapshot.id
        if snapshot.kind == COMMITTED:
            self._committed(snapshot, directory)
            return
        if snapshot.kind == ACTIVE:
            owner = next((c.name for c in self.store.containers() if c.id == snapshot.key), None)
            what = f"container {owner}" if owner else f"snapshot {snapshot.key}"
            if owner is None and CONTAINER_ID.match(snapshot.key):
                text = "a writable layer whose container is not recorded"
                self._add("half-written-row", what, text, lambda: self._drop_snapshot(snapshot, directory))
            elif not (directory / "fs").is_dir():
                hint = f"; overlaykit rm -f {owner} removes what is left" if owner else ""
                text = f"its upper directory {directory / 'fs'} is gone, and its changes with it{hint}"
                self._add("missing-upper", what, text)
            elif not (directory / "work").is_dir():
                make = partial(self.store.snapshots.make_work, snapshot.id)
                self._add("missing-work", what, "its work directory is gone", make)

    def _drop_snapshot(self, snapshot: Snapshot, directory: Path) -> None:
        self.store.snapshots.forget(snapshot.id)
        if directory.exists():
            self._put_aside(directory, f"the writable layer of {snapshot.key}, whose record is gone")

    # --- layers -------------------------------------------------------------------------------------------------------

    def _committed(self, snapshot: Snapshot, directory: Path) -> None:
        layer = self.layers.get(snapshot.key)
        source = layer is not None and layer[0].digest not in self.bad and self.store.layout.has(layer[0].digest)
        again = (lambda: self._unpack_again(snapshot, directory)) if source else None
        if not (directory / "fs").is_dir():
            self._add("missing-layer", snapshot.key, f"its directory {directory / 'fs'} is gone", again)
            return
        try:
            tree = Tree.load(directory / "tree")
            len(tree)
        except (OverlaykitError, OSError) as e:
            self._add("damaged-tree", snapshot.key, str(e), again or (lambda: self._scan_again(directory)))
            return
        try:
            on_disk = scan(directory / "fs", whiteouts=self.store.snapshots.whiteouts)
        except OSError as e:
            self._add("unreadable-layer", snapshot.key, str(e), again)
            return
        for kind, path, text in islice(differences(tree, on_disk, deep=self.deep), None if self.deep else MOST):
            self._add_path(snapshot, kind, path, text, again)
        if self.deep and source and layer is not None:
            try:
                for kind, path, text in deep_differences(layer[0], tree, on_disk, directory / "fs"):
                    self._add_path(snapshot, kind, path, text, again)
            except (OverlaykitError, OSError) as e:
                self._add("unreadable-layer", snapshot.key, str(e))

    def _add_path(self, snapshot: Snapshot, kind: str, path: str, text: str, mend: Callable[[], object] | None) -> None:
        self._add(kind, f"{snapshot.key}:/{path}", text, mend)
        self.problems[-1].finding = replace(
            self.problems[-1].finding, needed_by=tuple(sorted(self.users.get(snapshot.key, ())))
        )

    def _scan_again(self, directory: Path) -> None:
        (directory / "tree").mkdir(mode=0o755, exist_ok=True)
        scan(directory / "fs", whiteouts=self.store.snapshots.whiteouts).save(directory / "tree")
        self.store.snapshots.forget_tree(directory.name)

    def _unpack_again(self, snapshot: Snapshot, directory: Path) -> None:
        """The layer's directory and Tree again from its blob; what was there moves to lost+found."""
        snapshots = self.store.snapshots
        if snapshot.id in self.renewed:
            return  # another finding of the same layer has seen to it
        layer, below = self.layers[snapshot.key]
        lowers = snapshots.layers(below) if below else []

        def write(target: Path) -> Tree:
            with layer.uncompressed() as stream:
                tree = apply_layer(stream, target, whiteouts=snapshots.whiteouts, lowers=lowers)
                stream.drain()
                return tree

        with ExitStack() as stack:
            lease = stack.enter_context(self.store.leases.hold())
            lease.add(snapshot.key)
            for container in self.store.containers():  # a lower must not change under an open overlay
                if any(each.id == snapshot.id for each in snapshots.chain(container.id)):
                    stack.enter_context(container.at_rest())
            made = snapshots.write_directory(write, lease)
            lease.forget()  # who is killed from here on leaves what nobody explains, and not what may be removed
            if directory.exists():
                exchange(made, directory)  # whoever reads the layer now finds it all the time
                sync_directory(directory.parent)
                put_aside(self.store.root, made, f"layer {snapshot.key}, not as its blob has it", was=directory)
            else:
                os.rename(made, directory)
        snapshots.forget_tree(snapshot.id)
        self.renewed.add(snapshot.id)

    def _put_aside(self, path: Path, why: str) -> None:
        put_aside(self.store.root, path, why)

    def _note(self, kind: str, name: str, about: object) -> None:
        note(self.store.root, f"{kind}-{name}", about)


def _is_free(path: Path) -> bool:
    """Whether nobody holds the lock of the file `path`."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(fd)
    return True
