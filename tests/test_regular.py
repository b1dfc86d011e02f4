"""One layer, made regular: design.md's rule by rule, the traps of whiteouts, links and symlinked parents."""

from __future__ import annotations

import pytest
import treetext
from hypothesis import given
from strategies import oci_tables
from treetext import text

from overlaykit.errors import InvalidLayer
from overlaykit.tree import Entry, Flag, Kind, from_entries, regular


def made(source: str, *, strict: bool = False) -> str:
    """The lines of the layer whose rows arrive as the lines of `source`; a file with a target is a hard link."""
    rows = [
        Entry(e.path, e.kind, flags=Flag.LOWER_LINK, link=e.link) if e.kind == Kind.FILE and e.link is not None else e
        for e in treetext.parse(source)
    ]
    layer = regular(from_entries(rows), oci_names=True, strict=strict)
    assert regular(layer) == layer
    return text(layer)


def lines(source: str) -> str:
    return "\n".join(line.strip() for line in source.strip().splitlines())


CASES = {
    "nothing is a root that nobody wrote": ("", "/ dir 755 implied"),
    "parents that nobody wrote are implied": (
        "/a/b/c file 644 1",
        """
        / dir 755 implied
        /a dir 755 implied
        /a/b dir 755 implied
        /a/b/c file 644 1
        """,
    ),
    "rows may come in any order": (
        """
        /b/c file 644 1
        /b dir 700
        / dir 711
        /a file 644 2
        """,
        """
        / dir 711
        /a file 644 2
        /b dir 700
        /b/c file 644 1
        """,
    ),
    "of two rows the later counts": (
        """
        /a file 644 1
        /d dir 700
        /a file 600 2
        /d dir 711
        """,
        """
        / dir 755 implied
        /a file 600 2
        /d dir 711
        """,
    ),
    "a file takes a directory's place with all that was there": (
        """
        /d/x file 644 1
        /d file 644 2
        """,
        """
        / dir 755 implied
        /d file 644 2
        """,
    ),
    "a directory takes a file's place": (
        """
        /d file 644 2
        /d dir 700
        /d/x file 644 1
        """,
        """
        / dir 755 implied
        /d dir 700
        /d/x file 644 1
        """,
    ),
    "a directory that was a file for a while has lost what it had": (
        """
        /d/old file 644 1
        /d file 644 2
        /d dir 700
        /d/new file 644 3
        """,
        """
        / dir 755 implied
        /d dir 700
        /d/new file 644 3
        """,
    ),
    # --- traps 1 to 5 of the whiteouts
    "trap 1: a whiteout spares what the layer has at its path, the whiteout last": (
        """
        /x file 644 1
        /.wh.x file 600 0
        """,
        """
        / dir 755 implied
        /x file 644 1
        """,
    ),
    "trap 1: and first": (
        """
        /.wh.x file 600 0
        /x file 644 1
        """,
        """
        / dir 755 implied
        /x file 644 1
        """,
    ),
    "trap 2: a whiteout beside a directory makes it opaque, the whiteout first": (
        """
        /.wh.d file 600 0
        /d dir 700
        /d/x file 644 1
        """,
        """
        / dir 755 implied
        /d dir 700 opaque
        /d/x file 644 1
        """,
    ),
    "trap 2: and last": (
        """
        /d dir 700
        /.wh.d file 600 0
        """,
        """
        / dir 755 implied
        /d dir 700 opaque
        """,
    ),
    "trap 2: a directory that nobody wrote gets 0755, root": (
        """
        /d/x file 644 1
        /.wh.d file 600 0
        """,
        """
        / dir 755 implied
        /d dir 755 opaque
        /d/x file 644 1
        """,
    ),
    "trap 3: an opaque mark spares what its own layer has, also below implied directories": (
        """
        /d/x/f file 644 1
        /d/.wh..wh..opq file 600 0
        """,
        """
        / dir 755 implied
        /d dir 755 opaque implied
        /d/x dir 755 implied
        /d/x/f file 644 1
        """,
    ),
    "trap 3: .wh..opq is a whiteout of .opq": (
        "/d/.wh..opq file 600 0",
        """
        / dir 755 implied
        /d dir 755 implied
        /d/.opq whiteout
        """,
    ),
    "trap 3: whiteouts may be hard links": (
        """
        /.wh.a file 600 0
        /.wh.b file -> .wh.a
        /d/.wh..wh..opq file -> .wh.a
        """,
        """
        / dir 755 implied
        /a whiteout
        /b whiteout
        /d dir 755 opaque implied
        """,
    ),
    "trap 3: a whiteout linked to the name that it takes away is still one": (
        "/.wh.a file -> a",
        """
        / dir 755 implied
        /a whiteout
        """,
    ),
    "trap 3: a directory or symlink named .wh.x is one as well": (
        """
        /.wh.x dir 755
        /.wh.y symlink -> z
        """,
        """
        / dir 755 implied
        /x whiteout
        /y whiteout
        """,
    ),
    "trap 3: AUFS's own books are nobody's": (
        """
        /.wh..wh.plnk dir 700
        /.wh..wh.plnk/12.3 file 644 1
        /.wh..wh.aufs file 444 0
        /a file 644 1
        """,
        """
        / dir 755 implied
        /a file 644 1
        """,
    ),
    "trap 4: an opaque mark stays one, with or without entries": (
        """
        /d dir 700
        /d/.wh..wh..opq file 600 0
        /.wh..wh..opq file 600 0
        """,
        """
        / dir 755 opaque implied
        /d dir 700 opaque
        """,
    ),
    "trap 5: an opaque mark in what is no directory says nothing": (
        """
        /d file 644 1
        /d/.wh..wh..opq file 600 0
        """,
        """
        / dir 755 implied
        /d file 644 1
        """,
    ),
    "trap 5: whiteouts below what is taken away anyway say nothing": (
        """
        /.wh.d file 600 0
        /d/.wh.x file 600 0
        /f file 644 1
        /f/.wh.x file 600 0
        """,
        """
        / dir 755 implied
        /d whiteout
        /f file 644 1
        """,
    ),
    # --- symlinked parents
    "an entry below a symlink lies where that leads": (
        """
        /usr/lib dir 755
        /lib symlink -> usr/lib
        /lib/x file 644 1
        """,
        """
        / dir 755 implied
        /lib symlink 777 -> usr/lib
        /usr dir 755 implied
        /usr/lib dir 755
        /usr/lib/x file 644 1
        """,
    ),
    "an absolute symlink leads from the root, '..' not out of it": (
        """
        /a/l symlink -> /../../b
        /a/l/x file 644 1
        """,
        """
        / dir 755 implied
        /a dir 755 implied
        /a/l symlink 777 -> /../../b
        /b dir 755 implied
        /b/x file 644 1
        """,
    ),
    "symlinks lead through symlinks": (
        """
        /a symlink -> b
        /b symlink -> c/./d
        /a/e/x file 644 1
        """,
        """
        / dir 755 implied
        /a symlink 777 -> b
        /b symlink 777 -> c/./d
        /c dir 755 implied
        /c/d dir 755 implied
        /c/d/e dir 755 implied
        /c/d/e/x file 644 1
        """,
    ),
    "a mark below a symlink acts where that leads": (
        """
        /lib symlink -> usr/lib
        /lib/x file 644 1
        /lib/.wh.y file 600 0
        """,
        """
        / dir 755 implied
        /lib symlink 777 -> usr/lib
        /usr dir 755 implied
        /usr/lib dir 755 implied
        /usr/lib/x file 644 1
        /usr/lib/y whiteout
        """,
    ),
    "what came before the symlink is gone with the directory": (
        """
        /d/old file 644 1
        /d symlink -> e
        /d/new file 644 2
        """,
        """
        / dir 755 implied
        /d symlink 777 -> e
        /e dir 755 implied
        /e/new file 644 2
        """,
    ),
    "a symlink that a directory replaced led elsewhere until then": (
        """
        /d symlink -> e
        /d/x file 644 1
        /d dir 700
        /d/y file 644 2
        """,
        """
        / dir 755 implied
        /d dir 700
        /d/y file 644 2
        /e dir 755 implied
        /e/x file 644 1
        """,
    ),
    "a symlink in a directory that was replaced leads nowhere any more": (
        """
        /p/d symlink -> /e
        /p/d/x file 644 1
        /p file 644 1
        /p dir 755
        /p/d/y file 644 2
        """,
        """
        / dir 755 implied
        /e dir 755 implied
        /e/x file 644 1
        /p dir 755
        /p/d dir 755 implied
        /p/d/y file 644 2
        """,
    ),
    # --- hard links
    "a hard link is a name of the file, with all that it has": (
        """
        /a file 4755 6 owner=5:6 mtime=1.5 xattr.user.k=v
        /b file -> a
        """,
        """
        / dir 755 implied
        /a file 4755 6 owner=5:6 mtime=1.5 xattr.user.k=v
        /b file 4755 6 owner=5:6 mtime=1.5 xattr.user.k=v hardlink=/a
        """,
    ),
    "also of a file that comes later": (
        """
        /b file -> ./z//a
        /z/a file 644 6
        """,
        """
        / dir 755 implied
        /b file 644 6
        /z dir 755 implied
        /z/a file 644 6 hardlink=/b
        """,
    ),
    "also of a symlink, a device, a fifo": (
        """
        /s symlink -> nowhere
        /s2 file -> s
        /n char 666 1:3
        /n2 file -> n
        /p fifo 600
        /p2 file -> p
        """,
        """
        / dir 755 implied
        /n char 666 1:3
        /n2 char 666 1:3 hardlink=/n
        /p fifo 600
        /p2 fifo 600 hardlink=/p
        /s symlink 777 -> nowhere
        /s2 symlink 777 hardlink=/s -> nowhere
        """,
    ),
    "also along a chain": (
        """
        /a file -> b
        /b file -> c
        /c file 644 6
        /d file -> a
        """,
        """
        / dir 755 implied
        /a file 644 6
        /b file 644 6 hardlink=/a
        /c file 644 6 hardlink=/a
        /d file 644 6 hardlink=/a
        """,
    ),
    "also through a symlinked directory": (
        """
        /bin symlink -> usr/bin
        /usr/bin/perl file 755 6
        /usr/bin/perl5 file -> bin/perl
        """,
        """
        / dir 755 implied
        /bin symlink 777 -> usr/bin
        /usr dir 755 implied
        /usr/bin dir 755 implied
        /usr/bin/perl file 755 6
        /usr/bin/perl5 file 755 6 hardlink=/usr/bin/perl
        """,
    ),
    "a link to its own path says nothing": (
        """
        /a file 644 6
        /a file -> a
        """,
        """
        / dir 755 implied
        /a file 644 6
        """,
    ),
    "the later of a file and a link counts": (
        """
        /a file 644 6
        /b file 644 7
        /b file -> a
        /c file -> a
        /c file 644 8
        """,
        """
        / dir 755 implied
        /a file 644 6
        /b file 644 6 hardlink=/a
        /c file 644 8
        """,
    ),
    "a link to a lower layer's file waits for that": (
        """
        /b file -> etc/passwd
        /c file -> gone
        /.wh.gone file 600 0
        """,
        """
        / dir 755 implied
        /b file 0 0 lower_link -> etc/passwd
        /c file 0 0 lower_link -> gone
        /gone whiteout
        """,
    ),
}


@pytest.mark.parametrize(("source", "expected"), CASES.values(), ids=CASES)
def test_regular(source: str, expected: str) -> None:
    assert made(source) == lines(expected)


BROKEN = {
    "an entry below a file": ("/f file 644 1\n/f/x file 644 1", r"f/x.*not a directory"),
    "a directory below a fifo": ("/p fifo 600\n/p/d dir 755", r"p/d"),
    "an entry below a file that a directory replaces afterwards": ("/f file 644 1\n/f/x file 644 1\n/f dir 755", "f/x"),
    "an entry below a hard link": ("/d dir 755\n/l file -> d\n/l/x file 644 1", "l/x"),
    "a hard link and then a directory": ("/a file 644 1\n/l file -> a\n/l dir 755\n/l/x file 644 1", "'l'.*hard link"),
    "a symlink that leads to itself": ("/l symlink -> l\n/l/x file 644 1", r"l/x.*symlinks"),
    "symlinks in a circle": ("/a symlink -> b\n/b symlink -> a\n/a/x file 644 1", r"a/x.*symlinks"),
    "a hard link to a directory": ("/d dir 755\n/l file -> d", "'l'.*directory 'd'"),
    "a hard link to the root": ("/l file -> .", "'l'.*directory"),
    "hard links in a circle": ("/a file -> b\n/b file -> a", "'a'.*itself"),
    "a hard link that leads to itself through a symlink": ("/s symlink -> d\n/d/a file -> s/a", "'d/a'.*itself"),
}


@pytest.mark.parametrize(("source", "message"), BROKEN.values(), ids=BROKEN)
def test_what_is_no_layer_is_named(source: str, message: str) -> None:
    with pytest.raises(InvalidLayer, match=message):
        made(source)


def test_strict_refuses_a_path_that_stands_twice() -> None:
    with pytest.raises(InvalidLayer, match="'d/a' stands in the layer twice"):
        made("/d/a file 644 1\n/b file 644 1\n/d/a file 644 1", strict=True)
    with pytest.raises(InvalidLayer, match="'d' stands"):
        made("/d dir 755\n/d dir 755", strict=True)


def test_strict_takes_a_mark_beside_an_entry_and_a_mark_twice_for_no_duplicate() -> None:
    made("/d dir 755\n/.wh.d file 0 0\n/.wh.d file 0 0\n/d/.wh..wh..opq file 0 0\n/e file -> e\n/e file 644 1", strict=True)


@given(oci_tables)
def test_the_order_of_marks_carries_no_meaning(table: list[Entry]) -> None:
    plain = [e for e in table if ".wh." not in e.path and e.kind != Kind.SYMLINK]
    marks = [e for e in table if ".wh." in e.path]
    try:
        expected = regular(from_entries([*plain, *marks]), oci_names=True)
    except InvalidLayer:
        with pytest.raises(InvalidLayer):
            regular(from_entries([*marks, *plain]), oci_names=True)
    else:
        assert regular(from_entries([*marks[::-1], *plain]), oci_names=True) == expected


def test_a_long_chain_of_hard_links_takes_no_longer_than_it_is() -> None:
    """Each link used to be followed to the file anew: a chain of 40,000, a tar of 20 MB, took minutes."""
    chain = [Entry(f"{i:05}", link=f"{i + 1:05}", flags=Flag.LOWER_LINK) for i in range(40_000)]
    layer = regular(from_entries([*chain, Entry("40000", size=3)]))
    assert set(layer.hardlink.tolist()) == {-1, 0}
    assert set(layer.size.tolist()) == {0, 3}


def test_directories_that_nobody_wrote_cannot_cost_more_than_the_layer() -> None:
    """A path of 32 KiB, 16,000 directories deep, used to be made up in all its beginnings: a quarter of a GiB for one entry,
    and a tar of a few MB could ask for all memory there is."""
    with pytest.raises(InvalidLayer, match="too deep"):
        regular(from_entries([Entry("a/" * 16_000 + "x")]))
    with pytest.raises(InvalidLayer, match="directories that no entry"):
        regular(from_entries([Entry(f"{i}/" + "a/" * 1200 + "x") for i in range(1000)]))
    assert len(regular(from_entries([Entry("a/" * 5000 + "x")]))) == 5002
