"""Stacks of layers where hard links cross them: what the links name, whoever hides it, and the laws with links in them."""

from __future__ import annotations

import pytest
import treetext
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import entries, hardlinked, marks, paths
from treetext import text

from overlaykit.errors import InvalidLayer
from overlaykit.tree import Entry, Flag, Kind, Tree, diff, from_entries, merge, regular, squash


def layer(source: str) -> Tree:
    """The layer whose rows arrive as the lines of `source`; a file with a target is a hard link, .wh. names are marks."""
    rows = [
        Entry(e.path, e.kind, flags=Flag.LOWER_LINK, link=e.link) if e.kind == Kind.FILE and e.link is not None else e
        for e in treetext.parse(source)
    ]
    return regular(from_entries(rows), oci_names=True)


def below_root(tree: Tree) -> str:
    return text([e for e in tree if e.path])


BASE = layer("""\
/ dir 755
/a file 4755 6 owner=5:6 mtime=1.5 xattr.user.k=v
/d dir 700
/d/s symlink -> a
""")


def test_a_link_into_a_lower_layer_is_a_name_of_the_file_there() -> None:
    merged = merge([BASE, layer("/b file -> a\n/d/t file -> /d/s")])
    assert (
        below_root(merged)
        == """\
/a file 4755 6 owner=5:6 mtime=1.5 xattr.user.k=v
/b file 4755 6 owner=5:6 mtime=1.5 xattr.user.k=v hardlink=/a
/d dir 700
/d/s symlink 777 -> a
/d/t symlink 777 hardlink=/d/s -> a"""
    )
    assert merged.layer.tolist() == [1, 0, 0, 1, 0, 0]  # of files: where the content is; of directories: who has them last


def test_a_link_whose_lower_file_its_own_layer_takes_away_keeps_that() -> None:
    merged = merge([BASE, layer("/b file -> a\n/c file -> a\n/.wh.a file 0 0")])
    assert (
        below_root(merged.take(merged.kind == Kind.FILE))
        == """\
/b file 4755 6 owner=5:6 mtime=1.5 xattr.user.k=v
/c file 4755 6 owner=5:6 mtime=1.5 xattr.user.k=v hardlink=/b"""
    )


@pytest.mark.parametrize("hiding", ["/.wh.a file 0 0", "/a dir 755\n/a/x file 644 1", "/a symlink -> b"])
def test_names_of_a_file_stay_together_when_an_upper_layer_takes_the_first_away(hiding: str) -> None:
    merged = merge([BASE, layer("/b file -> a"), layer("/c file -> b"), layer(hiding)])
    b, c = merged.find("b"), merged.find("c")
    assert merged.hardlink[b] == merged.hardlink[c] >= 0
    assert merged.entry(c).xattrs == {"user.k": b"v"}


def test_rewriting_one_name_leaves_the_others_as_they_were() -> None:
    """An upper layer replaces a name, it never writes through it (image-spec#1204)."""
    merged = merge([BASE, layer("/b file -> a"), layer("/b file 644 1")])
    assert (
        below_root(merged.take(merged.kind == Kind.FILE))
        == """\
/a file 4755 6 owner=5:6 mtime=1.5 xattr.user.k=v
/b file 644 1"""
    )


def test_a_link_names_what_the_layers_below_it_show_and_not_what_comes_later() -> None:
    newer = layer("/a file 644 1")
    assert [e.size for e in merge([BASE, newer, layer("/b file -> a")]) if e.path in ("a", "b")] == [1, 1]
    merged = merge([BASE, layer("/b file -> a"), newer])
    assert merged.entry(merged.find("a")).size == 1
    assert merged.entry(merged.find("b")).size == 6


def test_a_link_through_a_lower_symlink_to_a_directory_is_followed() -> None:
    base = layer("/bin symlink -> usr/bin\n/usr/bin/perl file 755 9")
    merged = merge([base, layer("/usr/bin/perl5 file -> bin/perl")])
    assert text([merged.entry(merged.find("usr/bin/perl5"))]) == "/usr/bin/perl5 file 755 9"


@pytest.mark.parametrize("link", ["/b file -> nowhere", "/b file -> d/s/x", "/.wh.a file 0 0\n/b file -> nowhere"])
def test_merge_names_a_link_to_what_no_layer_has(link: str) -> None:
    with pytest.raises(InvalidLayer, match=r"'b': a hard link to '[a-z/]+', which no layer has"):
        merge([BASE, layer(link)])
    with pytest.raises(InvalidLayer, match="'b'"):
        merge([layer(link)])


def test_a_link_to_nothing_that_nobody_sees_harms_nobody() -> None:
    assert below_root(merge([BASE, layer("/b file -> nowhere"), layer("/.wh.b file 0 0")])) == below_root(BASE)


def test_a_link_to_a_lower_directory_is_refused() -> None:
    with pytest.raises(InvalidLayer, match="'b': a hard link to the directory 'd'"):
        merge([BASE, layer("/b file -> d")])


def test_squash_leaves_links_below_it_and_resolves_those_within() -> None:
    squashed = squash([layer("/b file -> a\n/f file 644 1"), layer("/c file -> b\n/g file -> f")])
    assert (
        below_root(squashed)
        == """\
/b file 0 0 lower_link -> a
/c file 0 0 lower_link -> a
/f file 644 1
/g file 644 1 hardlink=/f"""
    )
    assert merge([BASE, squashed]) == merge(
        [BASE, layer("/b file -> a\n/f file 644 1"), layer("/c file -> b\n/g file -> f")]
    )


def test_the_layer_of_a_row_is_the_one_whose_tar_has_the_content() -> None:
    merged = merge([layer("/x file 644 1"), BASE, layer("/b file -> a"), layer("/y file 644 1")])
    assert {e.path: e.layer for e in merged if e.path} == {"a": 1, "b": 1, "d": 1, "d/s": 1, "x": 0, "y": 3}


def test_no_layers_show_an_empty_root() -> None:
    assert text(merge([])) == text(squash([])) == "/ dir 755 implied"


# --- the laws, with links ---------------------------------------------------------------------------------------------

lower_links = st.builds(lambda path, to: Entry(path, flags=Flag.LOWER_LINK, link=to), paths, paths)
linked_tables = st.lists(st.one_of(entries(), entries(), marks, lower_links), max_size=9).map(hardlinked)
plain_tables = st.lists(entries(), max_size=9).map(hardlinked)


def law_layer(table: list[Entry]) -> Tree:
    try:
        return regular(from_entries([e for e in table if e.kind != Kind.SYMLINK]), oci_names=True)
    except InvalidLayer:
        assume(False)
        raise


@given(plain_tables, linked_tables, linked_tables)
def test_a_squash_shows_what_its_layers_show(base: list[Entry], x: list[Entry], y: list[Entry]) -> None:
    b, u, v = (law_layer(table) for table in (base, x, y))
    try:
        below, expected = merge([b, u]), merge([b, u, v])
    except InvalidLayer:
        assume(False)
        raise
    assert merge([b, squash([u, v])]) == expected
    assert merge([squash([b, u]), v]) == expected
    assert merge([below, v]) == expected


@given(plain_tables, plain_tables)
def test_a_diff_leads_from_one_tree_to_the_other(x: list[Entry], y: list[Entry]) -> None:
    a, b = merge([law_layer(x)]), merge([law_layer(y)])
    changeset = diff(a, b)
    assert merge([a, changeset]) == b
    assert regular(changeset) == changeset


@given(plain_tables)
def test_the_diff_of_a_tree_with_itself_is_empty(x: list[Entry]) -> None:
    a = merge([law_layer(x)])
    assert [e.path for e in diff(a, a)] == [""]


@given(linked_tables)
def test_regular_twice_is_regular_once(table: list[Entry]) -> None:
    once = law_layer(table)
    assert regular(once) == once
