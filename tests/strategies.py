"""Random layers for property tests: few names, so that they collide."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import strategies as st

from overlaykit.tree import Entry, Kind

NAMES = ["a", "b", "a-b", "a.", "é", "\udcff"]
paths = st.lists(st.sampled_from(NAMES), min_size=1, max_size=3).map("/".join)
kinds = st.sampled_from([Kind.FILE, Kind.DIR, Kind.DIR, Kind.SYMLINK, Kind.FIFO, Kind.CHAR])


@st.composite
def entries(draw: st.DrawFn, path: st.SearchStrategy[str] = paths) -> Entry:
    kind = draw(kinds)
    return Entry(
        draw(path),
        kind,
        mode=0o777 if kind == Kind.SYMLINK else draw(st.sampled_from([0o755, 0o600, 0o4755])),
        uid=draw(st.sampled_from([0, 1000])),
        size=draw(st.integers(0, 2)) if kind == Kind.FILE else 0,
        mtime_ns=draw(st.sampled_from([0, 1_500_000_000 * 10**9, 1])),
        rdev=0x103 if kind == Kind.CHAR else 0,
        link=draw(st.sampled_from(["a", "/b", "../x"])) if kind == Kind.SYMLINK else None,
        xattrs=draw(st.sampled_from([{}, {}, {"user.k": b"v"}])),
    )


def _mark(path: str, opaque: bool) -> Entry:
    head, slash, name = path.rpartition("/")
    return Entry(path + "/.wh..wh..opq" if opaque else head + slash + ".wh." + name, Kind.FILE)


marks = st.builds(_mark, paths, st.booleans())
root_opaque = st.just(Entry(".wh..wh..opq", Kind.FILE))
oci_tables = st.lists(st.one_of(entries(), entries(), marks, root_opaque), max_size=9)
plain_tables = st.lists(entries(), max_size=9)


def hardlinked(table: list[Entry]) -> list[Entry]:
    """`table` with names of one file where rows happen to have the same owner and size: all else becomes the first's."""
    first: dict[tuple[int, int], int] = {}
    linked = []
    for row, e in enumerate(table):
        key = (e.uid, e.size)
        if e.kind == Kind.FILE and ".wh." not in e.path and not e.flags:
            at = first.setdefault(key, row)
            e = replace(table[at], path=e.path, hardlink=at)
        linked.append(e)
    return linked
