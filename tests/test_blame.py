"""Which layer does what to a path, and which bytes nobody sees."""

from __future__ import annotations

import pytest
import reference
from hypothesis import given
from strategies import oci_tables
from test_laws import layer
from treetext import tree as parse

from overlaykit.errors import NotFound
from overlaykit.tree import Entry, Kind, Tree
from overlaykit.tree.blame import Reason, Verb, blame, waste


def told(layers: list[Tree], path: str) -> list[tuple[int, str, str]]:
    return [(t.layer, t.verb.value, t.by) for t in blame(layers, path)]


BASE = parse("/ dir 755\n/a dir 755\n/a/f file 644 5\n/a/g file 644 7\n/b file 644 3")


def test_the_last_touch_decides() -> None:
    top = parse("/ dir 755 implied\n/a dir 755 implied\n/a/f file 600 5")
    assert told([BASE, top], "a/f") == [(0, "adds", "a/f"), (1, "changes", "a/f")]
    assert told([BASE, top], "a") == [(0, "adds", "a")]


def test_a_file_goes_with_its_directory() -> None:
    top = parse("/ dir 755 implied\n/a whiteout")
    assert told([BASE, top], "a/f") == [(0, "adds", "a/f"), (1, "removes", "a")]
    assert told([BASE, parse("/ dir 755 implied\n/a file 644 1")], "a/f")[-1] == (1, "replaces", "a")
    assert told([BASE, parse("/ dir 755 implied\n/a dir 755 opaque")], "a/f")[-1] == (1, "replaces", "a")


def test_what_no_layer_has_is_not_found() -> None:
    with pytest.raises(NotFound, match="/nowhere"):
        blame([BASE], "nowhere")


def test_waste_says_why_and_how_much() -> None:
    top = parse("/ dir 755 implied\n/a dir 755 implied\n/a/f file 600 5\n/a/g whiteout\n/b file 644 4")
    found = [(w.path, w.reason, w.hidden_by, w.size) for w in waste([BASE, top])]
    assert found == [("a/f", Reason.ATTRIBUTES, 1, 5), ("a/g", Reason.REMOVED, 1, 7), ("b", Reason.CHANGED, 1, 3)]


def test_content_is_seen_while_one_of_its_names_is() -> None:
    base = parse("/ dir 755\n/a file 644 5\n/b file 644 5 hardlink=/a")
    one = parse("/ dir 755 implied\n/a whiteout")
    both = parse("/ dir 755 implied\n/a whiteout\n/b whiteout")
    assert list(waste([base, one])) == []
    assert [w.size for w in waste([base, both])] == [5]


@given(oci_tables, oci_tables, oci_tables)
def test_blame_agrees_with_the_merge(x: list[Entry], y: list[Entry], z: list[Entry]) -> None:
    trees, layers = zip(*map(layer, (x, y, z)), strict=True)
    shown = reference.merge(list(layers))
    for path in set().union(*layers) - {""}:
        if all(path not in one or one[path].kind == Kind.WHITEOUT for one in layers):
            continue
        assert (blame(trees, path)[-1].verb in (Verb.ADDS, Verb.CHANGES)) == (path in shown)


@given(oci_tables, oci_tables)
def test_seen_and_wasted_bytes_are_all_bytes(x: list[Entry], y: list[Entry]) -> None:
    trees, layers = zip(*map(layer, (x, y)), strict=True)
    shown = reference.merge(list(layers))
    everything = sum(e.size for one in layers for e in one.values())
    assert sum(e.size for e in shown.values()) + sum(w.size for w in waste(trees)) == everything
