"""Random damage to layer tars: whatever the bytes, index_tar and apply_layer give a Tree or say what is wrong, and nothing
outside the directory changes.

    python tests/fuzz_tar.py --seconds 900 [--seed N] [--keep DIR]   random mutation, any build
    python tests/fuzz_tar.py --atheris DIR [libFuzzer's options]     guided by coverage, with atheris from PyPI; DIR: corpus

Random mutation is worth most on a build with OVERLAYKIT_ASAN=1: LD_PRELOAD=libasan.so ASAN_OPTIONS=detect_leaks=0
PYTHONMALLOC=malloc. Inputs that break a promise are written to DIR; each becomes a test in test_fuzz.py once its bug is
fixed.

The guided one needs the kernels built by clang, and their coverage in libFuzzer's hands:

    CC=clang OVERLAYKIT_FUZZ=1 python setup.py build_ext --inplace
    export LD_PRELOAD=.../site-packages/asan_with_fuzzer.so ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1
    PYTHONMALLOC=malloc python tests/fuzz_tar.py --atheris DIR -max_len=65536 -max_total_time=3600

It says "Loaded 12 modules" if that is so. What DIR held after the last hours of it is in corpus.tar.zst.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import zstandard
from tars import header, member, padded, pax, record

from overlaykit.errors import InvalidLayer
from overlaykit.overlay.apply import apply_layer
from overlaykit.tree import Entry, Flag, Kind, Tree, WhiteoutFormat, index_tar, scan

BLOCK = 512
REACHED = Path(__file__).with_name("corpus.tar.zst")
SCRATCH = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
FORM = WhiteoutFormat.OVERLAY if os.geteuid() == 0 else WhiteoutFormat.USERXATTR
A_WHILE = 60  # seconds in which any small tar is done with, sanitizers and a busy machine allowed for
FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
NAMES = ["a", "b", "a/b", "a/b/c", ".wh.a", "a/.wh.b", "a/.wh..wh..opq", ".wh..wh..opq", "l/x", "../x", "/a", ".", "n" * 120]
TYPES = b"0123456SLKgxD7V\0"
KEYS = ["path", "linkpath", "size", "mtime", "uid", "gid", "SCHILY.xattr.user.k", "SCHILY.xattr.", "LIBARCHIVE.xattr.user.k"]
KEYS += [f"GNU.sparse.{key}" for key in ("map", "major", "realsize", "size", "offset", "numbytes", "name")]
VALUES = [b"", b"0", b"1", b"a", b"-1.5", b"99999999999999999999", b"9223372036854775807", b"0,5,3", b"A", b"../a", b"a/b"]
VALUES += [b"\0", b"\xff\n="]


# --- what is promised -------------------------------------------------------------------------------------------------


class Broken(AssertionError):
    """A promise that did not hold."""


class Place:
    """A directory to unpack into, with a neighbour whose state must never change."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.target = base / "target"
        (base / "neighbour").mkdir()
        (base / "neighbour" / "file").write_text("as it was\n")
        os.utime(base / "neighbour" / "file", ns=(0, 0))
        self.before = self._neighbours()

    def _neighbours(self) -> list[tuple[object, ...]]:
        found = []
        for path in sorted(self.base.rglob("*")):
            if self.target != path and self.target not in path.parents:
                st = path.lstat()
                found.append((path, st.st_mode, st.st_uid, st.st_size, st.st_nlink))
        return found

    def check(self, data: bytes) -> tuple[Tree | Exception, Tree | Exception]:
        """What index_tar and apply_layer say about `data`. Broken if anything but an honest answer comes of it."""
        fds = len(os.listdir("/proc/self/fd"))
        indexed = outcome(lambda: index_tar(io.BytesIO(data)), InvalidLayer)
        self.target.mkdir()
        try:
            applied = outcome(
                lambda: apply_layer(io.BytesIO(data), self.target, whiteouts=FORM, losses=[]), InvalidLayer, OSError
            )
            if self._neighbours() != self.before:
                raise Broken("something outside the target changed")
            if len(os.listdir("/proc/self/fd")) > fds:  # fewer: something of before was collected
                raise Broken("a descriptor stayed open")
            if isinstance(applied, Tree):
                if isinstance(indexed, Exception):
                    raise Broken(f"unpacked, but not indexed: {indexed}")
                # Devices 0:0 are refused, copies of lower files have none to copy: all else is one and the same.
                if applied != indexed and not ((indexed.kind == Kind.CHAR) & (indexed.rdev == 0)).any():
                    raise Broken("apply_layer and index_tar see different trees")
                if os.geteuid() == 0:
                    compare(applied, scan(self.target, whiteouts=WhiteoutFormat.OVERLAY))
        finally:
            clear(self.target)
        return indexed, applied


def compare(tree: Tree, disk: Tree) -> None:
    """Broken unless both say the same, whatever the file system keeps of xattrs, implied directories and times."""
    covered = [False] * len(tree)
    for row in ((tree.flags & Flag.OPAQUE) != 0).nonzero()[0].tolist():
        end = int(tree.ends[row])
        covered[row + 1 : end] = [True] * (end - row - 1)
    implied = {e.path for e in tree if e.flags & Flag.IMPLIED}

    def facts(e: Entry) -> tuple[object, ...]:
        owner = (0, 0, 0) if e.path in implied else (e.mode, e.uid, e.gid)
        return e.path, e.kind.name, e.size, e.link, e.rdev, e.flags & Flag.OPAQUE, *owner

    # Below an opaque directory no whiteouts are made.
    said = [facts(e) for e, hidden in zip(tree, covered, strict=True) if not (hidden and e.kind == Kind.WHITEOUT)]
    there = [facts(e) for e in disk]
    if said != there:
        raise Broken(f"tree: {[x for x in said if x not in there]}, disk: {[x for x in there if x not in said]}")


def outcome(act: Callable[[], Tree], *honest: type[Exception]) -> Tree | Exception:
    """The Tree or the error of `act`; Broken for an error of another type, one without words, or none in time."""

    def late(*_: object) -> None:
        raise Broken(f"not done after {A_WHILE} seconds")

    previous = signal.signal(signal.SIGALRM, late)
    signal.alarm(A_WHILE)
    try:
        return act()
    except honest as e:
        if isinstance(e, OSError) and (e.filename is None or not e.strerror):
            raise Broken(f"an error without a path: {e!r}") from e
        if not str(e):
            raise Broken(f"an error without words: {e!r}") from e
        return e
    except Broken:
        raise
    except Exception as e:
        raise Broken(f"{type(e).__name__}: {e}") from e
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def clear(directory: Path) -> None:
    """rmtree of what may be deeper than Python recurses, or closed to its owner."""
    try:
        shutil.rmtree(directory)
    except (RecursionError, OSError):
        subprocess.run(["chmod", "-R", "u+rwx", directory], check=False)
        subprocess.run(["rm", "-rf", directory], check=True)


# --- inputs -----------------------------------------------------------------------------------------------------------


def corpus() -> list[bytes]:
    """Small tars with every form of header that the parser knows."""
    seeds = []
    for form in FORMATS:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
            for name, kind, link, size in [
                (".", tarfile.DIRTYPE, "", 0),
                ("d", tarfile.DIRTYPE, "", 0),
                ("d/f", tarfile.REGTYPE, "", 700),
                ("d/h", tarfile.LNKTYPE, "d/f", 0),
                ("l", tarfile.SYMTYPE, "d", 0),
                ("l/x", tarfile.REGTYPE, "", 3),
                ("d/.wh.gone", tarfile.REGTYPE, "", 0),
                ("e/.wh..wh..opq", tarfile.REGTYPE, "", 0),
                ("null", tarfile.CHRTYPE, "", 0),
                ("pipe", tarfile.FIFOTYPE, "", 0),
                ("n" * 90 + "/" + "m" * (9 if form == tarfile.USTAR_FORMAT else 120), tarfile.REGTYPE, "", 1),
            ]:
                info = tarfile.TarInfo(name)
                info.type, info.linkname, info.size, info.mtime, info.mode = kind, link, size, 1_600_000_000, 0o755
                if form == tarfile.PAX_FORMAT and name in ("d/f", "l"):
                    info.pax_headers = {"SCHILY.xattr.user.k": "v" * 20, "mtime": "1.25", "comment": "none"}
                tar.addfile(info, io.BytesIO(b"x" * size))
        seeds.append(buffer.getvalue().rstrip(b"\0") + bytes(BLOCK * 3))
    body = padded(b"2\n0\n3\n4000\n2\n") + b"abcde"
    name = {"GNU__sparse__name": "s", "GNU__sparse__realsize": "5000"}
    seeds.append(pax(GNU__sparse__major="1", GNU__sparse__minor="0", **name) + member("GNUSparseFile.0/s", body))
    seeds.append(pax(GNU__sparse__size="5000", GNU__sparse__map="0,3,4000,2") + member("s", b"abcde"))
    pieces = [("size", "5000"), ("offset", "0"), ("numbytes", "3"), ("offset", "4000"), ("numbytes", "2")]
    seeds.append(
        member("PaxHeaders/s", b"".join(record(f"GNU.sparse.{k}", v) for k, v in pieces), "x") + member("s", b"abcde")
    )
    sparse = bytes(41) + b"%011o\0%011o\0" % (0, 3) + b"%011o\0%011o\0" % (4000, 2) + bytes(48 + 1) + b"%011o\0" % 5000
    seeds.append(header("s", "S", 5, magic=b"ustar  \0", tail=sparse) + padded(b"abcde"))
    seeds.append(member("././@LongLink", b"p" * 200 + b"\0", "L") + member("ppp", b"1"))
    seeds.append(pax("g", mtime="1234567890.5") + member("f", b"1") + pax(LIBARCHIVE__xattr__user__k="QQ==") + header("g"))
    seeds.append(
        member("a", b"1") + header("b", "1", link="a") + header("c", "1", link="b") + header("d/.wh.x", "1", link="a")
    )
    return seeds


def sealed(block: bytearray) -> bytes:
    """The block with its checksum made right."""
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def headers(data: bytes | bytearray) -> list[int]:
    """Where blocks that look like headers begin."""
    return [
        at for at in range(0, len(data) - BLOCK + 1, BLOCK) if data[at + 257 : at + 262] == b"ustar" or not data[at + 148]
    ]


def mutate(rng: random.Random, data: bytes, others: list[bytes]) -> bytes:
    """`data` with a few things wrong; mostly the checksums are made right again, or nothing would be looked at further."""
    broken = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 3, 6])):
        rng.choice(MUTATIONS)(rng, broken, others)
    if rng.random() < 0.9:
        for at in headers(broken):
            if any(broken[at : at + BLOCK]):
                broken[at : at + BLOCK] = sealed(broken[at : at + BLOCK])
    return bytes(broken)


def _flip(rng: random.Random, data: bytearray, _: list[bytes]) -> None:
    if data:
        data[rng.randrange(len(data))] = rng.choice([0, 1, 0x20, 0x2F, 0x2E, 0x37, 0x80, 0xFF, rng.randrange(256)])


def _field(rng: random.Random, data: bytearray, _: list[bytes]) -> None:
    places = headers(data)
    if not places:
        return
    at = rng.choice(places)
    offset, width = rng.choice(
        [(100, 8), (108, 8), (116, 8), (124, 12), (136, 12), (329, 8), (337, 8), (483, 12), (386, 12)]
    )
    number = rng.choice([0, 1, 511, 512, 513, 1 << 20, 8**11 - 1, rng.randrange(1 << 40)])
    forms = [
        b"%0*o\0" % (width - 1, number % 8 ** (width - 1)),
        b"\x80" + number.to_bytes(width - 1, "big"),
        b"\xff" * width,
        b"\x80" + b"\xff" * (width - 1),
        b"9" * width,
        b"",
        b"-1",
    ]
    data[at + offset : at + offset + width] = rng.choice(forms)[:width].ljust(width, b"\0")


def _type(rng: random.Random, data: bytearray, _: list[bytes]) -> None:
    places = headers(data)
    if places:
        data[rng.choice(places) + 156] = rng.choice(TYPES)


def _name(rng: random.Random, data: bytearray, _: list[bytes]) -> None:
    places = headers(data)
    if places:
        at = rng.choice(places) + rng.choice([0, 0, 157])
        data[at : at + 100] = rng.choice(NAMES).encode()[:100].ljust(100, b"\0")


def _records(rng: random.Random, data: bytearray, _: list[bytes]) -> None:
    places = [at for at in headers(data) if data[at + 156 : at + 157] in (b"x", b"g")]
    if not places:
        return
    at = rng.choice(places)
    records = b""
    for _ in range(rng.randrange(4)):
        key, value = rng.choice(KEYS).encode(), rng.choice(VALUES)
        bare = len(key) + len(value) + 3
        records += b"%d %s=%s\n" % (bare + len(str(bare + len(str(bare)))), key, value)
    field = bytes(data[at + 124 : at + 135])
    old = (0 if field.strip(b"01234567") else int(field or b"0", 8)) + BLOCK - 1
    data[at + 124 : at + 136] = b"%011o\0" % len(records)
    data[at + BLOCK : at + BLOCK + old // BLOCK * BLOCK] = records + bytes(-len(records) % BLOCK)


def _cut(rng: random.Random, data: bytearray, _: list[bytes]) -> None:
    del data[rng.randrange(len(data) + 1) :]


def _drop(rng: random.Random, data: bytearray, _: list[bytes]) -> None:
    at = rng.randrange(len(data) // BLOCK + 1) * BLOCK
    del data[at : at + BLOCK * rng.choice([1, 1, 2, 3])]


def _repeat(rng: random.Random, data: bytearray, _: list[bytes]) -> None:
    at, to = (rng.randrange(len(data) // BLOCK + 1) * BLOCK for _ in range(2))
    data[to:to] = data[at : at + BLOCK * rng.choice([1, 2, 3, 5])]


def _splice(rng: random.Random, data: bytearray, others: list[bytes]) -> None:
    other = rng.choice(others)
    at = rng.randrange(len(data) // BLOCK + 1) * BLOCK
    data[at:at] = other[: rng.randrange(len(other) // BLOCK + 1) * BLOCK]


MUTATIONS = [_flip, _flip, _field, _field, _type, _name, _name, _records, _cut, _drop, _repeat, _splice]


# --- running ----------------------------------------------------------------------------------------------------------


def run(seconds: float, seed: int, keep: Path | None = None, *, limit: int | None = None) -> tuple[int, list[str]]:
    """(inputs tried, what broke): random inputs from `seed` for that long, or `limit` of them."""
    rng = random.Random(seed)
    seeds = corpus()
    pool = list(seeds)
    failures: dict[str, str] = {}
    tried, end = 0, time.monotonic() + seconds
    with tempfile.TemporaryDirectory(dir=SCRATCH) as base:
        place = Place(Path(base))
        while time.monotonic() < end and (limit is None or tried < limit):
            data = mutate(rng, rng.choice(pool), seeds)
            tried += 1
            if keep:  # what kills the process is the last one
                (keep / "last.tar").write_bytes(data)
            try:
                indexed, _ = place.check(data)
            except Broken as e:
                cause = traceback.extract_tb((e.__cause__ or e).__traceback__)[-1]
                story = f"{e} ({Path(cause.filename).name}:{cause.lineno})"
                if (where := f"{cause.filename}:{cause.lineno}") not in failures:
                    failures[where] = story
                    if keep:
                        (keep / f"{hashlib.sha256(data).hexdigest()[:12]}.tar").write_bytes(data)
                    print(f"{tried}: {story}", flush=True)
                continue
            if isinstance(indexed, Tree) and len(data) < 20_000 and rng.random() < 0.02:
                pool.append(data)  # what is still a layer is worth more damage
                del pool[len(seeds) : max(len(seeds), len(pool) - 400)]
    return tried, list(failures.values())


def with_checksums(data: bytes) -> bytes:
    """`data` with every header's checksum right, so that not all damage ends there."""
    broken = bytearray(data)
    for at in headers(broken):
        if any(broken[at : at + BLOCK]):
            broken[at : at + BLOCK] = sealed(broken[at : at + BLOCK])
    return bytes(broken)


def reached() -> list[bytes]:
    """The inputs by which the guided fuzzer came to all the code that it has reached."""
    with (
        open(REACHED, "rb") as file,
        zstandard.ZstdDecompressor(max_window_size=1 << 27).stream_reader(file) as plain,
        tarfile.open(fileobj=plain, mode="r|") as archive,
    ):
        return [archive.extractfile(member).read() for member in archive]  # type: ignore[union-attr]


def guided(argv: list[str]) -> None:
    """Inputs by atheris, for ever."""
    import atheris

    with tempfile.TemporaryDirectory(dir=SCRATCH) as base, tempfile.TemporaryDirectory(dir=SCRATCH) as seeds:
        for i, data in enumerate(corpus()):
            (Path(seeds) / f"seed{i}").write_bytes(data)
        place = Place(Path(base))

        def one(data: bytes) -> None:
            place.check(with_checksums(data))

        def other(data: bytes, most: int, seed: int) -> bytes:
            """Half of the damage by who knows tars, half by who knows what was not reached yet."""
            rng = random.Random(seed)
            changed = mutate(rng, data, known) if rng.random() < 0.5 else atheris.Mutate(data, most)
            return bytes(changed[:most])

        known = corpus()
        # No -timeout of libFuzzer's: it takes the alarm that `outcome` sets.
        atheris.Setup([*argv, "-timeout=0", seeds], one, custom_mutator=other)
        atheris.Fuzz()


def main() -> int:
    if "--atheris" in sys.argv:
        guided([a for a in sys.argv if a != "--atheris"])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path)
    options = parser.parse_args()
    if options.keep:
        options.keep.mkdir(parents=True, exist_ok=True)
    tried, failures = run(options.seconds, options.seed, options.keep)
    print(f"{tried} inputs, {len(failures)} kinds of failure")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
