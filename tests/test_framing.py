"""Compressed blobs as they come: every field that a frame may have and every way to end too early, beside gzip and zstd."""

from __future__ import annotations

import gzip
import io
import struct
import subprocess
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import imagefiles
import peers
import pytest
import zstandard
from kernel_overlay import SCRATCH
from treetext import below_root, listing

from overlaykit.errors import InvalidLayer, OverlaykitError, Unsupported
from overlaykit.oci.disk import apply_layer
from overlaykit.oci.streams import decompressed

DATA = b"".join(b"line %d of what is packed\n" % number for number in range(3000))


def by(program: str, data: bytes, *options: str, check: bool = True) -> bytes:
    """What the filter makes of `data`; b"refused" if it ends with an error and `check` is not set."""
    done = subprocess.run([peers.peer(program), *options], input=data, capture_output=True, check=check)
    return done.stdout if done.returncode == 0 else b"refused"


def here(data: bytes) -> bytes:
    try:
        return b"".join(decompressed(io.BytesIO(data)))
    except OverlaykitError:
        return b"refused"


# --- gzip -------------------------------------------------------------------------------------------------------------

TEXT, HCRC, EXTRA, NAME, COMMENT = 1, 2, 4, 8, 16  # RFC 1952, 2.3


def member(data: bytes = DATA, *, flags: int = 0, level: int = 6, crc: int | None = None, isize: int | None = None) -> bytes:
    """A gzip member with the header fields that `flags` ask for."""
    head = struct.pack("<4BIBB", 0x1F, 0x8B, 8, flags, 1_600_000_000, 2, 255)
    if flags & EXTRA:
        extra = b"Ap" + struct.pack("<H", 5) + b"hello" + b"ZZ" + struct.pack("<H", 700) + bytes(700)
        head += struct.pack("<H", len(extra)) + extra
    if flags & NAME:
        head += b"n" * 3000 + b".tar\0"
    if flags & COMMENT:
        head += "ein Kommentar mit Zeichen: \u00e4".encode("latin-1") + b"\0"
    if flags & HCRC:
        head += struct.pack("<H", zlib.crc32(head) & 0xFFFF)
    packer = zlib.compressobj(level, zlib.DEFLATED, -15)
    body = packer.compress(data) + packer.flush()
    crc = zlib.crc32(data) if crc is None else crc
    return head + body + struct.pack("<II", crc, len(data) if isize is None else isize)


@pytest.mark.parametrize("flags", range(32))
def test_every_gzip_header_is_read_as_gzip_does(flags: int) -> None:
    """One longer than the first 512 bytes, which are looked at by themselves, was damaged data if it had several fields."""
    packed = member(flags=flags)
    assert here(packed) == DATA
    assert here(packed + member(b"", flags=flags) + packed) == DATA * 2
    if not flags & HCRC:  # gzip(1) has never known that field
        assert by("gzip", packed, "-dc") == DATA


GZIPS = {
    "stored": member(level=0),
    "nothing": member(b""),
    "three members, one of nothing": member(b"a") + member(b"") + member(b"b"),
    "zeros behind": member() + bytes(5000),
    "a wrong checksum": member(crc=1),
    "a wrong length": member(isize=1),
    "a wrong checksum in a later member": member() + member(crc=1),
    "a method that is not deflate": b"\x1f\x8b\x07" + member()[3:],
    "cut off in the header": member(flags=NAME)[:500],
    "cut off in the data": member()[:1000],
    "cut off in the checksum": member()[:-6],
    "a later member cut off in its header": member() + member()[:5],
}


@pytest.mark.parametrize("what", GZIPS)
def test_gzip_and_we_agree(what: str) -> None:
    theirs = by("gzip", GZIPS[what], "-dc", check=False)
    ours = here(GZIPS[what])
    if what == "a method that is not deflate":  # to us no gzip stream at all, and then no tar either
        assert (theirs, ours) == (b"refused", GZIPS[what])
    else:
        assert ours == theirs


@pytest.mark.parametrize("options", [["-1"], ["-9"], ["-n"], ["--rsyncable"]])
def test_what_gzip_packs_is_read(options: list[str], tmp_path: Path) -> None:
    assert here(by("gzip", DATA, *options, "-c")) == DATA
    (tmp_path / "a name").write_bytes(DATA)
    peers.run("gzip", *options, tmp_path / "a name")
    assert here((tmp_path / "a name.gz").read_bytes() * 2) == DATA * 2


# --- zstd -------------------------------------------------------------------------------------------------------------


def skippable(data: bytes, nibble: int = 0) -> bytes:
    return struct.pack("<II", 0x184D2A50 + nibble, len(data)) + data


@pytest.mark.parametrize(
    "options",
    [["-1"], ["-19"], ["--no-check"], ["--fast=5"], ["-T2"], ["--long=27"], ["--rsyncable", "-T2"]],
)
@pytest.mark.parametrize("size", [0, 1, 1000, len(DATA), 4 << 20])
def test_what_zstd_packs_is_read(options: list[str], size: int) -> None:
    data = (DATA * 60)[:size]
    packed = by("zstd", data, *options, "-qc")  # from a pipe: no content size
    assert here(packed) == data
    assert here(skippable(b"", 15) + packed + skippable(packed, 3) + packed) == data * 2


def test_zstds_largest_window_is_read() -> None:
    assert here(by("zstd", DATA, "--ultra", "-22", "-qc")) == DATA  # 128 MiB: all that the limit allows


def frame(data: bytes = DATA) -> bytes:
    return zstandard.ZstdCompressor(write_checksum=True).compress(data)


def with_dictionary() -> bytes:
    samples = [b"sample %d of a dictionary, %d" % (i, i * i) for i in range(5000)]
    return zstandard.ZstdCompressor(dict_data=zstandard.train_dictionary(2000, samples)).compress(DATA)


ZSTDS = {
    "nothing": frame(b""),
    "three frames, one of nothing": frame(b"a") + frame(b"") + frame(b"b"),
    "a skippable frame alone": skippable(b"hello"),
    "a skippable frame of nothing": skippable(b"") + frame(),
    "a skippable frame that is cut off": frame() + skippable(b"hello")[:-1],
    "a skippable frame longer than any file": frame() + struct.pack("<II", 0x184D2A50, 0xFFFFFFFF),
    "a wrong checksum": frame()[:-1] + bytes([frame()[-1] ^ 1]),
    "cut off in the header": frame()[:5],
    "cut off in the data": frame()[:200],
    "cut off in the checksum": frame()[:-2],
    "a later frame cut off in its header": frame() + frame()[:3],
    "garbage behind": frame() + b"garbage",
    "a reserved bit": frame()[:4] + bytes([frame()[4] | 8]) + frame()[5:],
    "a dictionary that nobody has": with_dictionary(),
}


@pytest.mark.parametrize("what", ZSTDS)
def test_zstd_and_we_agree(what: str) -> None:
    assert here(ZSTDS[what]) == by("zstd", ZSTDS[what], "-dqc", check=False)


@pytest.mark.parametrize("what", ZSTDS)
def test_who_compares_the_digest_gets_the_same_but_for_the_checksum(what: str) -> None:
    try:
        given = b"".join(decompressed(io.BytesIO(ZSTDS[what]), checked=True))
    except OverlaykitError:
        given = b"refused"
    assert given == (DATA if what == "a wrong checksum" else here(ZSTDS[what]))


def test_zeros_behind_a_zstd_frame_are_padding_to_us() -> None:
    """As behind gzip, where all take them for that; zstd(1) does not."""
    assert here(frame() + bytes(600)) == DATA
    assert by("zstd", frame() + bytes(600), "-dqc", check=False) == b"refused"


@pytest.mark.parametrize("window", [28, 31])
def test_a_window_beyond_zstds_own_limit_is_refused_by_name_as_zstd_does(window: int) -> None:
    packed = by("zstd", DATA, f"--long={window}", "-1", "-qc")
    assert by("zstd", packed, "-dqc", check=False) == b"refused"
    with pytest.raises(Unsupported, match="layer: zstd data that needs more than 128 MiB") as caught:
        b"".join(decompressed(io.BytesIO(packed)))
    assert "--long" in caught.value.hint


# --- cut off anywhere -------------------------------------------------------------------------------------------------

LAYER = imagefiles.layer(
    {"etc": None, "etc/motd": b"welcome\n" * 9, "etc/.wh.old": b"", "new": b"n", "srv": None, "srv/x": b"x"}
)
HALVES = LAYER[:2100], LAYER[2100:]
BLOBS = {
    "gzip": gzip.compress(LAYER, mtime=0),
    "gzip with all that a header can have": member(LAYER, flags=31),
    "two gzip members": gzip.compress(HALVES[0], mtime=0) + gzip.compress(HALVES[1], mtime=0),
    "zstd": frame(LAYER),
    "two zstd frames": frame(HALVES[0]) + skippable(b"between") + frame(HALVES[1]),
}


@pytest.fixture
def home() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=SCRATCH) as folder:
        home = Path(folder, "home")
        (home / "etc").mkdir(parents=True)
        (home / "etc/old").write_bytes(b"old\n")
        yield home


@pytest.mark.parametrize("what", BLOBS)
def test_a_blob_cut_off_at_any_byte_changes_nothing(what: str, home: Path) -> None:
    blob = BLOBS[what]
    before = listing(home)
    step = max(1, len(blob) // 600)
    for size in range(1, len(blob), step):
        with pytest.raises(InvalidLayer):
            apply_layer(io.BytesIO(blob[:size]), home)
        assert listing(home) == before, size
        assert [path.name for path in home.parent.iterdir()] == ["home"]
    apply_layer(io.BytesIO(blob), home)
    assert sorted(below_root(listing(home))) == ["/etc", "/etc/motd", "/new", "/srv", "/srv/x"]
