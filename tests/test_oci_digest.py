"""Digests, and readers that hold bytes to them."""

from __future__ import annotations

import hashlib
import io
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overlaykit.errors import DigestMismatch, InvalidReference, SizeMismatch
from overlaykit.oci.digest import Digest, DigestingReader, Prefixed, Tee, VerifyingReader, chain_ids

DATA = bytes(range(256)) * 40
HEX = hashlib.sha256(DATA).hexdigest()


class Trickle(io.BytesIO):
    """Gives three bytes at most a read, as a socket may, and says how often it was closed."""

    def read(self, n: int | None = -1, /) -> bytes:
        return super().read(3 if n is None or n < 0 else min(n, 3))


def reader(data: bytes = DATA, *, size: int | None = None, drain: bool = False) -> VerifyingReader:
    return VerifyingReader(io.BytesIO(data), Digest(f"sha256:{HEX}"), size, drain_on_close=drain)


# --- Digest -----------------------------------------------------------------------------------------------------------


def test_a_digest_is_a_checked_string() -> None:
    digest = Digest(f"sha256:{HEX}")
    assert digest == f"sha256:{HEX}" == Digest.of(DATA)
    assert (digest.algorithm, digest.encoded, digest.short) == ("sha256", HEX, HEX[:12])
    assert Digest.of(DATA, "sha512").encoded == hashlib.sha512(DATA).hexdigest()
    assert pickle.loads(pickle.dumps(digest)) == digest


@pytest.mark.parametrize(
    "bad",
    ["", "sha256:", HEX, f"sha256:{HEX}\n", f"sha256:{HEX.upper()}", f"sha256:{HEX}0", f"md5:{HEX}", f"sha512:{HEX}"],
)
def test_what_is_no_digest_is_refused(bad: str) -> None:
    with pytest.raises(InvalidReference, match="no digest"):
        Digest(bad)


@given(st.text(max_size=80))
def test_no_other_text_is_a_digest(text: str) -> None:
    with pytest.raises(ValueError):
        Digest(text)


def test_chain_ids_follow_the_spec() -> None:
    a, b, c = (Digest.of(x) for x in (b"a", b"b", b"c"))
    ab = Digest.of(f"{a} {b}".encode())
    assert chain_ids([a, b, c]) == [a, ab, Digest.of(f"{ab} {c}".encode())]
    assert chain_ids([]) == []


# --- readers ----------------------------------------------------------------------------------------------------------


def test_a_digesting_reader_hashes_what_it_gives() -> None:
    with DigestingReader(Trickle(DATA)) as stream:
        assert stream.read(5) == DATA[:3]
        buffer = bytearray(2)
        assert stream.readinto(buffer) == 2
        assert bytes(buffer) == DATA[3:5]
        assert stream.read() == DATA[5:]
        assert (stream.digest, stream.size) == (f"sha256:{HEX}", len(DATA))


@given(st.binary(max_size=100), st.lists(st.integers(0, 20)), st.booleans())
def test_a_verifying_reader_gives_the_bytes_whatever_the_pieces(data: bytes, sizes: list[int], sized: bool) -> None:
    stream = VerifyingReader(io.BytesIO(data), Digest.of(data), len(data) if sized else None)
    out = b"".join(stream.read(n) for n in sizes) + stream.read()
    assert out == data
    assert stream.verified
    assert stream.read(1) == b""


def test_a_wrong_digest_shows_at_the_end() -> None:
    with reader(DATA[:-1] + b"x") as stream:
        assert stream.read(100) == DATA[:100]
        with pytest.raises(DigestMismatch, match=r"expected sha256:.*, read sha256:") as caught:
            stream.read()
    assert caught.value.expected == f"sha256:{HEX}"
    assert caught.value.actual == Digest.of(DATA[:-1] + b"x")


def test_the_read_that_completes_the_size_verifies() -> None:
    """Who reads as much as the descriptor says and never meets the end must not miss a mismatch."""
    with reader(DATA[:-1] + b"x", size=len(DATA)) as stream, pytest.raises(DigestMismatch):
        stream.read(len(DATA))


@pytest.mark.parametrize(("data", "words"), [(DATA + b"more", "read more than 10,240"), (DATA[:-7], "read 10,233")])
def test_another_size_is_said_with_both_values(data: bytes, words: str) -> None:
    with reader(data, size=len(DATA)) as stream, pytest.raises(SizeMismatch, match=f"expected 10,240 bytes, {words}"):
        stream.read()


def test_closing_early_checks_nothing_unless_asked() -> None:
    bad = DATA[:-1] + b"x"
    with reader(bad) as stream:
        stream.read(1)
    with pytest.raises(DigestMismatch), reader(bad, drain=True) as stream:
        stream.read(1)


def test_draining_on_close_does_not_hide_the_first_error() -> None:
    source = io.BytesIO(b"wrong")
    with pytest.raises(KeyError), VerifyingReader(source, Digest(f"sha256:{HEX}"), drain_on_close=True):
        raise KeyError
    assert source.closed


def test_the_source_is_closed_even_if_the_check_fails() -> None:
    source = io.BytesIO(b"wrong")
    with pytest.raises(DigestMismatch):
        VerifyingReader(source, Digest(f"sha256:{HEX}"), drain_on_close=True).close()
    assert source.closed


def test_a_tee_copies_what_is_read_and_a_prefix_comes_first() -> None:
    out = io.BytesIO()
    stream = Tee(Prefixed(DATA[:7], io.BytesIO(DATA[7:])), out)
    assert stream.read(5) == DATA[:5]
    assert stream.read() == DATA[5:]
    assert out.getvalue() == DATA
