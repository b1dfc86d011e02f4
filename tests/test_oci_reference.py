"""References, as Docker parses and prints them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overlaykit.errors import InvalidReference
from overlaykit.oci.reference import Reference

HEX = "0123456789abcdef" * 4
DIGEST = f"sha256:{HEX}"

WHOLE = [  # what people write, the whole name, the familiar one
    ("debian", "docker.io/library/debian", "debian"),
    ("debian:bookworm", "docker.io/library/debian:bookworm", "debian:bookworm"),
    ("user/app", "docker.io/user/app", "user/app"),
    ("docker.io/debian", "docker.io/library/debian", "debian"),
    ("index.docker.io/library/debian", "docker.io/library/debian", "debian"),
    ("docker.io/library/a/b", "docker.io/library/a/b", "library/a/b"),
    ("localhost/app", "localhost/app", "localhost/app"),
    ("localhost:5000/app:1", "localhost:5000/app:1", "localhost:5000/app:1"),
    ("quay.io/org/app:v1.2-rc_3", "quay.io/org/app:v1.2-rc_3", "quay.io/org/app:v1.2-rc_3"),
    ("[::1]:5000/app", "[::1]:5000/app", "[::1]:5000/app"),
    ("Host/app", "Host/app", "Host/app"),
    ("127.0.0.1/a__b/c-d--e.f:T", "127.0.0.1/a__b/c-d--e.f:T", "127.0.0.1/a__b/c-d--e.f:T"),
    (f"debian@{DIGEST}", f"docker.io/library/debian@{DIGEST}", f"debian@{DIGEST}"),
    (f"debian:1@{DIGEST}", f"docker.io/library/debian:1@{DIGEST}", f"debian:1@{DIGEST}"),
    ("ubuntu:" + "t" * 128, "docker.io/library/ubuntu:" + "t" * 128, "ubuntu:" + "t" * 128),
]
BAD = [
    "",
    ":tag",
    "a:",
    "Debian",
    "a//b",
    "/a",
    "a/",
    "a:b:c",
    "a b",
    "a\n",
    "a:tag\n",
    "-a",
    "a-",
    "a..b",
    "a___b",
    "../etc/passwd",
    "host.tld/../x",
    "a@sha256:123",
    f"a@{DIGEST}x",
    f"a@@{DIGEST}",
    HEX,
    "a:" + "t" * 129,
    "a/" * 128 + "a",
    "host.tld:port/a",
    "host.tld:1/",
    "bä/x",
    "x" * 100_000,
    "a\0b",
]


@pytest.mark.parametrize(("text", "whole", "familiar"), WHOLE)
def test_short_names_are_written_out_and_shown_short(text: str, whole: str, familiar: str) -> None:
    reference = Reference.parse(text)
    assert str(reference) == whole
    assert reference.familiar == familiar
    assert Reference.parse(whole) == Reference.parse(familiar) == reference


def test_the_parts() -> None:
    reference = Reference.parse(f"host.tld:5000/team/app:1.0@{DIGEST}")
    assert (reference.registry, reference.repository) == ("host.tld:5000", "team/app")
    assert (reference.tag, reference.digest, reference.name) == ("1.0", DIGEST, "host.tld:5000/team/app")


def test_latest_is_added_only_where_nothing_is_said() -> None:
    assert str(Reference.parse("a").tagged) == "docker.io/library/a:latest"
    assert Reference.parse("a:1").tagged.tag == "1"
    assert Reference.parse(f"a@{DIGEST}").tagged.tag is None


@pytest.mark.parametrize("bad", BAD)
def test_what_is_no_name_is_refused_in_one_short_line(bad: str) -> None:
    with pytest.raises(InvalidReference) as caught:
        Reference.parse(bad)
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)


@given(st.text(st.sampled_from("aA0.:/@-_[]{} \n\0ä" + "sha256"), max_size=40))
def test_whatever_parses_is_stable(text: str) -> None:
    try:
        reference = Reference.parse(text)
    except InvalidReference:
        return
    assert Reference.parse(str(reference)) == reference
    assert Reference.parse(reference.familiar) == reference
