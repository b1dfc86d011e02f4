"""Trees as tables: taking rows, gluing, keeping on disk, comparing, finding."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import entries, hardlinked, oci_tables
from treetext import text, tree

from overlaykit.errors import InvalidLayer
from overlaykit.tree import Entry, Flag, Kind, Strings, Tree, concat, from_entries, regular
from overlaykit.tree.table import COLUMNS_FILE, first_names

PLACES = """\
/ dir 755
/etc dir 755
/etc/a file 644 6
/etc/b file 644 6 hardlink=/etc/a
/etc-old dir 700 owner=1000:1000
/etc.d symlink 777 mtime=1.5 -> etc
/null char 666 1:3
/x file 644 9 xattr.user.k=v
/\\xff\\x20 fifo 600"""


def test_a_row_is_an_entry() -> None:
    places = tree(PLACES)
    assert places.entry(places.find("etc-old")) == Entry("etc-old", Kind.DIR, mode=0o700, uid=1000, gid=1000)
    assert places.entry(places.find("x")).xattrs == {"user.k": b"v"}
    assert places.entry(places.find("etc.d")).link == "etc"
    assert places.entry(places.find(b"\xff ")).path == "\udcff "
    with pytest.raises(IndexError):
        places.entry(len(places))


def test_rows_stand_in_tree_order_a_directory_before_what_sorts_before_a_slash() -> None:
    assert text(tree(PLACES)) == PLACES


def test_find_knows_only_whole_paths() -> None:
    places = tree(PLACES)
    assert [places.path(places.find(e.path)) for e in places] == [e.path for e in places]
    assert [places.find(path) for path in ("et", "etc/", "etc/a/b", "zzz", "/etc", "\0")] == [-1] * 6
    assert from_entries([]).find("") == -1


def test_a_directory_knows_its_children_and_its_subtree() -> None:
    places = tree(PLACES)
    assert [places.path(row) for row in places.children(0)] == ["etc", "etc-old", "etc.d", "null", "x", "\udcff "]
    assert [places.path(row) for row in places.children(1)] == ["etc/a", "etc/b"]
    assert places.ends[1] == 4
    assert places.parents.tolist() == [-1, 0, 1, 1, 0, 0, 0, 0, 0]


@given(oci_tables)
def test_family_is_what_the_paths_say(table: list[Entry]) -> None:
    layer = regular(from_entries([e for e in table if e.kind != Kind.SYMLINK and "/" not in e.path]), oci_names=True)
    for row in range(1, len(layer)):
        parent = layer.path(row).rpartition("/")[0]
        assert layer.path(int(layer.parents[row])) == parent


@given(st.lists(entries(), max_size=12), st.data())
def test_take_gives_the_rows_asked_for(table: list[Entry], data: st.DataObject) -> None:
    whole = from_entries(table)
    mask = np.array(data.draw(st.lists(st.booleans(), min_size=len(table), max_size=len(table))), np.bool_)
    assert [*whole.take(mask)] == [e for e, kept in zip(whole, mask, strict=True) if kept]
    rows = np.flatnonzero(mask)[::-1]
    assert [*whole.take(rows)] == [whole.entry(int(row)) for row in rows]


@given(st.lists(st.lists(entries(), max_size=5).map(hardlinked), max_size=4))
def test_concat_keeps_every_row_and_numbers_the_trees(tables: list[list[Entry]]) -> None:
    trees = [from_entries(table) for table in tables]
    glued = concat(trees)
    assert len(glued) == sum(map(len, tables))
    begin = 0
    for number, part in enumerate(trees):
        rows = glued.take(np.arange(begin, begin + len(part)))
        assert rows == part
        assert set(rows.layer.tolist()) <= {number}
        begin += len(part)
    # Numbers of hard links are a tree's own: no two trees share one afterwards.
    numbers = [set(glued.hardlink[glued.layer == n].tolist()) - {-1} for n in range(len(trees))]
    assert sum(map(len, numbers)) == len(set().union(*numbers))


def test_concat_leaves_the_layers_if_asked() -> None:
    layered = from_entries([Entry("a", layer=7)])
    assert concat([layered, layered], relabel=False).layer.tolist() == [7, 7]
    assert len(concat([])) == 0


# --- equality ---------------------------------------------------------------------------------------------------------


def test_where_the_content_comes_from_is_no_part_of_what_a_tree_says() -> None:
    assert from_entries([Entry("a", offset=512, layer=3)]) == from_entries([Entry("a")])


@pytest.mark.parametrize(
    "other",
    [
        Entry("b"),
        Entry("a", Kind.FIFO),
        Entry("a", mode=1),
        Entry("a", uid=1),
        Entry("a", gid=1),
        Entry("a", size=1),
        Entry("a", mtime_ns=1),
        Entry("a", rdev=1),
        Entry("a", link=""),
        Entry("a", xattrs={"user.k": b""}),
        Entry("a", flags=Flag.IMPLIED),
    ],
)
def test_anything_else_makes_trees_unequal(other: Entry) -> None:
    assert from_entries([Entry("a")]) != from_entries([other])


def test_values_are_compared_and_not_where_they_are_kept() -> None:
    rows = [Entry("a", link="x"), Entry("b", link="y", xattrs={"k": b"1"}), Entry("c", xattrs={"k": b"2"})]
    there = from_entries(rows)
    moved = from_entries([Entry("0", link="z", xattrs={"k": b"0"}), *rows]).take(np.array([1, 2, 3]))
    assert there == moved
    assert there != from_entries([*rows[:2], Entry("c", xattrs={"k": b"3"})])
    assert there != from_entries([Entry("a", link="y"), *rows[1:]])
    assert (there == 1) is False


def test_hard_links_are_compared_by_which_names_go_together() -> None:
    def linked(*numbers: int) -> Tree:
        return from_entries([Entry(name, hardlink=n) for name, n in zip("abcd", numbers, strict=True)])

    assert linked(0, 0, 1, 1) == linked(9, 9, 3, 3)
    assert linked(0, 0, 1, 1) != linked(0, 1, 0, 1)
    assert linked(0, 0, -1, -1) != linked(-1, -1, -1, -1)
    assert linked(5, -1, -1, -1) == linked(-1, -1, -1, -1)  # a file of one name has no other
    assert first_names(linked(4, 2, 4, -1)).tolist() == [0, 1, 0, 3]


# --- on disk ----------------------------------------------------------------------------------------------------------


@given(oci_tables)
def test_what_was_saved_is_loaded(table: list[Entry]) -> None:
    layer = regular(
        from_entries(hardlinked([e for e in table if e.kind != Kind.SYMLINK and "/" not in e.path])), oci_names=True
    )
    with tempfile.TemporaryDirectory() as folder:
        layer.save(folder)
        loaded = Tree.load(folder)
    assert loaded == layer
    assert [*loaded] == [*layer]
    assert loaded.parents.tolist() == layer.parents.tolist()
    assert loaded.ends.tolist() == layer.ends.tolist()


def test_names_and_values_of_any_bytes_are_kept(tmp_path: Path) -> None:
    odd = from_entries([Entry("\udcff\n", link="\udc80", xattrs={"user.\udcfe=": bytes(range(256)), "user.é": b""})])
    odd.save(tmp_path)
    assert [*Tree.load(tmp_path)] == [*odd]


@pytest.mark.parametrize("size", [0, 1, 20, 30, 100, -64])
def test_a_file_cut_short_is_no_tree(tmp_path: Path, size: int) -> None:
    tree(PLACES).save(tmp_path)
    file = tmp_path / COLUMNS_FILE
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(InvalidLayer, match=str(tmp_path)):
        Tree.load(tmp_path)


def test_a_damaged_header_is_no_tree(tmp_path: Path) -> None:
    tree(PLACES).save(tmp_path)
    file = tmp_path / COLUMNS_FILE
    good = file.read_bytes()
    for at in range(400):
        file.write_bytes(good[:at] + bytes([good[at] ^ 0x11]) + good[at + 1 :])
        with contextlib.suppress(InvalidLayer):  # or the damage is elsewhere, in the value of an xattr say
            assert len(Tree.load(tmp_path)) == 9


@given(st.lists(st.binary(max_size=6) | st.text("ab/", max_size=6).map(str.encode)))
def test_strings_are_decoded_as_names_are(found: list[bytes]) -> None:
    assert Strings.of(found).decoded() == [os.fsdecode(name) for name in found]


def test_strings_are_bounded() -> None:
    strings = Strings.of([b"", b"ab", b""])
    assert [*strings] == [b"", b"ab", b""]
    for row in (-1, 3):
        with pytest.raises(IndexError):
            strings[row]
    assert [*Strings.concat([])] == []
    assert [*Strings.concat([strings, Strings.of([]), strings])] == [b"", b"ab", b""] * 2
