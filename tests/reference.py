"""The specification in plain Python: what the kernels must do, in the fewest lines that say it.

A table is a list of Entry in the order in which they arrived; a layer, once regular, is a dict path -> Entry. Lists of
layers run bottom first. Nothing here is fast, and nothing here knows numpy.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from overlaykit.tree import Entry, Flag, Kind

Layer = dict[str, Entry]
IMPLIED = Entry("", Kind.DIR, 0o755, flags=Flag.IMPLIED)


def tree_key(path: str) -> bytes:
    """Sort key of tree order: '/' below every other byte, so that a subtree is one run."""
    return path.encode("utf-8", "surrogateescape").replace(b"/", b"\0")


def parent(path: str) -> str:
    return path.rpartition("/")[0]


def ancestors(path: str) -> Iterator[str]:
    """The directories above `path`, nearest first, the root last."""
    while path:
        path = parent(path)
        yield path


def mark_of(path: str) -> int:
    """0 plain, 1 whiteout, 2 opaque mark, 3 AUFS metadata, 4 invalid: the numbers of ext/whiteout.pyx."""
    *above, name = path.split("/")
    for part in above:
        if part.startswith(".wh..wh."):
            return 3
        if part.startswith(".wh."):
            return 4
    if name == ".wh..wh..opq":
        return 2
    if name.startswith(".wh..wh."):
        return 3
    if name.startswith(".wh."):
        return 4 if name[4:] in ("", ".", "..") else 1
    return 0


def strip(path: str) -> str:
    """What a mark speaks of: a/.wh.b is a/b, a/.wh..wh..opq is a."""
    kind = mark_of(path)
    if kind == 2:
        return parent(path)
    if kind == 1:
        head, slash, name = path.rpartition("/")
        return head + slash + name[4:]
    return path


def regular(table: Iterable[Entry]) -> Layer:
    """One layer of OCI rows made regular. ValueError for an entry below a file.

    What something else than a directory replaces is gone with all below, as extraction would have it.
    """
    rows = [(e, mark_of(e.path)) for e in table]
    rows = [(replace(e, path=strip(e.path)), mark) for e, mark in rows if mark != 3]
    content: Layer = {}
    above: set[str] = set()  # paths that have had something below them

    def under_a_file(path: str) -> bool:
        return any(up in content and content[up].kind != Kind.DIR for up in ancestors(path))

    for e, mark in rows:
        if mark == 0:
            if under_a_file(e.path):
                raise ValueError(e.path)
            if e.kind != Kind.DIR and e.path in above:
                content = {path: entry for path, entry in content.items() if e.path not in ancestors(path)}
            content[e.path] = e
            above.update(ancestors(e.path))
    whiteouts = {e.path for e, mark in rows if mark == 1}
    opaque = {e.path for e, mark in rows if mark == 2}

    out: Layer = {"": IMPLIED}
    for path in sorted({*content, *opaque}, key=tree_key):
        if under_a_file(path):
            continue  # an opaque mark of nothing
        for up in reversed([*ancestors(path)]):
            out.setdefault(up, replace(IMPLIED, path=up))
        entry = content.get(path, replace(IMPLIED, path=path))
        if path in opaque and entry.kind == Kind.DIR:
            entry = replace(entry, flags=entry.flags | Flag.OPAQUE)
        out[path] = entry
    for path in whiteouts:
        if path in out and out[path].kind == Kind.DIR:  # gone and there again: replaced by a directory of its own
            out[path] = replace(out[path], flags=(out[path].flags | Flag.OPAQUE) & ~Flag.IMPLIED)
    for path in sorted(whiteouts - set(out), key=tree_key):
        if any(up in whiteouts or (up in out and out[up].kind != Kind.DIR) for up in ancestors(path)):
            continue
        for up in reversed([*ancestors(path)]):
            out.setdefault(up, replace(IMPLIED, path=up))
        out[path] = Entry(path, Kind.WHITEOUT)
    return {path: out[path] for path in sorted(out, key=tree_key)}


def resolve(layers: list[Layer], *, keep_whiteouts: bool) -> Layer:
    """What one sees of regular layers (merge), or one changeset that does what all do (keep_whiteouts: squash)."""
    out: Layer = {}
    floor = {"": 0}  # floor[P]: the lowest layer whose rows under P may show
    for path in sorted(set().union(*layers), key=tree_key):
        if path and parent(path) not in floor:
            continue
        lowest = floor[parent(path)] if path else 0
        have = [n for n in range(len(layers) - 1, lowest - 1, -1) if path in layers[n]]
        if not have:
            continue
        top = layers[have[0]][path]
        if top.kind != Kind.DIR:
            if top.kind != Kind.WHITEOUT or keep_whiteouts:
                out[path] = top
            continue
        written, opaque, cut = None, False, False
        for n in have:
            entry = layers[n][path]
            if entry.kind != Kind.DIR:
                cut = True
                break
            if not opaque:  # names stop showing after an opaque mark ...
                floor[path] = n
                opaque = bool(entry.flags & Flag.OPAQUE)
            if written is None and not entry.flags & Flag.IMPLIED:  # ... attributes are looked for below it too
                written = entry
        flags = Flag.OPAQUE if keep_whiteouts and (opaque or cut) else Flag.NONE
        if written is None and keep_whiteouts and not cut:
            flags |= Flag.IMPLIED
        out[path] = replace(written or replace(IMPLIED, path=path), flags=flags)
    return out


def merge(layers: list[Layer]) -> Layer:
    return resolve(layers, keep_whiteouts=False) or {"": replace(IMPLIED)}


def squash(layers: list[Layer]) -> Layer:
    return resolve(layers, keep_whiteouts=True) or {"": replace(IMPLIED)}


def diff(lower: Layer, upper: Layer) -> Layer:
    """The changeset that leads from one merged tree to another. Hard links are not its business."""
    out: Layer = {}
    for path in sorted({*lower, *upper}, key=tree_key):
        if path in upper:
            if lower.get(path) != upper[path]:
                out[path] = upper[path]
        elif all(up in upper and upper[up].kind == Kind.DIR for up in ancestors(path)):
            out[path] = Entry(path, Kind.WHITEOUT)
    for path in [*out]:
        for up in ancestors(path):
            out.setdefault(up, replace(IMPLIED, path=up))
    out.setdefault("", IMPLIED)
    return {path: out[path] for path in sorted(out, key=tree_key)}
