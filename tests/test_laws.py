"""The laws of trees, and the kernels against tests/reference.py, on random layers."""

from __future__ import annotations

import pytest
import reference
from hypothesis import assume, given
from strategies import oci_tables, plain_tables

from overlaykit.errors import InvalidLayer
from overlaykit.tree import Entry, Kind, Tree, diff, from_entries, merge, regular, squash


def strip_provenance(tree: Tree) -> list[tuple[object, ...]]:
    return [
        (e.path, e.kind, e.mode, e.uid, e.gid, e.size, e.mtime_ns, e.rdev, e.link, dict(e.xattrs), e.flags) for e in tree
    ]


def rows(layer: reference.Layer) -> list[tuple[object, ...]]:
    return strip_provenance(from_entries(layer.values()))


def without_symlinks(table: list[Entry]) -> list[Entry]:
    """Entries under a symlink of their layer move to where it leads: a matter of its own, tested in test_regular.py."""
    return [e for e in table if e.kind != Kind.SYMLINK]


def layer(table: list[Entry]) -> tuple[Tree, reference.Layer]:
    table = without_symlinks(table)
    try:
        return regular(from_entries(table), oci_names=True), reference.regular(table)
    except InvalidLayer:
        with pytest.raises(ValueError):
            reference.regular(table)
        assume(False)
        raise


@given(oci_tables)
def test_regular_is_the_reference(table: list[Entry]) -> None:
    tree, expected = layer(table)
    assert strip_provenance(tree) == rows(expected)


@given(oci_tables)
def test_regular_twice_is_regular_once(table: list[Entry]) -> None:
    tree, _ = layer(table)
    again = regular(tree)
    assert again == tree


@given(oci_tables, oci_tables, oci_tables)
def test_merge_and_squash_are_the_reference(x: list[Entry], y: list[Entry], z: list[Entry]) -> None:
    trees, layers = zip(*map(layer, (x, y, z)), strict=True)
    assert strip_provenance(merge(trees)) == rows(reference.merge(list(layers)))
    assert strip_provenance(squash(trees)) == rows(reference.squash(list(layers)))


@given(plain_tables, oci_tables, oci_tables)
def test_a_squash_shows_what_its_layers_show(base: list[Entry], x: list[Entry], y: list[Entry]) -> None:
    b, u, v = (layer(t)[0] for t in (base, x, y))
    assert merge([b, squash([u, v])]) == merge([b, u, v])


@given(oci_tables, oci_tables, oci_tables)
def test_squash_is_associative(x: list[Entry], y: list[Entry], z: list[Entry]) -> None:
    a, b, c = (layer(t)[0] for t in (x, y, z))
    assert squash([squash([a, b]), c]) == squash([a, squash([b, c])]) == squash([a, b, c])


@given(plain_tables, plain_tables)
def test_a_diff_leads_from_one_tree_to_the_other(x: list[Entry], y: list[Entry]) -> None:
    a, b = merge([layer(x)[0]]), merge([layer(y)[0]])
    changeset = diff(a, b)
    assert merge([a, changeset]) == b
    assert regular(changeset) == changeset
    assert strip_provenance(changeset) == rows(
        reference.diff({e.path: _plain(e) for e in a}, {e.path: _plain(e) for e in b})
    )


@given(plain_tables)
def test_the_diff_of_a_tree_with_itself_changes_nothing(x: list[Entry]) -> None:
    a = merge([layer(x)[0]])
    assert [e.path for e in diff(a, a)] == [""]
    assert merge([a]) == a


def _plain(e: Entry) -> Entry:
    return Entry(e.path, e.kind, e.mode, e.uid, e.gid, e.size, e.mtime_ns, e.rdev, e.link, dict(e.xattrs), flags=e.flags)
