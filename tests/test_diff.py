"""Changesets from one tree to another, their changes as docker diff says them, and what a layer best says of them."""

from __future__ import annotations

import numpy as np
import pytest
import treetext
from hypothesis import assume, given
from strategies import entries, hardlinked, oci_tables
from strategies import plain_tables as tables
from treetext import text

from overlaykit.errors import InvalidLayer
from overlaykit.tree import Entry, Flag, Kind, Tree, against, changes, diff, from_entries, merge, regular

LOWER = treetext.tree("""\
    / dir 755
    /bin dir 755
    /bin/sh file 755 100 mtime=1
    /etc dir 755 mtime=5
    /etc/conf dir 750 owner=1:1 xattr.user.k=v
    /etc/conf/a file 644 1
    /etc/conf/b file 644 2
    /etc/motd file 644 6 mtime=1.5
    /etc/mtab symlink -> /proc/mounts
    /null char 666 1:3
""")


def layer(source: str) -> Tree:
    return regular(from_entries(treetext.parse(source)), oci_names=True)


def said(changeset: Tree, lower: Tree = LOWER) -> str:
    """The lines of docker diff, as a set would be compared: sorted."""
    return "\n".join(sorted(f"{c.kind} {c.path}" for c in changes(lower, changeset)))


def law_tree(table: list[Entry]) -> Tree:
    try:
        return merge([regular(from_entries(hardlinked([e for e in table if e.kind != Kind.SYMLINK])), oci_names=True)])
    except InvalidLayer:
        assume(False)
        raise


# --- diff -------------------------------------------------------------------------------------------------------------


def test_only_what_differs_is_written_and_a_removed_tree_is_one_whiteout() -> None:
    upper = merge([LOWER, layer("/.wh.etc file 0 0"), layer("/bin/new file 644 1\n/bin/sh file 700 100 mtime=1")])
    assert (
        text(diff(LOWER, upper))
        == """\
/ dir 755 implied
/bin dir 755 implied
/bin/new file 644 1
/bin/sh file 700 100 mtime=1
/etc whiteout"""
    )


@pytest.mark.parametrize(
    "line",
    [
        "/etc/motd file 600 6 mtime=1.5",
        "/etc/motd file 644 7 mtime=1.5",
        "/etc/motd file 644 6 mtime=1.500000001",
        "/etc/motd file 644 6 mtime=1.5 owner=0:1",
        "/etc/motd file 644 6 mtime=1.5 xattr.user.k=",
        "/etc/mtab symlink -> /proc/self/mounts",
        "/null char 666 1:5",
        "/etc/conf dir 750 owner=1:1 mtime=1 xattr.user.k=v",
        "/etc/conf dir 750 owner=1:1 xattr.user.k=w",
        "/etc/mtab file 644 0",
    ],
)
def test_whatever_a_tree_says_is_a_difference(line: str) -> None:
    upper = merge([LOWER, layer(line)])
    changeset = diff(LOWER, upper)
    assert merge([LOWER, changeset]) == upper
    assert [e.path for e in changeset if not e.flags & Flag.IMPLIED] == [treetext.parse(line)[0].path]


def test_content_that_differs_in_secret_is_the_callers_to_know() -> None:
    same = np.ones(len(LOWER), np.bool_)
    same[LOWER.find("etc/motd")] = False
    assert [e.path for e in diff(LOWER, LOWER, same_content=same)] == ["", "etc", "etc/motd"]


def test_a_changeset_has_no_diff() -> None:
    for changeset in ("/.wh.a file 0 0", "/d/.wh..wh..opq file 0 0"):
        with pytest.raises(InvalidLayer, match="upper is a changeset"):
            diff(LOWER, layer(changeset))
        with pytest.raises(InvalidLayer, match="lower is a changeset"):
            diff(layer(changeset), LOWER)


LINKED = """\
    / dir 755
    /a file 644 6
    /b file 644 6 hardlink=/a
    /c file 644 6 hardlink=/a
    /x file 644 6
"""


@pytest.mark.parametrize(
    ("upper", "written"),
    [
        # A name that goes leaves the file as it was: nothing of it is written again.
        ("/ dir 755\n/b file 644 6\n/c file 644 6 hardlink=/b\n/x file 644 6", "a whiteout"),
        # A name that comes must be a link, so all names come.
        (LINKED + "/d file 644 6 hardlink=/a", "a b c d"),
        # Two files that became one, one that became two.
        (
            "/ dir 755\n/a file 644 6\n/b file 644 6 hardlink=/a\n/c file 644 6 hardlink=/a\n/x file 644 6 hardlink=/a",
            "a b c x",
        ),
        ("/ dir 755\n/a file 644 6\n/b file 644 6 hardlink=/a\n/c file 644 6\n/x file 644 6", "c"),
        # The names of two files changed partners.
        ("/ dir 755\n/a file 644 6\n/b file 644 6 hardlink=/a\n/c file 644 6\n/x file 644 6 hardlink=/c", "c x"),
        # One that changed takes its names along.
        ("/ dir 755\n/a file 600 6\n/b file 600 6 hardlink=/a\n/c file 600 6 hardlink=/a\n/x file 644 6", "a b c"),
    ],
)
def test_names_of_one_file_come_together_or_not_at_all(upper: str, written: str) -> None:
    a, b = treetext.tree(LINKED), treetext.tree(upper)
    changeset = diff(a, b)
    assert merge([a, changeset]) == b
    words = [e.path + " whiteout" * (e.kind == Kind.WHITEOUT) for e in changeset if e.path]
    assert " ".join(words) == written


@given(tables, tables)
def test_a_diff_leads_from_one_tree_to_the_other_with_hard_links(x: list[Entry], y: list[Entry]) -> None:
    a, b = law_tree(x), law_tree(y)
    changeset = diff(a, b)
    assert merge([a, changeset]) == b
    assert regular(changeset) == changeset
    assert not list(changes(b, diff(b, b)))


# --- changes: docker's rules (semantics of `docker diff`) ---------------------------------------------------------------

DOCKER = {
    "nothing": ("", ""),
    "an added file lists its directory as changed": ("/etc/new file 644 1", "A /etc/new\nC /etc"),
    "every name of an added tree is listed": (
        "/opt dir 755\n/opt/a dir 755\n/opt/a/f file 644 1",
        "A /opt\nA /opt/a\nA /opt/a/f",
    ),
    "a removed tree is one line": ("/etc/.wh.conf file 0 0", "C /etc\nD /etc/conf"),
    "what was not there is not removed": ("/etc/.wh.nothing file 0 0", ""),
    "the root is never listed": ("/ dir 700\n/.wh.null file 0 0", "D /null"),
    "a mode": ("/etc/motd file 600 6 mtime=1.5", "C /etc\nC /etc/motd"),
    "an owner": ("/null char 666 1:3 owner=0:5", "C /null"),
    "a device": ("/null char 666 1:5", "C /null"),
    "a time of a file": ("/etc/motd file 644 6 mtime=2", "C /etc\nC /etc/motd"),
    "not the time of a directory": ("/etc dir 755 mtime=9", ""),
    "the mode of a directory": ("/etc dir 711 mtime=5", "C /etc"),
    "a directory that became a file is one line": ("/etc/conf file 644 1", "C /etc\nC /etc/conf"),
    "a file that became a directory is changed, what is in it added": (
        "/etc/motd dir 755\n/etc/motd/x file 644 1",
        "A /etc/motd/x\nC /etc\nC /etc/motd",
    ),
    "an implied directory in a file's place": ("/etc/motd/x file 644 1", "A /etc/motd/x\nC /etc\nC /etc/motd"),
    "an opaque directory takes away what does not come back": (
        "/etc/conf dir 750 owner=1:1 xattr.user.k=v\n/etc/conf/.wh..wh..opq file 0 0\n/etc/conf/b file 644 2",
        "C /etc\nC /etc/conf\nD /etc/conf/a",
    ),
    "an opaque directory that was empty below says nothing": (
        "/new dir 755\n/new/.wh..wh..opq file 0 0",
        "A /new",
    ),
    "an opaque root": ("/.wh..wh..opq file 0 0\n/null char 666 1:3", "D /bin\nD /etc"),
    "below an opaque directory everything is taken away that does not come back": (
        "/etc dir 755 mtime=5\n/etc/.wh..wh..opq file 0 0\n/etc/conf/b file 644 2",
        "C /etc\nC /etc/conf\nD /etc/conf/a\nD /etc/motd\nD /etc/mtab",
    ),
}


@pytest.mark.parametrize(("source", "expected"), DOCKER.values(), ids=DOCKER)
def test_changes_are_what_docker_diff_lists(source: str, expected: str) -> None:
    assert said(layer(source)) == expected


@given(tables, oci_tables)
def test_a_changeset_changes_what_its_effect_differs_in(x: list[Entry], y: list[Entry]) -> None:
    """However a changeset says it, with opaque marks or without, what it does to the tree below is what is listed."""
    lower = law_tree(x)
    upper = regular(from_entries([]))
    try:
        upper = regular(from_entries([e for e in y if e.kind != Kind.SYMLINK]), oci_names=True)
    except InvalidLayer:
        assume(False)
    plain = diff(lower, merge([lower, upper]))

    def without_reasons(changeset: Tree) -> list[tuple[str, str]]:
        return sorted((c.kind, c.path) for c in changes(lower, changeset))

    assert without_reasons(upper) == without_reasons(plain)


def test_a_change_says_why_and_how_large() -> None:
    upper = merge([LOWER, layer("/etc/.wh.conf file 0 0\n/bin/sh file 700 90 mtime=2 owner=1:0")])
    found = {c.path: c for c in changes(LOWER, diff(LOWER, upper))}
    assert found["/bin/sh"].reasons == ("mode", "owner", "content", "time")
    assert (found["/bin/sh"].size_before, found["/bin/sh"].size_after) == (100, 90)
    assert found["/bin"].reasons == ("below",)
    assert (found["/etc/conf"].kind, found["/etc/conf"].size_before) == ("D", 3)


# --- against ----------------------------------------------------------------------------------------------------------


def test_against_lends_what_lower_says_to_directories_nobody_wrote() -> None:
    assert (
        text(against(layer("/etc/conf/c file 644 1"), LOWER))
        == """\
/ dir 755 implied
/etc dir 755 mtime=5
/etc/conf dir 750 owner=1:1 xattr.user.k=v
/etc/conf/c file 644 1"""
    )


def test_against_drops_whiteouts_of_nothing() -> None:
    assert (
        text(against(layer("/.wh.nothing file 0 0\n/.wh.null file 0 0"), LOWER))
        == """\
/ dir 755 implied
/null whiteout"""
    )


def test_against_keeps_an_opaque_mark_only_where_a_name_comes_back() -> None:
    """The kernel marks every new directory opaque: what it says of a tree that has none there is nothing."""
    assert (
        text(against(layer("/new dir 755\n/new/.wh..wh..opq file 0 0\n/new/x file 644 1"), LOWER))
        == """\
/ dir 755 implied
/new dir 755
/new/x file 644 1"""
    )
    assert (
        text(against(layer("/etc/conf dir 700\n/etc/conf/.wh..wh..opq file 0 0\n/etc/conf/c file 644 1"), LOWER))
        == """\
/ dir 755 implied
/etc dir 755 mtime=5
/etc/conf dir 700
/etc/conf/a whiteout
/etc/conf/b whiteout
/etc/conf/c file 644 1"""
    )
    opaque = layer("/etc/conf dir 700\n/etc/conf/.wh..wh..opq file 0 0\n/etc/conf/a dir 755")
    assert Flag.OPAQUE in against(opaque, LOWER).entry(2).flags


@given(tables, oci_tables)
def test_against_does_the_same_to_the_tree_below(x: list[Entry], y: list[Entry]) -> None:
    lower = law_tree(x)
    try:
        changeset = regular(from_entries([e for e in y if e.kind != Kind.SYMLINK]), oci_names=True)
    except InvalidLayer:
        assume(False)
        raise
    best = against(changeset, lower)
    assert merge([lower, best]) == merge([lower, changeset])
    assert regular(best) == best


def test_strategies_make_hard_links() -> None:
    """The laws above would hold for want of anything to test them on."""
    from hypothesis import find
    from hypothesis import strategies as st

    linked = find(st.lists(entries(), max_size=9).map(hardlinked), lambda t: len({e.path for e in t if e.hardlink >= 0}) > 1)
    assert linked
