"""The store from Python: what goes in comes out, names and ids find it, and what nobody needs goes."""

from __future__ import annotations

import io
import json
import os
import tarfile
import threading
from pathlib import Path

import imagefiles as im
import peers
import pytest
import rootfs
from treetext import differences, listing

import overlaykit
from overlaykit import AlreadyExists, InUse, InvalidReference, NotFound, Store, Unsupported
from overlaykit.oci import new_image, validate
from overlaykit.store.packing import LeasedLayout
from overlaykit.store.unpacking import hold_image


@pytest.fixture
def base(store: Store, tmp_path: Path) -> overlaykit.StoredImage:
    """A small image, base:1."""
    rootfs.write(tmp_path / "rootfs.tar")
    return store.import_rootfs(tmp_path / "rootfs.tar", "base:1", changes=['CMD ["sh"]'])


def child_of(store: Store, image: str, name: str, path: str = "/etc/added") -> overlaykit.StoredImage:
    """An image with one file more."""
    with store.create(image) as container, container.fs.open(path, "w") as file:
        file.write(name)
    made = container.commit(name)
    container.remove()
    return made


def files_of(root: Path) -> set[str]:
    """Everything under blobs/ and snapshots/ and what operations leave, two levels deep."""
    return {
        str(path.relative_to(root))
        for part in ("blobs/sha256", "snapshots", "leases", "ingest")
        for path in (root / part).iterdir()
    }


# --- images -----------------------------------------------------------------------------------------------------------


def test_a_root_filesystem_comes_out_as_it_went_in(store: Store, tmp_path: Path) -> None:
    peers.need_root("owners and devices")
    rootfs.write(tmp_path / "rootfs.tar")
    plain = tmp_path / "plain"
    plain.mkdir()
    options = ["--xattrs", "--xattrs-include=*", "--numeric-owner", "--delay-directory-restore"]
    peers.run("tar", "-x", *options, "-p", "-f", tmp_path / "rootfs.tar", "-C", plain)
    from_tar = store.create(store.import_rootfs(tmp_path / "rootfs.tar", "tar:1"))
    assert differences(listing(plain), listing("/", fs=from_tar.fs)) == ""
    from_directory = store.create(store.import_rootfs(plain, "dir:1"))
    assert differences(listing(plain), listing("/", fs=from_directory.fs)) == ""


@pytest.mark.parametrize("compression", ["none", "gzip", "zstd"])
def test_layers_are_compressed_as_asked(store: Store, tmp_path: Path, compression: str) -> None:
    rootfs.write(tmp_path / "rootfs.tar")
    image = store.import_rootfs(tmp_path / "rootfs.tar", "base:1", compression=compression)
    suffix = "" if compression == "none" else f"+{compression}"
    assert image.layers[0].media_type == f"application/vnd.oci.image.layer.v1.tar{suffix}"
    with store.create(image) as container, container.fs.open("/etc/new", "w") as file:
        file.write("x")
    made = container.commit("base:2", compression=compression)
    assert [layer.media_type for layer in made.layers] == [image.layers[0].media_type] * 2
    assert validate(made) == []


def test_an_open_tar_is_imported_too(store: Store, tmp_path: Path) -> None:
    rootfs.write(tmp_path / "rootfs.tar")
    with (tmp_path / "rootfs.tar").open("rb") as file:
        image = store.import_rootfs(file, "base:1", message="from a pipe")
    assert image.history[0].comment == "from a pipe"


def test_images_are_found_by_name_digest_and_the_beginning_of_an_id(store: Store, base: overlaykit.StoredImage) -> None:
    child = child_of(store, "base:1", "host:5000/team/child:x")
    for wanted in ("base:1", "docker.io/library/base:1", base.id, base.id.encoded, base.id.short, base.digest):
        assert store.image(wanted).id == base.id
    for wanted in ("host:5000/team/child:x", f"host:5000/team/child@{child.digest}", child.id.encoded[:4]):
        assert store.image(wanted).id == child.id
    assert {image.tags[0] for image in store.images()} == {"base:1", "host:5000/team/child:x"}
    for missing in ("base:2", "child:x", "0000", f"base@sha256:{'0' * 64}"):
        with pytest.raises(NotFound):
            store.image(missing)
    with pytest.raises(InvalidReference):
        store.image("No Name")


def test_a_name_moves_and_the_image_that_had_it_stays(store: Store, base: overlaykit.StoredImage) -> None:
    child = child_of(store, "base:1", "child:1")
    tagged = store.tag("child:1", "base:1")
    assert sorted(tagged.tags) == ["base:1", "child:1"]
    assert store.image("base:1").id == child.id
    assert store.image(base.id).tags == []
    assert len(store.images()) == 2
    with pytest.raises(NotFound):
        store.tag("nothing", "x:1")


def test_tagging_what_was_just_removed_is_not_found(store: Store, base: overlaykit.StoredImage) -> None:
    stale = store.image("base:1")
    store.remove_image("base:1")
    with pytest.raises(NotFound):
        store.tag(stale, "again:1")
    with pytest.raises(NotFound):
        store.create(stale)
    assert store.images() == []


def test_load_takes_every_image_with_all_its_names_or_nothing(store: Store, tmp_path: Path) -> None:
    path = im.write(tmp_path / "image.tar", im.docker_20(tag="one:1"), form="tar")
    (image,) = store.load(path)
    assert image.tags == ["one:1"]
    before = files_of(store.root)
    broken = im.docker_20(tag="two:1")
    name = im.largest(broken)
    im.write(path, broken | {name: im.flip(broken[name], 3000)}, form="tar")
    with pytest.raises(overlaykit.OverlaykitError, match=r"image\.tar"):
        store.load(path)
    assert files_of(store.root) == before
    assert [image.tags for image in store.images()] == [["one:1"]]


def test_what_is_known_already_is_not_kept_twice(store: Store, tmp_path: Path) -> None:
    path = im.write(tmp_path / "image.tar", im.docker_20(tag="one:1"), form="tar")
    store.load(path)
    before = files_of(store.root)
    store.load(path)
    assert files_of(store.root) == before


def test_loading_again_puts_a_damaged_blob_right(store: Store, tmp_path: Path) -> None:
    path = im.write(tmp_path / "image.tar", im.docker_20(tag="one:1"), form="tar")
    (image,) = store.load(path)
    blob = store.layout.path(image.layers[0].digest)
    whole = blob.read_bytes()
    blob.chmod(0o644)
    blob.write_bytes(im.flip(whole, 1000))
    assert validate(store.image("one:1")) != []
    store.load(path)
    assert blob.read_bytes() == whole


def test_save_writes_the_name_that_the_image_has(store: Store, base: overlaykit.StoredImage, tmp_path: Path) -> None:
    base.save(tmp_path / "base.tar")
    with tarfile.open(tmp_path / "base.tar") as tar:
        manifest = tar.extractfile("manifest.json")
        assert manifest is not None
        assert json.load(manifest)[0]["RepoTags"] == ["base:1"]
    with Store(tmp_path / "other") as other:
        (loaded,) = other.load(tmp_path / "base.tar")
        assert (loaded.id, loaded.digest, loaded.tags) == (base.id, base.digest, ["base:1"])


def test_other_tools_read_the_root_as_a_layout(store: Store, base: overlaykit.StoredImage, tmp_path: Path) -> None:
    listed = json.loads(peers.run("skopeo", "inspect", f"oci:{store.root}:docker.io/library/base:1").stdout)
    assert listed["Digest"] == base.digest


# --- what goes --------------------------------------------------------------------------------------------------------


def test_removing_an_image_removes_what_nothing_else_needs(store: Store, base: overlaykit.StoredImage) -> None:
    child = child_of(store, "base:1", "child:1")
    store.unpack(child)
    before = files_of(store.root)
    removed = store.remove_image("child:1")
    assert (removed.untagged, removed.image) == (["child:1"], child.id)
    assert set(removed.freed.blobs) == {child.digest, child.id, child.layers[1].digest}
    assert removed.freed.snapshots == [child.chain_ids[1]]
    assert removed.freed.size > 0
    assert len(before - files_of(store.root)) == 4
    assert validate(store.image("base:1")) == []
    store.remove_image("base:1")
    assert not any(name.startswith(("blobs/", "snapshots/")) for name in files_of(store.root))


def test_an_image_stays_while_it_has_a_name(store: Store, base: overlaykit.StoredImage) -> None:
    store.tag("base:1", "also:1")
    assert store.remove_image("base:1").image is None
    assert store.image(base.id).tags == ["also:1"]
    store.tag("also:1", "third:1")
    with pytest.raises(InUse, match="2 names"):
        store.remove_image(base.id)
    assert sorted(store.remove_image(base.id, force=True).untagged) == ["also:1", "third:1"]
    assert store.images() == []


def test_an_image_stays_while_a_container_needs_it(store: Store, base: overlaykit.StoredImage) -> None:
    container = store.create("base:1", name="user")
    with pytest.raises(InUse, match="user"):
        store.remove_image("base:1")
    assert store.remove_image("base:1", force=True).image is None
    assert store.images() == []
    assert container.image.id == base.id
    assert container.inspect()["Image"] == base.id
    with container.fs.open("/new", "w") as file:
        file.write("x")
    assert validate(container.commit("saved:1")) == []
    container.remove()
    store.remove_image("saved:1")
    store.gc()
    assert not any(name.startswith(("blobs/", "snapshots/")) for name in files_of(store.root))


def test_gc_takes_what_nobody_needs_and_nothing_else(store: Store, base: overlaykit.StoredImage) -> None:
    store.create("base:1", name="kept")
    before = files_of(store.root)
    orphan = store.layout.add(b"nobody's", "text/plain")
    for name in ("dead", "stray"):
        (store.root / "snapshots" / name).mkdir()
        (store.root / "snapshots" / name / "file").write_text("x" * 5000)
    (store.root / "leases" / "killed").write_text("snapshots/dead\n")
    assert store.gc().blobs == [orphan.digest]
    # It once deleted every directory without a row, where fsck keeps them: the row may be what is missing.
    assert (store.root / "snapshots" / "stray" / "file").exists()
    assert store.fsck(repair=True)[0].kind == "stray-directory"
    assert {name for name in files_of(store.root) if not name.startswith("lost+found")} == set(before)


def test_a_lease_keeps_what_is_being_made(store: Store, base: overlaykit.StoredImage) -> None:
    with store.operation() as layout:
        descriptor = layout.add(b"half an image", "text/plain")
        with Store(store.root) as other:
            assert other.gc().blobs == []
        assert store.layout.has(descriptor.digest)
    assert store.gc().blobs == [descriptor.digest]


def test_what_fails_leaves_nothing(store: Store, base: overlaykit.StoredImage) -> None:
    before = files_of(store.root)

    def fail() -> None:
        with store.operation() as layout:
            layout.add(b"half an image", "text/plain")
            store.snapshots.prepare_directory(None, layout.lease)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert files_of(store.root) == before


# --- stores -----------------------------------------------------------------------------------------------------------


def test_a_root_that_is_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    with pytest.raises(Unsupported, match="precious"):
        Store(tmp_path)
    assert os.listdir(tmp_path) == ["precious"]


def test_a_layout_of_another_tool_becomes_a_store(tmp_path: Path) -> None:
    im.write(tmp_path / "layout", im.oci(tag="there:1"), form="dir")
    with Store(tmp_path / "layout") as store:
        assert [image.tags for image in store.images()] == [["there:1"]]
        assert store.create("there:1").fs.listdir("/etc")


def test_a_newer_schema_is_refused(store: Store) -> None:
    store.records.execute("PRAGMA user_version = 1000")
    with pytest.raises(Unsupported, match="1000"):
        Store(store.root)


def test_only_the_owner_gets_in(store: Store) -> None:
    for path in (store.root, store.root / "snapshots", store.root / "leases", store.root / "ingest"):
        assert path.stat().st_mode & 0o777 == 0o700


def test_the_default_root_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from overlaykit.store import default_root

    monkeypatch.setenv("OVERLAYKIT_ROOT", str(tmp_path / "named"))
    assert default_root() == tmp_path / "named"
    monkeypatch.delenv("OVERLAYKIT_ROOT")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert default_root() == tmp_path / "data/overlaykit"
    monkeypatch.delenv("XDG_DATA_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_root() == tmp_path / ".local/share/overlaykit"
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert default_root() == Path("/var/lib/overlaykit")


def test_a_user_without_a_home_is_asked_for_a_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """pathlib's RuntimeError came through as a traceback; "~" itself would be a folder wherever the command was called."""
    from overlaykit.store import default_root

    for name in ("OVERLAYKIT_ROOT", "XDG_DATA_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "geteuid", lambda: 4_000_000)
    monkeypatch.setattr(os, "getuid", lambda: 4_000_000)  # of no user
    with pytest.raises(NotFound, match="no home directory"):
        default_root()


def test_an_image_without_layers_has_containers_too(store: Store) -> None:
    with store.operation() as layout:
        assert isinstance(layout, LeasedLayout)
        image = store.keep(layout, new_image(), "docker.io/library/empty:1")
    with store.create(image) as container, container.fs.open("/first", "w") as file:
        file.write("x")
    assert [str(change.path) for change in container.diff()] == ["/first"]
    assert len(container.commit("empty:2").layers) == 1


def test_threads_that_want_one_image_unpack_it_once(store: Store, base: overlaykit.StoredImage) -> None:
    made: list[overlaykit.Container] = []
    threads = [threading.Thread(target=lambda: made.append(store.create("base:1"))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({container.name for container in made}) == 6
    assert len(list(store.snapshots.walk("committed"))) == 1


def test_progress_counts_every_byte(store: Store, tmp_path: Path) -> None:
    rootfs.write(tmp_path / "rootfs.tar")
    seen: list[tuple[str, int, int]] = []
    store.import_rootfs(tmp_path / "rootfs.tar", "base:1", progress=lambda *args: seen.append(args))
    size = (tmp_path / "rootfs.tar").stat().st_size
    assert seen[-1] == ("rootfs.tar", size, size)


def test_source_date_epoch_makes_images_reproducible(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    rootfs.write(tmp_path / "rootfs.tar")
    digests = set()
    for name in ("one", "two"):
        with Store(tmp_path / name) as store:
            store.import_rootfs(tmp_path / "rootfs.tar", "base:1")
            digests.add(child_of(store, "base:1", "child:1").digest)
    assert len(digests) == 1
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "yesterday")
    with Store(tmp_path / "one") as store, pytest.raises(Unsupported, match="yesterday"):
        store.import_rootfs(io.BytesIO(im.LAYERS[0]), "base:2")


def test_names_of_containers_are_checked_and_never_taken_twice(store: Store, base: overlaykit.StoredImage) -> None:
    store.create("base:1", name="taken")
    with pytest.raises(AlreadyExists, match="taken"):
        store.create("base:1", name="taken")
    with pytest.raises(InvalidReference, match="slash"):
        store.create("base:1", name="a/slash")
    assert len(store.containers()) == 1


def test_what_is_removed_while_somebody_uses_it_goes_later(store: Store, base: overlaykit.StoredImage) -> None:
    child_of(store, "base:1", "child:1")
    with store.operation() as layout:
        hold_image(store.image("child:1"), layout)
        with Store(store.root) as other:
            assert other.remove_image("child:1").freed.blobs == []
        with Store(store.root):  # looks for what was left, and finds it in use still
            pass
        assert len(set(store.layout.digests())) == 6
    with Store(store.root) as other:
        assert len(set(other.layout.digests())) == 3
    assert os.listdir(store.root / "leases") == ["lock"]


@pytest.mark.parametrize("depth", [1200, 2500], ids=["than Python recurses", "than a path is long"])
def test_an_image_may_be_deeper(store: Store, tmp_path: Path, depth: int) -> None:
    """It could be pulled but never removed: who counted what came free recursed, once for each directory in another."""
    with tarfile.open(tmp_path / "deep.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(tarfile.TarInfo("n/" * depth + "file"))
    store.import_rootfs(tmp_path / "deep.tar", "deep:1")
    with store.create("deep:1", name="deep") as box:
        box.fs.write_bytes("/n" * 1200 + "/new", b"x")
        assert box.sizes()[0] > 0
    box.commit("deep:2")
    assert box.remove() > 0
    for name in ("deep:1", "deep:2"):
        store.remove_image(name)
    store.prune(all=True)
    assert os.listdir(store.root / "snapshots") == []
