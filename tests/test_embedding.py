"""The library in somebody's program, without a store: whatever a tree comes from, from threads, after a fork, and fed with
what is no image at all."""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import signal
import tarfile
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import fuzz_tar
import imagefiles
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from kernel_overlay import SCRATCH
from treetext import below_root, listing, text

import overlaykit
from overlaykit import OverlaykitError, Tree

MTIME = 1_600_000_000


@pytest.fixture
def place() -> Iterator[Path]:
    """An empty directory in memory."""
    with tempfile.TemporaryDirectory(dir=SCRATCH) as folder:
        yield Path(folder)


# --- a tree of anything -----------------------------------------------------------------------------------------------

BASE = imagefiles.layer({"etc": None, "etc/motd": b"1\n", "etc/old": b"old\n", "srv": None, "srv/a": b"a", "srv/b": b"b"})
TOP = imagefiles.layer(
    {"etc": None, "etc/motd": b"22\n", "etc/.wh.old": b"", "srv": None, "srv/.wh..wh..opq": b"", "srv/c": b"c"}
)
SOURCES: dict[str, Callable[[bytes, Path], Any]] = {
    "tar": lambda raw, path: path.write_bytes(raw) and path,
    "tar.gz": lambda raw, path: path.write_bytes(gzip.compress(raw)) and os.fspath(path),
    "tar.zst": lambda raw, path: path.write_bytes(zstandard.compress(raw)) and path,
    "layer": lambda raw, path: overlaykit.open_image(imagefiles.write(path, imagefiles.oci([raw]), form="dir")).layers[0],
    "Tree": lambda raw, path: overlaykit.index_tar(io.BytesIO(raw)),
}
WHOLE = SOURCES | {
    "directory": lambda raw, path: unpacked(raw, path),
    "image": lambda raw, path: overlaykit.open_image(imagefiles.write(path, imagefiles.docker_25([raw]), form="tar")),
    "OCI directory": lambda raw, path: imagefiles.write(path, imagefiles.oci([raw]), form="dir"),
    "OCI archive": lambda raw, path: imagefiles.write(path, imagefiles.oci([raw]), form="tar"),
    "docker archive": lambda raw, path: os.fspath(imagefiles.write(path, imagefiles.docker_20([raw]), form="tar")),
}


def unpacked(raw: bytes, path: Path) -> Path:
    """A directory with the files of a tar, by Python, the root as a layer that does not name it has it."""
    path.mkdir(mode=0o755)
    with tarfile.open(fileobj=io.BytesIO(raw)) as tar:
        tar.extractall(path, filter="fully_trusted")
        for member in reversed(tar.getmembers()):
            os.utime(path / member.name, (MTIME, member.mtime))
    os.utime(path, (0, 0))
    return path


def said(tree: Tree) -> str:
    """The lines of a tree; its root is implied in a layer and written in a directory."""
    return text(tree).replace("/ dir 755 implied", "/ dir 755")


@pytest.mark.parametrize("kind", WHOLE)
def test_a_tree_comes_from_anything(kind: str, place: Path) -> None:
    base = WHOLE[kind](BASE, place / "base")
    expected = overlaykit.index_tar(io.BytesIO(BASE))
    assert said(overlaykit.scan(base)) == said(expected)
    assert said(overlaykit.merge([base])) == said(expected)


@pytest.mark.parametrize("upper", SOURCES)
@pytest.mark.parametrize("lower", WHOLE)
def test_the_functions_on_trees_take_anything(lower: str, upper: str, place: Path) -> None:
    base, top = WHOLE[lower](BASE, place / "base"), SOURCES[upper](TOP, place / "top")
    trees = [overlaykit.index_tar(io.BytesIO(raw)) for raw in (BASE, TOP)]
    merged = overlaykit.merge([base, top])
    assert said(merged) == said(overlaykit.merge(trees))
    assert said(overlaykit.squash([base, top])) == said(overlaykit.squash(trees))
    assert said(overlaykit.diff(base, merged)) == said(overlaykit.diff(trees[0], merged))
    assert [f"{c.kind} {c.path}" for c in overlaykit.changes(base, top)] == [
        *("C /etc", "C /etc/motd", "D /etc/old"),
        *("C /srv", "D /srv/a", "D /srv/b", "A /srv/c"),
    ]


# --- threads and forks ------------------------------------------------------------------------------------------------


def layer_number(number: int) -> bytes:
    """A layer of some hundred files, another one for each number; zstd and gzip in turn."""
    rnd = random.Random(number)
    files: dict[str, bytes | None] = {f"d{i}": None for i in range(10)}
    files |= {f"d{i % 10}/f{i}": rnd.randbytes(rnd.choice([0, 100, 5000])) for i in range(300)}
    raw = imagefiles.layer(files | {"large": rnd.randbytes(3 << 20)})
    return zstandard.compress(raw, 1) if number % 2 else gzip.compress(raw, 1)


def there_and_back(blob: bytes, home: Path) -> str:
    """The diff_id of what is packed of a layer that was applied on the new directory `home`."""
    home.mkdir()
    os.utime(home, (0, 0))  # the layer says nothing of the root
    overlaykit.apply_layer(io.BytesIO(blob), home)
    return overlaykit.pack_layer(home, io.BytesIO(), compression="zstd").diff_id


def test_eight_threads_apply_and_pack_each_for_itself(place: Path) -> None:
    blobs = [layer_number(number) for number in range(8)]
    expected = [there_and_back(blob, place / f"alone {number}") for number, blob in enumerate(blobs)]
    gate = threading.Barrier(8)

    def work(number: int) -> list[str]:
        gate.wait()
        return [there_and_back(blobs[number], place / f"{number} {turn}") for turn in range(3)]

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(work, range(8)))
    assert found == [[each] * 3 for each in expected]
    for number in range(8):
        assert listing(place / f"{number} 0", skip=[""]).keys() == listing(place / f"alone {number}").keys()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # that it may, is the point
def test_a_fork_in_the_midst_of_threads_goes_on_by_itself(place: Path) -> None:
    """A child has the locks as they stood when it was made, and none of the threads that would let go of them."""
    image = imagefiles.write(place / "image", imagefiles.oci(), form="dir")
    overlaykit.open_image(image).unpack(place / "before")  # the threads of unpack were used
    blobs = [layer_number(number) for number in range(3)]
    expected = there_and_back(blobs[2], place / "alone")
    done = threading.Event()

    def work(number: int) -> None:
        turn = 0
        while not done.is_set():
            there_and_back(blobs[number], place / f"{number} {turn}")
            turn += 1

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    try:
        for child in range(5):
            pid = os.fork()
            if pid == 0:
                code = 1
                with suppress(BaseException):
                    signal.alarm(300)  # who waits for ever ends by it
                    overlaykit.open_image(image).unpack(place / f"child {child}")
                    same = there_and_back(blobs[2], place / f"child's {child}") == expected
                    code = 0 if same else 2
                os._exit(code)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
            assert listing(place / f"child {child}").keys() == listing(place / "before").keys()
    finally:
        done.set()
        for thread in threads:
            thread.join()


# --- bad input --------------------------------------------------------------------------------------------------------

SMALL = [imagefiles.layer({"etc": None, "etc/motd": b"1\n", "etc/old": b"old\n"}), imagefiles.layer({"etc/.wh.old": b""})]
FORMS = {
    "OCI directory": (imagefiles.oci(SMALL), "dir"),
    "OCI archive": (imagefiles.oci(SMALL), "tar"),
    "docker 20": (imagefiles.docker_20(SMALL), "tar"),
    "docker 25": (imagefiles.docker_25(SMALL), "tar"),
    "docker 25, gzip": (imagefiles.docker_25(SMALL), "tar.gz"),
}
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["../x", "/", "sha256:"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


def assert_only_our_errors(action: Callable[[], object]) -> bool:
    """Whether `action` came to an end. If not, it must have said so by an OverlaykitError or an OSError."""
    try:
        action()
    except (OverlaykitError, OSError):
        return False
    except BaseException:
        pytest.fail(traceback.format_exc())
    return True


@st.composite
def damaged(draw: st.DrawFn) -> tuple[imagefiles.Files, str]:
    """The files of an image, some of them damaged: bytes flipped, cut off, gone, or a JSON value in another's place."""
    whole, form = FORMS[draw(st.sampled_from(sorted(FORMS)))]
    files = dict(whole)
    for name in draw(st.lists(st.sampled_from(sorted(whole)), min_size=1, max_size=2, unique=True)):
        raw = files[name]
        how = draw(st.sampled_from(["flip", "cut", "lengthen", "gone", "json", "json", "json"]))
        at = draw(st.integers(0, max(len(raw) - 1, 0)))
        if how == "gone":
            del files[name]
        elif how == "cut":
            files[name] = raw[:at]
        elif how == "lengthen":
            files[name] = raw + draw(st.binary(max_size=600))
        elif how == "flip" or not raw.startswith((b"{", b"[")):
            files[name] = raw[:at] + bytes([raw[at] ^ draw(st.integers(1, 255))]) + raw[at + 1 :] if raw else b""
        else:
            files[name] = imagefiles.to_json(with_another(json.loads(raw), draw))
    return files, form


def with_another(document: Any, draw: st.DrawFn) -> Any:
    """`document` with a value drawn for one of its own, however deep."""
    if not isinstance(document, dict | list) or not document or not draw(st.integers(0, 5)):
        return draw(json_values)
    keys: list[Any] = sorted(document) if isinstance(document, dict) else list(range(len(document)))
    key = draw(st.sampled_from(keys))
    changed = dict(document) if isinstance(document, dict) else list(document)
    changed[key] = with_another(document[key], draw)  # type: ignore[index]
    return changed


@given(damaged())
def test_whatever_is_wrong_with_an_image_is_said_as_our_error_and_leaves_nothing(
    image: tuple[imagefiles.Files, str],
) -> None:
    files, form = image
    with tempfile.TemporaryDirectory(dir=SCRATCH) as folder:
        place = Path(folder)
        path = imagefiles.write(place / "image", files, form=form)
        whole = assert_only_our_errors(lambda: overlaykit.open_image(path).unpack(place / "tree", max_size=1 << 20))
        assert whole == (place / "tree").exists()
        assert_only_our_errors(lambda: overlaykit.scan(path))
        assert sorted(p.name for p in place.iterdir()) == (["image", "tree"] if whole else ["image"])


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "none": lambda raw: raw,
    "gzip": lambda raw: gzip.compress(raw, 1),
    "zstd": lambda raw: zstandard.compress(raw, 1),
}


@given(st.integers(0, 1 << 40), st.sampled_from(sorted(COMPRESS)), st.booleans())
def test_whatever_is_wrong_with_a_layer_is_said_as_our_error_and_changes_nothing(seed: int, kind: str, late: bool) -> None:
    """late: what is damaged is the compressed blob, and not the tar in it."""
    rnd = random.Random(seed)
    seeds = fuzz_tar.corpus()
    tar = rnd.choice(seeds) if late else fuzz_tar.mutate(rnd, rnd.choice(seeds), seeds)
    blob = COMPRESS[kind](tar)
    if late and blob:
        at = rnd.randrange(len(blob))
        blob = blob[:at] + bytes([rnd.randrange(256)]) * rnd.choice([0, 1, 1, 300]) + blob[at + rnd.choice([0, 1, 1, 99]) :]
    with tempfile.TemporaryDirectory(dir=SCRATCH) as folder:
        place = Path(folder)
        unpacked(SMALL[0], place / "home")
        (place / "blob").write_bytes(blob)
        before = below_root(listing(place))
        if assert_only_our_errors(lambda: overlaykit.apply_layer(place / "blob", place / "home", max_size=1 << 22)):
            for whiteouts in overlaykit.WhiteoutFormat:
                assert_only_our_errors(
                    lambda w=whiteouts: overlaykit.pack_layer(place / "home", io.BytesIO(), whiteouts=w)  # type: ignore[misc]
                )
        else:
            assert below_root(listing(place)) == before
        assert_only_our_errors(lambda: overlaykit.squash([place / "blob", place / "home"]))


# --- what an error says, and what is left ------------------------------------------------------------------------------


def deep_layer(depth: int) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(tarfile.TarInfo("n/" * depth + "file"))
    return out.getvalue()


@pytest.mark.parametrize("at", [0, 1])
def test_a_failed_unpack_leaves_nothing_however_deep(place: Path, at: int) -> None:
    """The folder beside the target was removed by who recursed: a RecursionError, and the half that was made stayed."""
    layers = [BASE, BASE]
    layers[at] = deep_layer(1200)
    document = imagefiles.docker_20(layers, config_of=[layers[0], b"another layer"])
    path = imagefiles.write(place / "image.tar", document, form="tar")
    with pytest.raises(overlaykit.DigestMismatch):
        overlaykit.open_image(path).unpack(place / "tree")
    assert [p.name for p in place.iterdir()] == ["image.tar"]


def test_deep_layers_are_squashed(place: Path) -> None:
    path = imagefiles.write(place / "image", imagefiles.oci([deep_layer(1200), BASE]), form="dir")
    image = overlaykit.open_image(path)
    squashed = overlaykit.squash_layers(image, 0, 2, overlaykit.Layout(path))
    assert len(squashed.layers) == 1
    assert squashed.layers[0].tree() == overlaykit.squash([layer.tree() for layer in image.layers])
    assert sorted(p.name for p in path.iterdir() if p.name.startswith("squash")) == []


def test_an_error_says_which_layer_it_is_about(place: Path) -> None:
    bad = imagefiles.layer({"../out": b"x"})
    (place / "layer.tar").write_bytes(bad)
    path = imagefiles.write(place / "image", imagefiles.oci([BASE, bad]), form="dir")
    image = overlaykit.open_image(path)
    name = f"^layer {image.layers[1].digest}: entry 1 at byte 0, '../out': a path with '..'$"
    for action in (lambda: image.unpack(place / "tree"), image.layers[1].tree, lambda: overlaykit.scan(image)):
        with pytest.raises(overlaykit.UnsafePath, match=name):
            action()
    (place / "home").mkdir()
    for action in (
        lambda: overlaykit.apply_layer(place / "layer.tar", place / "home"),
        lambda: overlaykit.scan(place / "layer.tar"),
        lambda: overlaykit.compare(place / "layer.tar", BASE_TREE),
    ):
        with pytest.raises(overlaykit.UnsafePath, match=f"^{place}/layer.tar: entry 1 at byte 0"):
            action()


BASE_TREE = overlaykit.index_tar(io.BytesIO(BASE))


@pytest.mark.parametrize("form", ["dir", "tar"])
@pytest.mark.parametrize("damage", ["index", "config", "layer"])
def test_a_damaged_image_is_not_taken_for_a_layer_that_has_its_files(place: Path, form: str, damage: str) -> None:
    """An archive that was no whole image was compared as if it were a tar of blobs and documents, without a word."""
    files = imagefiles.oci([BASE])
    names = {"index": "index.json", "layer": imagefiles.blob(gzip.compress(BASE, mtime=0))}
    names["config"] = next(n for n, raw in files.items() if raw.startswith(b'{"created"'))
    path = imagefiles.write(place / "image", files | {names[damage]: b"[]"}, form=form)
    for action in (lambda: overlaykit.scan(path), lambda: overlaykit.compare(path, path)):
        with pytest.raises(OverlaykitError):
            action()


@pytest.mark.parametrize("name", ["oci-layout", "index.json"])
@pytest.mark.parametrize("odd", ["fifo", "device", "directory"])
def test_what_is_no_file_in_a_layout_is_not_waited_for(place: Path, name: str, odd: str) -> None:
    """A FIFO for an index.json was opened, and that waits until somebody writes to it; /dev/zero was read without end."""
    path = imagefiles.write(place / "image", imagefiles.oci(), form="dir")
    (path / name).unlink()
    {"fifo": os.mkfifo, "device": lambda p: p.symlink_to("/dev/zero"), "directory": os.mkdir}[odd](path / name)
    with pytest.raises(overlaykit.InvalidImage, match=f"{name} is no regular file"):
        overlaykit.open_image(path)


class Stingy(io.RawIOBase):
    """A raw file that takes seven bytes a write, as a pipe may, or a disk that is nearly full."""

    def __init__(self) -> None:
        super().__init__()
        self.taken = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, data: Any, /) -> int:
        self.taken += bytes(data[:7])
        return min(7, len(data))


def test_a_raw_file_that_takes_a_part_gets_the_rest_too(place: Path) -> None:
    """A layer packed into one had the digest of the whole and lacked most of it."""
    unpacked(BASE, place / "home")
    image = overlaykit.open_image(imagefiles.write(place / "image", imagefiles.oci(), form="dir"))
    merged = overlaykit.index_tar(io.BytesIO(BASE))
    for write in (
        lambda out: overlaykit.pack_layer(place / "home", out),
        lambda out: overlaykit.write_tar(merged, lambda row: io.BytesIO(bytes(merged.entry(row).size)), out),
        lambda out: image.save(out),
    ):
        whole, part = io.BytesIO(), Stingy()
        write(whole)
        write(part)
        assert part.taken == whole.getvalue()
    reading, writing = os.pipe2(os.O_NONBLOCK)
    (place / "home/large").write_bytes(bytes(1 << 20))  # more than a pipe holds
    with open(reading, "rb", buffering=0), open(writing, "wb", buffering=0) as full, pytest.raises(BlockingIOError):
        overlaykit.pack_layer(place / "home", full, compression="none")


def test_a_list_of_lowers_wants_to_know_what_the_upper_is(place: Path) -> None:
    with pytest.raises(ValueError, match="whiteouts"):
        overlaykit.pack_layer(place, io.BytesIO(), lower=[])
