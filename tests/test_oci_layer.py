"""Layers: verified as they are read, and new ones made of tars."""

from __future__ import annotations

import bz2
import gzip
import io
import threading
from functools import partial
from pathlib import Path

import imagefiles as im
import pytest
import zstandard

from overlaykit.errors import DigestMismatch, InvalidLayer
from overlaykit.oci import BlobLayer, Descriptor, Digest, LayerWriter, Layout, ingest_layer, layer_from_tar
from overlaykit.oci.layer import PlainLayer, layer_type

TAR = im.LAYERS[0]
PACKED = gzip.compress(TAR, mtime=0)


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout.create(tmp_path / "layout")


def blob_layer(raw: bytes = PACKED, *, diff_id: Digest | None = None, digest: Digest | None = None) -> BlobLayer:
    descriptor = Descriptor(media_type=layer_type("gzip"), digest=digest or Digest.of(raw), size=len(raw))
    return BlobLayer(descriptor, partial(io.BytesIO, raw), diff_id=diff_id)  # type: ignore[arg-type]


def paths(layer: BlobLayer) -> list[str]:
    return [entry.path for entry in layer.tree()]


def test_a_layer_gives_its_blob_its_tar_and_its_tree() -> None:
    layer = blob_layer(diff_id=Digest.of(TAR))
    assert layer.compressed().read() == PACKED
    with layer.uncompressed() as stream:
        assert stream.read() == TAR
    assert paths(layer) == ["", "etc", "etc/motd", "etc/noise", "etc/old"]
    entry = layer.tree().entry(layer.tree().find("etc/motd"))
    assert TAR[entry.offset : entry.offset + entry.size] == b"welcome\n"


def test_a_diff_id_that_nobody_told_is_computed() -> None:
    assert blob_layer().diff_id == Digest.of(TAR)


def test_the_tree_is_made_once_whoever_asks() -> None:
    opened = []

    def open_blob() -> io.BytesIO:
        opened.append(1)
        return io.BytesIO(PACKED)

    layer = BlobLayer(blob_layer().descriptor, open_blob, diff_id=Digest.of(TAR))  # type: ignore[arg-type]
    trees: list[object] = []
    threads = [threading.Thread(target=lambda: trees.append(layer.tree())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(tree) for tree in trees}) == 1
    assert len(opened) == 1


def test_a_tree_is_of_verified_bytes_only() -> None:
    with pytest.raises(DigestMismatch, match="diff_id"):
        blob_layer(diff_id=Digest.of(b"")).tree()
    with pytest.raises(DigestMismatch):
        blob_layer(digest=Digest.of(b"")).tree()
    with pytest.raises(InvalidLayer):
        blob_layer(gzip.compress(b"no tar" * 1000)).tree()


def test_bytes_behind_the_end_of_the_tar_are_verified_too() -> None:
    """The tar reader stops at the end mark; what follows counts in the digest all the same."""
    padded = gzip.compress(TAR + bytes(50_000), mtime=0)
    assert len(blob_layer(padded, diff_id=Digest.of(TAR + bytes(50_000))).tree()) == 5
    with pytest.raises(DigestMismatch):
        blob_layer(padded, diff_id=Digest.of(TAR)).tree()


def test_damage_that_the_tar_reader_meets_first_is_a_wrong_digest() -> None:
    damaged = im.flip(TAR, 3)
    with pytest.raises(DigestMismatch, match=str(Digest.of(TAR))):
        blob_layer(damaged, digest=Digest.of(TAR), diff_id=Digest.of(TAR)).tree()


def test_a_limit_stops_a_bomb() -> None:
    with blob_layer().uncompressed(max_size=1000) as stream, pytest.raises(InvalidLayer, match="1,000 bytes allowed"):
        stream.drain()


@pytest.mark.parametrize("compression", ["none", "gzip", "gzip-6", "zstd"])
def test_a_new_layer_of_a_tar(layout: Layout, compression: str) -> None:
    layer = layer_from_tar(layout, io.BytesIO(TAR), compression=compression)
    assert layer.diff_id == Digest.of(TAR)
    assert layer.media_type == layer_type(compression.partition("-")[0])
    assert layout.verify(layer.descriptor)
    with layer.uncompressed() as stream:
        assert stream.read() == TAR
    again = layer_from_tar(layout, io.BytesIO(TAR), compression=compression)
    assert again.descriptor == layer.descriptor


def test_a_layer_writer_that_is_left_keeps_nothing(layout: Layout) -> None:
    with LayerWriter(layout) as writer:
        writer.write(TAR)
    with pytest.raises(ValueError, match="closed"):
        writer.commit()
    assert list(layout.digests()) == []
    assert list((layout.root / "ingest").iterdir()) == []


@pytest.mark.parametrize(
    ("raw", "kind", "kept"),
    [
        (TAR, "gzip", False),
        (PACKED, "gzip", True),
        (zstandard.compress(TAR), "zstd", True),
        (bz2.compress(TAR), "gzip", False),
    ],
    ids=["plain", "gzip", "zstd", "bzip2"],
)
def test_what_is_taken_in_stays_byte_for_byte_where_it_can(layout: Layout, raw: bytes, kind: str, kept: bool) -> None:
    layer = ingest_layer(layout, io.BytesIO(raw))
    assert layer.diff_id == Digest.of(TAR)
    assert layer.media_type == layer_type(kind)
    assert (layer.digest == Digest.of(raw)) is kept
    assert layout.verify(layer.descriptor)
    assert paths(layer)[-1] == "etc/old"


@pytest.mark.parametrize(
    "raw",
    [b"no tar" * 1000, gzip.compress(b"no tar" * 1000), PACKED[:-20], TAR[:700]],
    ids=["no tar", "no tar, compressed", "compressed, cut off", "cut off"],
)
def test_what_is_no_layer_is_not_taken_in(layout: Layout, raw: bytes) -> None:
    with pytest.raises(InvalidLayer):
        ingest_layer(layout, io.BytesIO(raw))
    assert list(layout.digests()) == []
    assert list((layout.root / "ingest").iterdir()) == []


def test_a_layer_made_plain_is_the_same_layer() -> None:
    plain = PlainLayer(blob_layer(diff_id=Digest.of(TAR)))
    assert (plain.digest, plain.diff_id, plain.size) == (Digest.of(TAR), Digest.of(TAR), len(TAR))
    assert plain.compressed().read() == TAR
