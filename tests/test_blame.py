"""Which layer does what to a path, and which bytes nobody sees."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st
from strategies import entries, hardlinked, marks, oci_tables
from test_laws import layer
from treetext import tree as parse

from overlaykit.errors import NotFound
from overlaykit.tree import Entry, Kind, Tree
from overlaykit.tree.blame import Reason, Verb, Waste, blame, waste


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


def test_waste_of_several_names_is_due_to_the_layer_that_takes_the_last() -> None:
    """It was put down to the layer that took the first name, under which the content was still seen by the second."""
    base = parse("/ dir 755\n/a file 644 5\n/b file 644 5 hardlink=/a\n/c file 644 5 hardlink=/a")
    first = parse("/ dir 755 implied\n/a whiteout\n/c whiteout")
    second = parse("/ dir 755 implied\n/b file 600 5")
    assert list(waste([base, first])) == []
    assert list(waste([base, first, second])) == [Waste(0, "a", Reason.ATTRIBUTES, 2, 5, ("mode",))]


def test_only_the_content_tells_whether_a_file_was_changed() -> None:
    base = parse("/ dir 755\n/a file 644 5 mtime=1\n/b file 644 5 mtime=1\n/c file 644 5 mtime=1")
    top = parse("/ dir 755 implied\n/a file 644 5 owner=7:0 mtime=9\n/b file 644 5 mtime=1\n/c file 644 6 mtime=1")
    contents = [{"a": 1, "b": 2, "c": 3}, {"a": 1, "b": 22, "c": 3}]
    asked = []

    def fingerprints(number: int, rows: np.ndarray) -> np.ndarray:
        paths = [(base, top)[number].path(row) for row in rows.tolist()]
        asked.append((number, paths))
        return np.array([[contents[number][path], 0] for path in paths], np.uint64)

    found = {w.path: (w.reason, w.changed) for w in waste([base, top], fingerprints=fingerprints)}
    attributes, changed = Reason.ATTRIBUTES, Reason.CHANGED
    assert found == {"a": (attributes, ("owner", "time")), "b": (changed, ()), "c": (changed, ())}
    assert asked == [(0, ["a", "b"]), (1, ["a", "b"])]  # c has another size
    guessed = {w.path: w.reason for w in waste([base, top])}
    assert guessed == {"a": changed, "b": attributes, "c": changed}


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


linked_tables = st.lists(st.one_of(entries(), entries(), marks), max_size=9).map(hardlinked)


def seen_by_python(layers: list[reference.Layer]) -> set[tuple[int, int]]:
    """(layer, number of the file) of all contents that the merge of `layers` shows."""
    return {(e.layer, e.offset) for e in reference.merge(layers).values() if e.kind == Kind.FILE}


@given(linked_tables, linked_tables, linked_tables)
def test_waste_is_what_was_seen_and_no_longer_is(x: list[Entry], y: list[Entry], z: list[Entry]) -> None:
    """Opaque directories, whiteouts and names of one file: the layer that hides a content is the first without it."""
    trees, layers = zip(*map(layer, (x, y, z)), strict=True)
    sizes: dict[tuple[int, int], int] = {}
    numbered = []
    for number, one in enumerate(layers):
        files: dict[object, int] = {}
        kept = {}
        for path, e in one.items():
            file = files.setdefault(e.hardlink if e.hardlink >= 0 else path, len(files))
            kept[path] = replace(e, layer=number, offset=file)
            if e.kind == Kind.FILE and e.size:
                sizes[number, file] = e.size
        numbered.append(kept)
    expected = []
    for number, file in sizes:
        for above in range(number + 1, len(layers)):
            if (number, file) not in seen_by_python(numbered[: above + 1]):
                expected.append((number, above, sizes[number, file]))
                break
    assert sorted((w.layer, w.hidden_by, w.size) for w in waste(trees)) == sorted(expected)
