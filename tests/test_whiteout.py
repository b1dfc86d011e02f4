"""Names, devices and xattrs that are marks: the kernels against tests/reference.py, and overlayfs's own forms."""

from __future__ import annotations

import numpy as np
import pytest
import reference
import treetext
from hypothesis import given
from hypothesis import strategies as st

from overlaykit._ext import whiteout
from overlaykit.errors import InvalidLayer
from overlaykit.tree import Entry, WhiteoutFormat, from_entries, regular
from overlaykit.tree.table import Strings
from overlaykit.tree.whiteout import inner_to_own, own_to_inner, read_overlay_marks

NAMES = ["a", "b.", ".wh", ".wh.", ".wh..", ".wh...", ".wh....", ".wh.a", ".wh.é", ".wh..wh.", ".wh..wh..opq", ".wh..opq"]
NAMES += [".wh..wh.plnk", ".wh..wh..opq2", ".wh.wh.a", "x.wh.a", "notes.wh.txt", "\udcff", ".wh.\udcff", ".WH.a", ""]
marked_paths = st.lists(st.sampled_from(NAMES), min_size=1, max_size=4).map(lambda parts: "/".join(filter(None, parts)))
tables = st.lists(marked_paths, max_size=20)


def strings(names: list[str]) -> Strings:
    return Strings.of([name.encode("utf-8", "surrogateescape") for name in names])


def marks_of(names: list[str]) -> tuple[int, list[int]]:
    table, marks = strings(names), np.empty(len(names), np.uint8)
    return whiteout.classify(table.arena, table.start, marks), marks.tolist()


@given(tables)
def test_classify_is_mark_of(names: list[str]) -> None:
    expected = [reference.mark_of(name) for name in names]
    assert marks_of(names) == (sum(mark != 0 for mark in expected), expected)


@given(tables)
def test_strip_is_the_path_that_a_mark_speaks_of(names: list[str]) -> None:
    names = [name for name in names if reference.mark_of(name) < 3]
    table, marks = strings(names), np.array(marks_of(names)[1], np.uint8)
    arena, start = np.empty_like(table.arena), np.empty_like(table.start)
    size = whiteout.strip(table.arena, table.start, marks, arena, start)
    stripped = [*Strings(arena[:size], start)]
    assert stripped == [reference.strip(name).encode("utf-8", "surrogateescape") for name in names]


@pytest.mark.parametrize(
    ("name", "mark"),
    [
        ("notes.wh.txt", 0),
        (".wh", 0),
        (".wh.a", 1),
        ("d/.wh..a", 1),
        (".wh..opq", 1),  # of a file .opq: only the doubled prefix is the mark (ggcr#2372 had it wrong)
        (".wh..wh..opq", 2),
        ("d/.wh..wh..opq", 2),
        (".wh..wh.plnk/12.34", 3),
        (".wh..wh..opq/x", 3),
        (".wh.", 4),
        (".wh..", 4),
        ("d/.wh...", 4),
        (".wh.a/b", 4),
    ],
)
def test_a_name_is_the_mark_that_image_spec_says(name: str, mark: int) -> None:
    assert marks_of([name]) == (int(mark != 0), [mark])


def test_strip_does_not_run_over_paths_that_are_no_marks() -> None:
    table = strings(["abcd/b", "ab"])
    arena, start = np.empty_like(table.arena), np.empty_like(table.start)
    assert whiteout.strip(table.arena, table.start, np.array([1, 1], np.uint8), arena, start) <= len(table.arena)


def test_shapes_that_disagree_are_refused() -> None:
    empty, zero, text = np.empty(0, np.uint8), np.zeros(1, np.int64), np.frombuffer(b"ab", np.uint8)
    one, two = np.zeros(1, np.uint8), np.array([0, 2])
    assert whiteout.classify(empty, zero, empty) == 0
    assert whiteout.strip(empty, zero, empty, empty, np.empty(1, np.int64)) == 0
    for arena, start, out in ((text, two, empty), (text, zero, empty), (text, np.empty(0, np.int64), empty)):
        with pytest.raises(ValueError):
            whiteout.classify(arena, start, out)
    with pytest.raises(ValueError):
        whiteout.strip(text, two, one, empty, np.empty(2, np.int64))
    with pytest.raises(ValueError):
        whiteout.strip(text, two, empty, text.copy(), np.empty(2, np.int64))
    with pytest.raises(ValueError):
        whiteout.strip(text, np.array([0, 1]), one, text.copy(), np.empty(2, np.int64))
    columns = (np.empty(1, np.int64), np.empty(1, np.int64), np.empty(1, np.int64), one.copy(), one.copy())
    with pytest.raises(ValueError):
        whiteout.regular(text, two, np.array([1]), one, one, one, *columns)  # a row that is not there
    with pytest.raises(ValueError):
        whiteout.regular(text, two, np.array([0, 0]), one, one, one, *columns)


@pytest.mark.parametrize("name", [".wh.", "d/.wh..", "d/.wh...", ".wh.d/x", "./.wh.."])
def test_a_mark_of_nothing_is_refused_by_name(name: str) -> None:
    with pytest.raises(InvalidLayer, match=r"\.wh\."):
        regular(from_entries([Entry(name)]), oci_names=True)


OWN = {
    "trusted.overlay.opaque": b"y",
    "trusted.overlay.origin": b"\0\xfb",
    "trusted.overlay.overlay.opaque": b"y",
    "user.overlay.opaque": b"y",
    "user.k": b"v",
}


def test_an_overlays_own_xattrs_go_and_a_nested_ones_lose_one_level() -> None:
    assert own_to_inner(OWN, "trusted.overlay.") == {
        "trusted.overlay.opaque": b"y",
        "user.overlay.opaque": b"y",
        "user.k": b"v",
    }


@given(st.dictionaries(st.sampled_from([*OWN, "trusted.overlay.overlay.overlay.x", "user.overlay.whiteout"]), st.binary()))
def test_escaping_and_unescaping_give_the_xattrs_back(xattrs: dict[str, bytes]) -> None:
    for form in (WhiteoutFormat.OVERLAY, WhiteoutFormat.USERXATTR):
        assert own_to_inner(inner_to_own(xattrs, form.xattr_prefix), form.xattr_prefix) == xattrs


def test_overlay_marks_become_kinds_and_flags() -> None:
    on_disk = treetext.tree("""\
        / dir xattr.trusted.overlay.opaque=y xattr.user.k=v
        /device char 0 0:0 owner=5:5 mtime=7
        /file file xattr.trusted.overlay.opaque=y
        /redirected dir xattr.trusted.overlay.redirect=/x xattr.trusted.overlay.origin=z
        /xattr file 600 0 xattr.trusted.overlay.whiteout=y
        /full file 600 1 xattr.trusted.overlay.whiteout=y
        /x dir xattr.trusted.overlay.opaque=x
    """)
    assert (
        treetext.text(read_overlay_marks(on_disk, "trusted.overlay."))
        == """\
/ dir 755 xattr.user.k=v opaque
/device whiteout
/file file 644 0
/full file 600 1
/redirected dir 755 xattr.trusted.overlay.redirect=/x
/x dir 755
/xattr whiteout"""
    )


@pytest.mark.parametrize("form", [WhiteoutFormat.NONE, WhiteoutFormat.OCI])
def test_only_overlay_forms_have_xattrs(form: WhiteoutFormat) -> None:
    with pytest.raises(ValueError, match=form.value):
        _ = form.xattr_prefix
