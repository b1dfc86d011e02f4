"""What only root can put on disk, from a record beside it: owners, devices, and the xattrs of trusted and security.

An ordinary user unpacks a layer without them. Its tree, saved, is the record; with it the directory can be packed again as
what it stands for.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from overlaykit.tree.diff import rows_in
from overlaykit.tree.regular import regular
from overlaykit.tree.table import IMPLIED_MODE, Flag, Kind, Rows, Tree, Xattrs, concat

ROOTS_XATTRS = ("trusted.", "security.")


def as_recorded(found: Tree, record: Tree, *, uid: int, gid: int) -> Tree:
    """`found`, scanned of what user uid:gid has on disk, as it would be as root's.

    What `record` says of a path counts where that is still of the same kind. New files of the user's are root's. A device
    that is not there is, if its directory is: nobody but root could have made it, or have removed it.
    """
    known, theirs = _same_kind(found, record)
    # A directory that no entry wrote was made all the same.
    unwritten = ((record.flags[theirs] & Flag.IMPLIED) != 0) & (found.mode[known] == IMPLIED_MODE)
    flags, mtime_ns = found.flags.copy(), found.mtime_ns.copy()
    flags[known[unwritten]] |= np.uint8(Flag.IMPLIED)
    mtime_ns[known[unwritten]] = record.mtime_ns[theirs[unwritten]]
    owned = with_owners_of(found, record, uid=uid, gid=gid).with_columns(flags=flags, mtime_ns=mtime_ns)
    whole = _with_xattrs(owned, record, known, theirs)
    here = rows_in(found, record)
    missing = np.flatnonzero((here < 0) & ((record.kind == Kind.CHAR) | (record.kind == Kind.BLOCK)))
    home = here[record.parents[missing]]
    missing = missing[(home >= 0) & (found.kind[home] == Kind.DIR)]
    return regular(concat([whole, record.take(missing)], relabel=False)) if len(missing) else whole


def with_owners_of(found: Tree, record: Tree, *, uid: int, gid: int) -> Tree:
    """`found` with the owners that its files would have as root's: one that `record` has keeps the owner it has there, a new
    one of user uid:gid is root's."""
    known, theirs = _same_kind(found, record)
    columns = {}
    for name, own in (("uid", uid), ("gid", gid)):
        column = getattr(found, name)
        columns[name] = np.where(column == own, 0, column)
        columns[name][known] = getattr(record, name)[theirs]
    return found.with_columns(**columns)


def _same_kind(found: Tree, record: Tree) -> tuple[Rows, Rows]:
    """The rows of `found` that `record` has as something of the same kind, and its rows of them."""
    rows = rows_in(record, found)
    known = np.flatnonzero(rows >= 0)
    known = known[(record.kind[rows[known]] == found.kind[known]) & (found.kind[known] != Kind.WHITEOUT)]
    return known, rows[known]


def _with_xattrs(found: Tree, record: Tree, known: Rows, theirs: Rows) -> Tree:
    """`found` with those xattrs of `record` that it lacks and only root can set."""
    wanted = record.xattrs[theirs] >= 0
    known, theirs = known[wanted], theirs[wanted]
    sets: list[Xattrs] = list(found.xattr_sets)
    xattrs = found.xattrs.copy()
    merged: dict[tuple[int, int], int] = {}  # of the sets of both: the one that has all
    for row, own, other in zip(known.tolist(), xattrs[known].tolist(), record.xattrs[theirs].tolist(), strict=True):
        if (own, other) not in merged:
            has = found.xattr_sets[own] if own >= 0 else {}
            lacks = {
                name: value
                for name, value in record.xattr_sets[other].items()
                if name not in has and name.startswith(ROOTS_XATTRS)
            }
            merged[own, other] = len(sets) if lacks else own
            if lacks:
                sets.append({**has, **lacks})
        xattrs[row] = merged[own, other]
    return replace(found.with_columns(xattrs=xattrs), xattr_sets=tuple(sets))
