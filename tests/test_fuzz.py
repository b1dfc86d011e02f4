"""A short run of fuzz_tar.py, and what longer ones found: each input a story, and the promise it broke."""

from __future__ import annotations

import math
import os
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from fuzz_tar import SCRATCH, Place, corpus, mutate, reached, run, with_checksums
from tars import END, header, member, pax

from overlaykit.errors import InvalidLayer
from overlaykit.tree import Kind, Tree


@pytest.fixture
def place() -> Iterator[Place]:
    with tempfile.TemporaryDirectory(dir=SCRATCH) as folder:
        yield Place(Path(folder))


def test_random_damage_breaks_no_promise() -> None:
    seed = int(os.environ.get("FUZZ_SEED", "1"))  # so that a failure is of the change at hand, however fast the machine
    tried, failures = run(math.inf, seed, limit=1000)
    assert not failures, f"FUZZ_SEED={seed}"
    assert tried == 1000


def test_the_corpus_is_read_and_damage_does_not_always_end_it(place: Place) -> None:
    """Otherwise the fuzzer would only ever see one error message."""
    assert all(isinstance(tree, Tree) for seed in corpus() for tree in place.check(seed))
    rng = random.Random(0)
    outcomes = [place.check(mutate(rng, rng.choice(corpus()), corpus()))[0] for _ in range(200)]
    assert 40 < sum(isinstance(outcome, Tree) for outcome in outcomes) < 180


def test_what_the_guided_fuzzer_reached_keeps_the_promises(place: Place) -> None:
    inputs = reached()
    outcomes = [place.check(with_checksums(data))[0] for data in inputs]
    assert len(inputs) > 100
    assert {isinstance(outcome, Tree) for outcome in outcomes} == {True, False}


SPARSE = {"GNU__sparse__size": "9", "GNU__sparse__map": "0,3"}
STORIES = {
    "A sparse file of mode 0 kept the mode it was made with: 0600.": pax(**SPARSE) + member("s", b"abc", mode=0),
    "A device 0:0 is not made, but a file of the same path stayed on disk.": member("x", b"1") + header("x", "3"),
    "The same below a symlink.": header("l", "2", link="d") + member("l/x", b"1") + header("d/x", "3"),
    "A whiteout that was a hard link was looked for among the files: KeyError.": header(".wh.b", "1", link="a"),
    "A hard link to a device 0:0 was made, to nothing: ENOENT.": header("a", "3") + header("b", "1", link="a"),
    "Sparse records before a fifo opened it for writing, and waited for a reader.": pax(**SPARSE) + header("p", "6"),
    "Before a hard link they made a block device 0:0.": pax(**SPARSE) + header("b", "1", link="a") + member("a"),
    "A sparse size beyond int64: OverflowError.": pax(GNU__sparse__size="9223372036854775808") + header("s"),
    "An xattr in bad base64: binascii.Error.": pax(LIBARCHIVE__xattr__user__k="A") + header("f"),
    "An xattr's name with a NUL: ValueError from setxattr.": pax(SCHILY__xattr__user__k="").replace(b".k", b"\0k")
    + header("f"),
    "A symlink that a directory replaced: what was below it lay elsewhere on disk than in the tree.": (
        header("l", "2", link="d") + member("l/x", b"1") + header("l", "5") + member("l/y", b"1")
    ),
    "A directory that a file replaced for a while: its old names were in the tree, and not on disk.": (
        member("d/x", b"1") + member("d", b"1") + header("d", "5") + member("d/y", b"1")
    ),
    "An earlier entry in a hard link's place: EEXIST.": member("a", b"1") + member("b", b"2") + header("b", "1", link="a"),
    "A sparse file and then another of its name, in one window: the sparse one won.": (
        pax(**SPARSE) + member("s", b"abc") + member("s", b"later")
    ),
    "A sparse file below a symlink: ENOTDIR.": header("l", "2", link="d") + pax(**SPARSE) + member("l/s", b"abc"),
    "A sparse file's map that is none left its descriptor open.": pax(GNU__sparse__map="5,x") + member("s", b"abc"),
    "A sparse file with less content than its map says likewise.": pax(GNU__sparse__map="0,9") + member("s", b"abc"),
}


@pytest.mark.parametrize("data", STORIES.values(), ids=STORIES)
def test_what_the_fuzzer_found_stays_fixed(place: Place, data: bytes) -> None:
    indexed, applied = place.check(data + END)
    assert isinstance(indexed, (Tree, InvalidLayer))
    if isinstance(indexed, Tree):
        false = ((indexed.kind == Kind.CHAR) & (indexed.rdev == 0)).any()
        assert false or isinstance(applied, Exception) or applied == indexed
