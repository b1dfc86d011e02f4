"""Compressed streams, whatever is in them, and the thread that reads them ahead."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from overlaykit.errors import DigestMismatch, InvalidLayer, OverlaykitError, SizeMismatch, Unsupported
from overlaykit.oci.digest import Digest, copy_stream
from overlaykit.oci.pipeline import DEPTH, CompressingWriter, LayerStream
from overlaykit.oci.streams import OUTPUT, Compression, compression_of, decompressed, is_tar_header

RANDOM = random.Random(7)
NOISE = RANDOM.randbytes(300_000)
TEXT = b"".join(b"line %d of a file that compresses\n" % RANDOM.randrange(1000) for _ in range(100_000))
DATA = TEXT + NOISE + TEXT


def zstd(data: bytes, level: int = 1) -> bytes:
    return zstandard.ZstdCompressor(level=level, write_checksum=True).compress(data)


PACK: dict[str, Callable[[bytes], bytes]] = {
    "gzip": lambda data: gzip.compress(data, 1, mtime=0),
    "zstd": zstd,
    "bzip2": lambda data: bz2.compress(data, 1),
    "xz": lambda data: lzma.compress(data, preset=0),
}
SKIPPABLE = b"\x50\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"hello"


class Trickle(io.BytesIO):
    """A source that gives as much as it likes, as pipes and sockets do."""

    def read(self, n: int | None = -1, /) -> bytes:
        return super().read(min(n if n and n > 0 else 1 << 30, RANDOM.randrange(1, 5000)))


def unpack(data: bytes) -> bytes:
    return b"".join(decompressed(io.BytesIO(data)))


# --- what comes in ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PACK)
def test_what_a_stream_is_its_bytes_say(kind: str) -> None:
    packed = PACK[kind](DATA)
    assert compression_of(packed[:512]) == kind
    assert unpack(packed) == DATA
    assert b"".join(decompressed(Trickle(packed))) == DATA
    assert unpack(PACK[kind](b"")) == b""


def test_plain_bytes_are_plain() -> None:
    assert compression_of(DATA[:512]) == compression_of(b"") == "none"
    assert unpack(DATA) == DATA
    assert unpack(b"") == b""


def test_a_tar_whose_first_name_begins_like_gzip_is_a_tar() -> None:
    """The magic alone would take a file called "\\x1f\\x8b\\x08" for a gzip stream."""
    header = bytearray(512)
    header[:6] = b"\x1f\x8b\x08abc"
    header[148:156] = b"        "
    header[148:155] = b"%06o\0" % sum(header)
    assert is_tar_header(bytes(header))
    assert compression_of(bytes(header)) == "none"
    assert not is_tar_header(bytes(512))


@pytest.mark.parametrize("kind", PACK)
def test_several_streams_back_to_back_are_one(kind: str) -> None:
    pack = PACK[kind]
    assert unpack(pack(b"one,") + pack(b"") + pack(DATA) + pack(b"end")) == b"one," + DATA + b"end"


def test_skippable_zstd_frames_say_nothing() -> None:
    """zstd:chunked has its table of contents in them (podman)."""
    assert unpack(SKIPPABLE + zstd(b"a") + SKIPPABLE + zstd(b"b") + SKIPPABLE) == b"ab"
    with pytest.raises(InvalidLayer, match="cut off"):
        unpack(zstd(b"a") + SKIPPABLE[:-1])


@pytest.mark.parametrize("level", [-5, 1, 3, 12])
@pytest.mark.parametrize("options", [{}, {"write_content_size": False}, {"write_checksum": True, "threads": 2}])
def test_every_zstd_frame_header(level: int, options: dict[str, int]) -> None:
    for data in (b"", b"x", NOISE, DATA, bytes(3 << 20)):
        assert unpack(zstandard.ZstdCompressor(level=level, **options).compress(data)) == data
        streamed = zstandard.ZstdCompressor(level=level, **options).compressobj()
        assert unpack(streamed.compress(data) + streamed.flush()) == data


@pytest.mark.parametrize("kind", PACK)
def test_a_stream_that_is_cut_off_says_so(kind: str) -> None:
    packed = PACK[kind](DATA)
    for length in (12, 100, len(packed) // 2, len(packed) - 1):
        with pytest.raises(InvalidLayer, match=f"layer: the {kind} stream is cut off"):
            unpack(packed[:length])


@pytest.mark.parametrize("kind", PACK)
def test_a_damaged_stream_says_so(kind: str) -> None:
    packed = bytearray(PACK[kind](DATA))
    packed[len(packed) // 2] ^= 0x55
    with pytest.raises(InvalidLayer, match=rf"layer: (damaged {kind} data|the {kind} stream is cut off|something else)"):
        unpack(bytes(packed))


def test_a_wrong_checksum_shows() -> None:
    packed = bytearray(gzip.compress(b"abc"))
    packed[-5] ^= 1
    with pytest.raises(InvalidLayer, match="checksum"):
        unpack(bytes(packed))
    frame = bytearray(zstd(b"abc"))
    frame[-1] ^= 1
    with pytest.raises(InvalidLayer, match="damaged zstd"):
        unpack(bytes(frame))


@pytest.mark.parametrize("kind", PACK)
def test_what_follows_the_end_is_an_error_unless_it_is_padding(kind: str) -> None:
    packed = PACK[kind](b"abc")
    assert unpack(packed + bytes(10_000)) == b"abc"
    with pytest.raises(InvalidLayer, match="something else follows"):
        unpack(packed + b"garbage")
    with pytest.raises(InvalidLayer, match="something else follows"):
        unpack(packed + bytes(600_000) + b"x")


def test_a_zstd_window_beyond_the_limit_is_unsupported() -> None:
    parameters = zstandard.ZstdCompressionParameters.from_level(3, window_log=28, write_content_size=False)
    big = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    with pytest.raises(Unsupported, match="128 MiB"):
        unpack(big.compress(b"x" * 1000) + big.flush())


def rle_bomb(blocks: int) -> bytes:
    """A zstd frame of 128 KiB a block, four bytes each: 32,000 times as much comes out as goes in."""
    header = b"\x28\xb5\x2f\xfd\x00\x58"  # window of 2 MiB
    block = ((128 << 10) << 3 | 1 << 1).to_bytes(3, "little") + b"\0"
    return header + block * (blocks - 1) + ((128 << 10) << 3 | 1 << 1 | 1).to_bytes(3, "little") + b"\0"


@pytest.mark.parametrize("packed", [rle_bomb(4000), gzip.compress(bytes(500 << 20), 9)], ids=["zstd", "gzip"])
def test_a_bomb_costs_no_memory(packed: bytes) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    total = 0
    for piece in decompressed(io.BytesIO(packed)):
        assert len(piece) <= OUTPUT
        total += len(piece)
    assert total == 500 << 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10


fragments = st.sampled_from([PACK["gzip"](b"abc" * 50), zstd(b"abc" * 50), SKIPPABLE, bytes(20), b"x", b"\x28\xb5\x2f\xfd"])


@settings(max_examples=300)
@given(st.lists(fragments | st.binary(max_size=8), max_size=4).map(b"".join), st.integers(0, 200), st.integers(0, 255))
def test_no_stream_ends_in_anything_but_bytes_or_our_error(data: bytes, at: int, value: int) -> None:
    if at < len(data):
        data = data[:at] + bytes([value]) + data[at + 1 :]
    with suppress(OverlaykitError):
        unpack(data)


# --- what goes out ----------------------------------------------------------------------------------------------------

texts = st.sampled_from([b"", b"x", b"abc" * 50, DATA, bytes(300_000), NOISE])


@settings(max_examples=300)
@given(texts, st.booleans(), st.booleans(), st.integers(4, 60), st.integers(0, 255), st.integers(0, 40))
def test_a_zstd_frame_that_is_taken_is_one_that_ends(
    data: bytes, sized: bool, summed: bool, at: int, value: int, cut: int
) -> None:
    """Of a damaged frame nothing is given as the whole that its decompressor would go on with."""
    options = {"write_content_size": sized, "write_checksum": summed}
    frame = bytearray(zstandard.ZstdCompressor(level=1, **options).compress(data))
    if at < len(frame):
        frame[at] = value
    packed = bytes(frame[: len(frame) - cut])
    try:
        found = unpack(packed)
    except OverlaykitError:
        return
    if packed[:4] != b"\x28\xb5\x2f\xfd":
        return  # cut off so early that it is no zstd
    whole = zstandard.ZstdDecompressor().decompressobj()
    assert whole.decompress(packed) == found
    assert whole.eof


@settings(max_examples=100)
@given(st.lists(st.tuples(texts, st.booleans(), st.booleans()), min_size=1, max_size=3), st.booleans())
def test_frames_without_their_checksums_give_the_same(frames: list[tuple[bytes, bool, bool]], checked: bool) -> None:
    packed = b"".join(
        zstandard.ZstdCompressor(level=1, write_content_size=sized, write_checksum=summed).compress(data)
        for data, sized, summed in frames
    )
    assert b"".join(decompressed(Trickle(packed), checked=checked)) == b"".join(data for data, _, _ in frames)


METHODS = ["none", "gzip", "igzip-0", "igzip-3", "gzip-1", "gzip-9", "zstd", "zstd-9"]


@pytest.mark.parametrize("text", METHODS)
def test_every_compressor_reads_back_and_is_deterministic(text: str) -> None:
    def pack() -> bytes:
        how = Compression.parse(text).compressor(threads=2)
        return how.compress(DATA[:700_000]) + how.compress(DATA[700_000:]) + how.flush()

    packed = pack()
    assert packed == pack()
    assert unpack(packed) == DATA
    kind = Compression.parse(text).kind
    assert compression_of(packed) == kind
    if kind == "gzip":
        assert packed[3:8] == bytes(5)  # no name, no time
        assert zlib.decompress(packed, 31) == DATA
        assert len(packed) < len(DATA) / 3
    if kind == "zstd":
        assert zstandard.ZstdDecompressor().decompressobj().decompress(packed) == DATA


@pytest.mark.parametrize(
    "bad", ["", "lz4", "gzip-0", "gzip-10", "igzip-4", "zstd-23", "none-1", "gzip-x", "gzip-", "zstd-²"]
)
def test_other_compressions_are_unsupported(bad: str) -> None:
    if bad == "gzip-":
        assert Compression.parse(bad) == Compression.parse("gzip")
        return
    with pytest.raises(Unsupported) as caught:
        Compression.parse(bad)
    assert "zstd-22" in caught.value.hint


# --- reading ahead ----------------------------------------------------------------------------------------------------

PACKED = PACK["gzip"](DATA)
DIFF_ID, BLOB = Digest.of(DATA), Digest.of(PACKED)


def stream(packed: bytes = PACKED, **options: object) -> LayerStream:
    return LayerStream(io.BytesIO(packed), **options)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert [t.name for t in threading.enumerate() if t.name.startswith("overlaykit")] == []


@pytest.mark.parametrize("kind", [*PACK, "plain"])
def test_a_layer_stream_tells_both_digests(kind: str) -> None:
    packed = PACK[kind](DATA) if kind in PACK else DATA
    with stream(packed, expected=Digest.of(packed), expected_size=len(packed), diff_id=DIFF_ID) as layer:
        assert layer.read() == DATA
        assert (layer.digest, layer.size) == (Digest.of(packed), len(packed))
        assert (layer.diff_id, layer.uncompressed_size) == (DIFF_ID, len(DATA))
        assert layer.compression == (kind if kind in PACK else "none")
        assert layer.read(1) == b""


def test_sha512_is_kept_apart_from_the_diff_id() -> None:
    with stream(DATA, expected=Digest.of(DATA, "sha512"), diff_id=DIFF_ID) as layer:
        layer.drain()
        assert layer.diff_id == DIFF_ID


@settings(max_examples=50)
@given(st.lists(st.tuples(st.sampled_from(["read", "read1", "readinto"]), st.integers(0, 1 << 20)), max_size=30))
def test_reads_of_any_size_give_the_same_bytes(reads: list[tuple[str, int]]) -> None:
    out = bytearray()
    with stream(diff_id=DIFF_ID) as layer:
        for how, n in reads:
            if how == "readinto":
                buffer = bytearray(n)
                got = layer.readinto(buffer)
                assert got == min(n, len(DATA) - len(out))
                out += buffer[:got]
            else:
                piece = getattr(layer, how)(n)
                assert len(piece) <= n
                out += piece
        out += layer.read()
    assert bytes(out) == DATA


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"diff_id": Digest.of(b"")}, DigestMismatch),
        ({"expected": Digest.of(b"")}, DigestMismatch),
        ({"expected": BLOB, "expected_size": len(PACKED) - 1}, SizeMismatch),
        ({"expected": BLOB, "expected_size": len(PACKED) + 1}, SizeMismatch),
        ({"max_size": len(DATA) - 1}, InvalidLayer),
    ],
)
def test_what_does_not_fit_comes_in_place_of_the_end(options: dict[str, object], error: type[Exception]) -> None:
    with stream(**options) as layer:
        with pytest.raises(error):
            layer.drain()
        with pytest.raises(error):  # and again, for whoever did not listen
            layer.read(1)


def test_the_limit_itself_is_allowed() -> None:
    with stream(max_size=len(DATA)) as layer:
        layer.drain()


@pytest.mark.parametrize("at", [0, 3, 100, len(PACKED) // 3, len(PACKED) - 1])
def test_damage_on_the_way_is_a_wrong_digest_and_not_a_bad_format(at: int) -> None:
    """A flipped bit in a kept blob was reported as "damaged gzip data", which sent people to whoever made the layer."""
    damaged = bytearray(PACKED)
    damaged[at] ^= 1
    layer = stream(bytes(damaged), expected=BLOB, expected_size=len(PACKED))
    with layer, pytest.raises(DigestMismatch, match=str(BLOB)):
        layer.drain()


def test_damage_that_only_the_digest_shows_is_a_wrong_digest() -> None:
    """zstd's checksum is not asked for where the plain bytes have a digest."""
    data = random.Random(1).randbytes(5000)  # is stored as it is
    damaged = bytearray(zstd(data))
    damaged[100] ^= 1
    with stream(bytes(damaged), diff_id=Digest.of(data)) as layer, pytest.raises(DigestMismatch, match="unpacks to"):
        layer.drain()


def test_an_error_of_the_source_reaches_the_reader_as_it_is() -> None:
    class Broken(io.RawIOBase):
        def read(self, n: int = -1, /) -> bytes:
            raise OSError(5, "Input/output error", "disk")

    with LayerStream(Broken()) as layer, pytest.raises(OSError, match="disk"):
        layer.read()


def test_closing_early_stops_the_thread_and_closes_the_source() -> None:
    source = io.BytesIO(gzip.compress(bytes(200 << 20), 1))
    with LayerStream(source) as layer:
        assert layer.read(10) == bytes(10)
        time.sleep(0.05)  # it now waits with a full queue
        assert len(layer._queue._items) <= DEPTH
    assert source.closed
    with pytest.raises(ValueError, match="closed"):
        layer.read(1)


def test_a_forgotten_stream_is_collected() -> None:
    source = io.BytesIO(gzip.compress(bytes(200 << 20), 1))
    layer = LayerStream(source)
    layer.read(10)
    thread = layer._thread
    del layer
    thread.join(60)
    assert source.closed


def test_a_stream_left_open_does_not_keep_the_interpreter() -> None:
    code = "import io, gzip; from overlaykit.oci.pipeline import LayerStream\n"
    code += "s = LayerStream(io.BytesIO(gzip.compress(bytes(100 << 20), 1))); s.read(1); print('done')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


def test_a_writer_left_open_does_not_keep_the_interpreter(tmp_path: Path) -> None:
    code = f"from overlaykit.oci import Layout, LayerWriter\nw = LayerWriter(Layout.create({str(tmp_path / 'x')!r}))\n"
    code += "w.write(bytes(100 << 20)); print('done')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")
    assert list((tmp_path / "x" / "ingest").iterdir()) == []


def test_ctrl_c_ends_a_reader_that_waits(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    code = "import sys; from overlaykit.oci.pipeline import LayerStream\n"
    code += f"f = open({str(pipe)!r}, 'rb', buffering=0)\n"
    code += "s = LayerStream(f)\ntry:\n print('reading', flush=True); s.read()\nexcept KeyboardInterrupt: print('stopped')"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process, pipe.open("wb"):
        assert process.stdout is not None
        assert process.stdout.readline() == "reading\n"
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "stopped\n"
        assert process.wait(60) == 0


def test_memory_stays_flat() -> None:
    packed = gzip.compress(bytes(400 << 20), 1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with stream(packed) as layer:
        buffer = bytearray(1 << 18)
        while layer.readinto(buffer):
            pass
        assert layer.uncompressed_size == 400 << 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 << 10


# --- writing behind ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", METHODS)
def test_a_compressing_writer_gives_the_same_bytes_however_it_is_fed(text: str) -> None:
    outputs = []
    for size in (1000, 70_001, len(DATA)):
        out = io.BytesIO()
        writer = CompressingWriter(out.write, Compression.parse(text))
        for begin in range(0, len(DATA), size):
            assert writer.write(memoryview(DATA)[begin : begin + size]) == len(DATA[begin : begin + size])
        writer.finish()
        assert (writer.diff_id, writer.uncompressed_size) == (DIFF_ID, len(DATA))
        outputs.append(out.getvalue())
    assert len(set(outputs)) == 1
    assert unpack(outputs[0]) == DATA


def test_an_error_of_the_sink_reaches_the_writer() -> None:
    def full(data: bytes) -> None:
        raise OSError(28, "No space left on device", "blob")

    writer = CompressingWriter(full, Compression.parse("none"))
    with pytest.raises(OSError, match="No space"):
        copy_stream(io.BytesIO(bytes(20 << 20)), writer)
    writer.close()
    short = CompressingWriter(full, Compression.parse("none"))
    short.write(b"little")
    with pytest.raises(OSError, match="No space"):
        short.finish()


def test_a_writer_that_gives_up_leaves_no_thread() -> None:
    out = io.BytesIO()
    with CompressingWriter(out.write, Compression.parse("zstd")) as writer:
        writer.write(bytes(10 << 20))
    assert writer.closed
    with pytest.raises(ValueError, match="closed"):
        writer.write(b"x")
