"""Layouts: blobs that are whole or not there, and an index.json that loses no update."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import imagefiles as im
import pytest

from overlaykit.errors import (
    DigestMismatch,
    IntegrityError,
    InvalidImage,
    InvalidReference,
    NotFound,
    SizeMismatch,
)
from overlaykit.oci import Descriptor, Digest, Layout, Platform
from overlaykit.oci.documents import OCI_MANIFEST

DATA = bytes(range(256)) * 1000
DIGEST = Digest.of(DATA)
BLOB = Descriptor(media_type="application/x", digest=DIGEST, size=len(DATA))
ENTRY = Descriptor(media_type=OCI_MANIFEST, digest=DIGEST, size=len(DATA))


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout.create(tmp_path / "layout")


def put(layout: Layout, data: bytes = DATA) -> Descriptor:
    return layout.add(data, "application/x")


def files(layout: Layout) -> list[str]:
    return sorted(str(p.relative_to(layout.root)) for p in layout.root.rglob("*") if p.is_file())


# --- the directory ----------------------------------------------------------------------------------------------------


def test_a_new_layout_is_what_the_spec_says_and_nobody_elses_business(layout: Layout) -> None:
    assert json.loads((layout.root / "oci-layout").read_text()) == {"imageLayoutVersion": "1.0.0"}
    assert json.loads((layout.root / "index.json").read_text())["manifests"] == []
    folders = [p for p in (layout.root, *layout.root.rglob("*")) if p.is_dir()]
    assert {stat.S_IMODE(p.stat().st_mode) for p in folders} == {0o700}


def test_creating_again_keeps_what_is_there(layout: Layout) -> None:
    put(layout)
    layout.tag(ENTRY, "a")
    again = Layout.create(layout.root)
    assert again.has(DIGEST)
    assert again.names().keys() == {"a"}


def test_what_is_no_layout_is_said(tmp_path: Path) -> None:
    with pytest.raises(InvalidImage, match="no file oci-layout"):
        Layout(tmp_path)
    (tmp_path / "oci-layout").write_text('{"imageLayoutVersion": "9"}')
    with pytest.raises(InvalidImage, match="version '9'"):
        Layout(tmp_path)
    (tmp_path / "oci-layout").write_text("nothing")
    with pytest.raises(InvalidImage, match="oci-layout"):
        Layout(tmp_path)
    (tmp_path / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    with pytest.raises(InvalidImage, match=r"no index\.json"):
        Layout(tmp_path).descriptors()


# --- blobs ------------------------------------------------------------------------------------------------------------


def test_a_blob_comes_back_as_it_went_in(layout: Layout) -> None:
    assert not layout.has(DIGEST)
    with layout.ingest(BLOB) as writer:
        assert writer.write(DATA[:1000]) == 1000
        writer.write(memoryview(DATA)[1000:])
        assert not layout.has(DIGEST)
        assert writer.commit() == BLOB
    assert put(layout) == BLOB
    assert layout.has(DIGEST)
    assert layout.size(DIGEST) == len(DATA)
    assert layout.read(BLOB) == layout.read(DIGEST) == DATA
    assert list(layout.digests()) == [DIGEST]
    assert stat.S_IMODE(layout.path(DIGEST).stat().st_mode) == 0o444
    assert os.listdir(layout.root / "ingest") == []


@pytest.mark.parametrize(
    ("expected", "error"),
    [
        (Digest.of(b""), DigestMismatch),
        (Descriptor(media_type="", digest=Digest.of(b""), size=len(DATA)), DigestMismatch),
        (Descriptor(media_type="", digest=DIGEST, size=len(DATA) - 1), SizeMismatch),
        (Descriptor(media_type="", digest=DIGEST, size=len(DATA) + 1), SizeMismatch),
    ],
)
def test_what_was_not_expected_is_not_kept(layout: Layout, expected: Descriptor | Digest, error: type[Exception]) -> None:
    before = files(layout)

    def write() -> None:
        with layout.ingest(expected) as writer:
            writer.write(DATA)
            writer.commit()

    with pytest.raises(error):
        write()
    assert files(layout) == before


def test_leaving_without_commit_leaves_nothing(layout: Layout) -> None:
    before = files(layout)
    with layout.ingest() as writer:
        writer.write(DATA)
    layout.ingest().write(DATA)
    assert files(layout) == before
    with pytest.raises(ValueError, match="already"):
        writer.commit()


def test_sha512_blobs_have_their_own_folder(layout: Layout) -> None:
    digest = Digest.of(DATA, "sha512")
    with layout.ingest(digest) as writer:
        writer.write(DATA)
        assert writer.commit().digest == digest
    assert layout.read(digest) == DATA
    assert layout.path(digest).parent.name == "sha512"


def test_a_good_blob_is_not_written_again(layout: Layout) -> None:
    put(layout)
    inode = layout.path(DIGEST).stat().st_ino
    put(layout)
    assert layout.path(DIGEST).stat().st_ino == inode


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty"])
def test_a_damaged_blob_is_found_and_replaced(layout: Layout, damage: str) -> None:
    """Peers trust a file of the right size, so that a pull did not heal a store with a flipped bit."""
    put(layout)
    path = layout.path(DIGEST)
    path.chmod(0o600)
    path.write_bytes({"flip": im.flip(DATA, 77), "truncate": DATA[:-1], "empty": b""}[damage])
    with pytest.raises(IntegrityError, match=str(DIGEST)):
        layout.read(BLOB)
    assert not layout.verify(BLOB)
    assert not layout.verify(DIGEST)
    put(layout)
    assert layout.read(BLOB) == DATA


def test_a_missing_blob_and_a_wrong_name(layout: Layout) -> None:
    with pytest.raises(NotFound, match=str(DIGEST)):
        layout.open(BLOB)
    for bad in ("../../etc/passwd", "sha256:../x", f"sha256:{'0' * 63}", ""):
        with pytest.raises(InvalidReference):
            layout.has(bad)


def test_a_document_has_a_limit(layout: Layout) -> None:
    put(layout)
    with pytest.raises(InvalidImage, match="more than 1,000 bytes"):
        layout.read(BLOB, limit=1000)


def test_what_is_no_regular_file_is_not_waited_for(layout: Layout) -> None:
    os.mkfifo(layout.path(DIGEST))
    with pytest.raises(InvalidImage, match="no regular file"):
        layout.open(BLOB)
    assert not layout.has(DIGEST)
    put(layout)
    assert layout.read(BLOB) == DATA


def test_removing_says_what_came_free(layout: Layout) -> None:
    put(layout)
    assert layout.remove(DIGEST) == len(DATA)
    assert layout.remove(DIGEST) == 0
    assert list(layout.digests()) == []


def test_a_full_disk_is_an_os_error_with_the_path(layout: Layout) -> None:
    before = files(layout)
    code = f"""
import resource, signal, sys
from overlaykit.oci import Layout
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    Layout({str(layout.root)!r}).add(bytes(200_000), "x")
except OSError as e:
    print(e.errno, e.filename)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    number, name = done.stdout.split()
    assert int(number) == errno.EFBIG
    assert name.startswith(str(layout.root / "ingest"))
    assert files(layout) == before


# --- writers that died ------------------------------------------------------------------------------------------------


def test_what_a_dead_writer_left_is_cleared_and_a_live_one_spared(layout: Layout) -> None:
    code = f"""
import os
from overlaykit.oci import Layout
writer = Layout({str(layout.root)!r}).ingest()
writer.write(b"half")
os._exit(9)
"""
    subprocess.run([sys.executable, "-c", code], check=False)
    assert len(os.listdir(layout.root / "ingest")) == 1
    with layout.ingest() as alive:
        alive.write(DATA)
        (cleared,) = layout.clear_stale_ingests()
        assert not cleared.exists()
        assert layout.clear_stale_ingests() == []
        assert alive.commit().digest == DIGEST
    assert layout.read(DIGEST) == DATA


def test_collecting_while_others_write_takes_nothing_from_them(layout: Layout) -> None:
    """A collector could see a file between its creation and its lock: the writer then has to begin anew."""
    stop = threading.Event()

    def collect() -> None:
        while not stop.is_set():
            layout.clear_stale_ingests()

    collectors = [threading.Thread(target=collect) for _ in range(2)]
    for thread in collectors:
        thread.start()
    try:
        made = [put(layout, b"%d" % i) for i in range(200)]
    finally:
        stop.set()
        for thread in collectors:
            thread.join()
    assert all(layout.verify(blob) for blob in made)
    assert os.listdir(layout.root / "ingest") == []


# --- names ------------------------------------------------------------------------------------------------------------


def test_names_come_and_go(layout: Layout) -> None:
    other = Descriptor(media_type=OCI_MANIFEST, digest=Digest.of(b"other"), size=5)
    layout.tag(ENTRY, "one")
    layout.tag(ENTRY, "docker.io/library/debian:bookworm")
    assert layout.resolve("one").digest == layout.resolve("docker.io/library/debian:bookworm").digest == DIGEST
    annotations = layout.resolve("docker.io/library/debian:bookworm").annotations
    assert annotations is not None
    assert annotations["io.containerd.image.name"] == "docker.io/library/debian:bookworm"
    layout.tag(other, "one")
    assert layout.resolve("one").digest == other.digest
    assert len(layout.descriptors()) == 2
    assert layout.untag("one").digest == other.digest
    for gone in (layout.resolve, layout.untag):
        with pytest.raises(NotFound, match="'one'"):
            gone("one")


def test_both_of_dockers_annotations_name_an_image(layout: Layout) -> None:
    annotations = {"io.containerd.image.name": "docker.io/library/a:1", "org.opencontainers.image.ref.name": "1"}
    entry = Descriptor(media_type=OCI_MANIFEST, digest=DIGEST, size=1, annotations=annotations)
    layout.edit(lambda entries: [*entries, entry])
    assert layout.resolve("1") == layout.resolve("docker.io/library/a:1") == entry


def test_one_name_for_two_images_is_not_guessed_at(layout: Layout) -> None:
    annotations = {"org.opencontainers.image.ref.name": "1"}
    twins = [Descriptor(media_type=OCI_MANIFEST, digest=Digest.of(x), size=1, annotations=annotations) for x in (b"a", b"b")]
    layout.edit(lambda entries: twins)
    with pytest.raises(InvalidImage, match="2 images are called '1'"):
        layout.resolve("1")


@pytest.mark.parametrize("bad", ["", " ", "a b", "/x", "a\n", "ä", "x" * 2000, "\0"])
def test_what_the_spec_does_not_allow_is_no_name(layout: Layout, bad: str) -> None:
    with pytest.raises(InvalidReference):
        layout.tag(ENTRY, bad)
    assert layout.descriptors() == ()


def test_unknown_fields_of_the_index_stay(layout: Layout) -> None:
    path = layout.root / "index.json"
    entry = {"mediaType": OCI_MANIFEST, "digest": DIGEST, "size": 1, "odd": [1], "annotations": {"a": "b"}}
    path.write_text(json.dumps({"schemaVersion": 2, "manifests": [entry], "more": {"x": 1}}))
    layout.tag(ENTRY, "new")
    document = json.loads(path.read_text())
    assert document["more"] == {"x": 1}
    assert document["manifests"][0] == entry
    layout.untag("new")
    assert json.loads(path.read_text()) == {"schemaVersion": 2, "manifests": [entry], "more": {"x": 1}}


def test_a_change_that_fails_changes_nothing(layout: Layout) -> None:
    layout.tag(ENTRY, "a")
    before = (layout.root / "index.json").read_bytes()

    def fails(entries: object) -> list[Descriptor]:
        raise KeyError

    with pytest.raises(KeyError):
        layout.edit(fails)
    assert (layout.root / "index.json").read_bytes() == before
    layout.untag("a")  # and the lock is free


def _tag_many(root: str, who: int) -> None:
    layout = Layout(root)
    for i in range(25):
        layout.tag(ENTRY, f"p{who}-{i}")
        assert layout.resolve(f"p{who}-{i}").digest == DIGEST
    for i in range(0, 25, 2):
        layout.untag(f"p{who}-{i}")


def test_many_processes_at_once_lose_no_update(layout: Layout) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_tag_many, args=(str(layout.root), n)) for n in range(4)]
    for process in processes:
        process.start()
    while any(process.is_alive() for process in processes):
        layout.descriptors()  # every moment's index.json is whole
    assert [process.exitcode for process in processes] == [0] * 4
    assert layout.names().keys() == {f"p{n}-{i}" for n in range(4) for i in range(1, 25, 2)}
    assert sorted(os.listdir(layout.root)) == ["blobs", "index.json", "ingest", "lock", "oci-layout"]


# --- others' layouts --------------------------------------------------------------------------------------------------


def test_a_foreign_layout_is_read_without_leaving_a_trace(tmp_path: Path) -> None:
    im.write(tmp_path / "theirs", im.oci(tag="one"), form="dir")
    before = files(Layout(tmp_path / "theirs"))
    layout = Layout(tmp_path / "theirs")
    image = layout.image("one")
    assert [layer.diff_id for layer in image.layers] == [im.digest(raw) for raw in im.LAYERS]
    assert [layer.uncompressed().read() for layer in image.layers] == list(im.LAYERS)
    with pytest.raises(NotFound, match="for linux/amd64, not for linux/arm64"):
        layout.image("one", platform=Platform.parse("linux/arm64"))
    assert files(layout) == before
