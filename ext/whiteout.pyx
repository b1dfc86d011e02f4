"""Whiteouts: which names are marks, and which rows of a layer stand. What they hide in a stack: ext/treestack.pyx."""
from libc.stdint cimport int64_t, uint8_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcmp, memcpy

from treeorder cimport Paths, length

# What a name is to the OCI format (image-spec layer.md, "Whiteouts"); tree/whiteout.py has the same numbers.
cdef enum:
    PLAIN = 0
    WHITEOUT = 1     # .wh.NAME
    OPAQUE = 2       # .wh..wh..opq
    METADATA = 3     # any other .wh..wh.*, or below one: AUFS kept its own books there
    INVALID = 4      # .wh. alone, .wh.. and .wh..., or a mark used as a directory

# Kinds and flags of a row, as in tree/entry.py.
cdef enum:
    KIND_DIR = 1
    KIND_SYMLINK = 2
    KIND_WHITEOUT = 7
    FLAG_OPAQUE = 1
    FLAG_IMPLIED = 2


cdef inline bint below(Paths p, int64_t row, int64_t upto, int64_t child) noexcept nogil:
    """Whether path `child` lies under the directory that the first `upto` bytes of path `row` name."""
    if upto == 0:
        return length(p, child) > 0
    return (
        length(p, child) > upto
        and p.arena[p.start[child] + upto] == c'/'
        and memcmp(p.arena + p.start[row], p.arena + p.start[child], upto) == 0
    )


cdef int classify_one(const uint8_t* name, int64_t n) noexcept nogil:
    """The class of one path of n bytes."""
    cdef int64_t at = 0, end
    while True:
        end = at
        while end < n and name[end] != c'/':
            end += 1
        if end - at >= 4 and memcmp(name + at, b".wh.", 4) == 0:
            if end - at >= 8 and memcmp(name + at, b".wh..wh.", 8) == 0:
                if end == n and n - at == 12 and memcmp(name + at, b".wh..wh..opq", 12) == 0:
                    return OPAQUE
                return METADATA
            if end < n or end - at == 4 or (end - at == 5 and name[at + 4] == c'.'):
                return INVALID
            if end - at == 6 and name[at + 4] == c'.' and name[at + 5] == c'.':
                return INVALID
            return WHITEOUT
        if end == n:
            return PLAIN
        at = end + 1


def classify(const uint8_t[::1] arena, const int64_t[::1] start, uint8_t[::1] out) -> int:
    """How many of the paths are no plain names; `out` gets the class of each.

    arena  uint8[m]    every path, back to back
    start  int64[n+1]  row i's path is arena[start[i]:start[i+1]]
    out    uint8[n]    written: 0 plain, 1 whiteout, 2 opaque mark, 3 AUFS metadata, 4 invalid

    In Python: [mark_of(path) for path in paths]
    O(bytes), GIL released. ValueError if the shapes disagree.
    """
    cdef int64_t n = start.shape[0] - 1, i, marks = 0
    cdef const uint8_t* data = &arena[0] if arena.shape[0] else NULL
    if n < 0 or out.shape[0] != n or start[n] != arena.shape[0]:
        raise ValueError(f"classify: shapes disagree: {n} rows, out {out.shape[0]}")
    with nogil:
        for i in range(n):
            out[i] = classify_one(data + start[i], start[i + 1] - start[i])
            marks += out[i] != PLAIN
    return marks


def strip(
    const uint8_t[::1] arena, const int64_t[::1] start, const uint8_t[::1] marks, uint8_t[::1] out, int64_t[::1] out_start
) -> int:
    """The bytes written to `out`: the paths that the marks speak of, a/.wh.b as a/b and a/.wh..wh..opq as a.

    arena      uint8[m]    every path, back to back
    start      int64[n+1]  row i's path is arena[start[i]:start[i+1]]
    marks      uint8[n]    what `classify` said; no row may be metadata or invalid
    out        uint8[m]    written
    out_start  int64[n+1]  written

    In Python: "/".join([*parts[:-1], parts[-1][4:]]) of a whiteout, "/".join(parts[:-1]) of an opaque mark
    O(bytes), GIL released. ValueError if the shapes disagree.
    """
    cdef int64_t n = start.shape[0] - 1, i, at = 0, size, name
    cdef const uint8_t* data = &arena[0] if arena.shape[0] else NULL
    cdef uint8_t* to = &out[0] if out.shape[0] else NULL
    if n < 0 or marks.shape[0] != n or out_start.shape[0] != n + 1 or out.shape[0] != arena.shape[0]:
        raise ValueError(f"strip: shapes disagree: {n} rows, marks {marks.shape[0]}, out {out.shape[0]}")
    if start[n] != arena.shape[0]:
        raise ValueError(f"strip: start ends at {start[n]}, the arena at {arena.shape[0]}")
    with nogil:
        for i in range(n):
            out_start[i] = at
            size = start[i + 1] - start[i]
            if size < 4 or marks[i] == PLAIN:
                if size > 0:
                    memcpy(to + at, data + start[i], size)
                at += size
                continue
            name = size
            while name > 0 and data[start[i] + name - 1] != c'/':
                name -= 1
            if size - name < 4:
                continue   # no mark: what `classify` said was of other paths
            if marks[i] == OPAQUE:
                size = name - 1 if name > 0 else 0
                if size > 0:
                    memcpy(to + at, data + start[i], size)
                at += size
            else:
                memcpy(to + at, data + start[i], name)
                memcpy(to + at + name, data + start[i] + name + 4, size - name - 4)
                at += size - 4
        out_start[n] = at
    return at


# --- one layer ------------------------------------------------------------------------------------------------------

# A path on the way down to the row at hand.
cdef struct Above:
    int64_t row      # the path is the first `size` bytes of this row's
    int64_t size
    int64_t out      # its place in the result; -1 until it is written
    int64_t content  # the row that decides it; -1: nobody wrote it
    int kind
    uint8_t flags
    bint replaced    # the layer has a whiteout of it


def regular(
    const uint8_t[::1] arena, const int64_t[::1] start, const int64_t[::1] order, const uint8_t[::1] same,
    const uint8_t[::1] kind, const uint8_t[::1] marks,
    int64_t[::1] out_row, int64_t[::1] out_name, int64_t[::1] out_size, uint8_t[::1] out_kind, uint8_t[::1] out_flags,
) -> int:
    """How many rows a layer made regular has: one a path, every parent there, nothing under what is not a directory.

    arena, start  paths of the n rows as they arrived, marks stripped
    order, same   int64[n], uint8[n]  what `sort_order` gave: tree order, of equal paths the later row first
    kind, marks   uint8[n], uint8[n]  what the rows are; marks 1 whiteout, 2 opaque mark
    out_row       int64[c]  written: the row that decides, -1 where nobody wrote it
    out_name      int64[c]  written: the path is the first out_size bytes of this row's
    out_size      int64[c]  written
    out_kind      uint8[c]  written
    out_flags     uint8[c]  written: OPAQUE, IMPLIED

    If the result is larger than c, call again with that much room. -1 - row if `row` lies under something that an earlier
    row made a file or a symlink. The specification is `regular` in tests/reference.py.
    O(n depth), GIL released. ValueError if the shapes disagree, MemoryError.
    """
    cdef int64_t n = start.shape[0] - 1, room = out_row.shape[0], made, i
    cdef Paths p
    if (
        n < 0 or order.shape[0] != n or same.shape[0] != n or kind.shape[0] != n or marks.shape[0] != n
        or start[n] != arena.shape[0] or out_name.shape[0] != room or out_size.shape[0] != room
        or out_kind.shape[0] != room or out_flags.shape[0] != room
    ):
        raise ValueError(f"regular: shapes disagree: {n} rows, order {order.shape[0]}, room {room}")
    for i in range(n):
        if order[i] < 0 or order[i] >= n:
            raise ValueError(f"regular: order has row {order[i]} of {n}")
    p.arena = &arena[0] if arena.shape[0] else NULL
    p.start = &start[0]
    if n == 0 or room == 0:
        return n + 1
    with nogil:
        made = regular_rows(
            p, n, &order[0], &same[0], &kind[0], &marks[0],
            room, &out_row[0], &out_name[0], &out_size[0], &out_kind[0], &out_flags[0],
        )
    if made == -2 - n:
        raise MemoryError()
    return made


cdef int64_t regular_rows(
    Paths p, int64_t n, const int64_t* order, const uint8_t* same, const uint8_t* kind, const uint8_t* marks,
    int64_t room, int64_t* out_row, int64_t* out_name, int64_t* out_size, uint8_t* out_kind, uint8_t* out_flags,
) noexcept nogil:
    """Rows made; -1 - row for one that lies under a file; -2 - n without memory."""
    cdef int64_t made = 0, i = 0, top = 0, row, content, size, at, depth = 2, deepest = 2
    cdef bint is_whiteout, is_opaque
    cdef Above* up
    for i in range(n):  # the deepest path bounds the stack
        depth = 2
        for at in range(p.start[order[i]], p.start[order[i] + 1]):
            depth += p.arena[at] == c'/'
        if depth > deepest:
            deepest = depth
    up = <Above*>malloc((deepest + 1) * sizeof(Above))
    if up == NULL:
        return -2 - n
    # The root is always there; if a row wrote it, its group comes first and decides it below.
    up[0].row = order[0]
    up[0].size = 0
    up[0].out = 0
    up[0].content = -1
    up[0].kind = KIND_DIR
    up[0].flags = FLAG_IMPLIED
    up[0].replaced = False
    top = 1
    if room > 0:
        out_row[0] = -1
        out_name[0] = order[0]
        out_size[0] = 0
        out_kind[0] = KIND_DIR
        out_flags[0] = FLAG_IMPLIED
    made = 1
    i = 0
    while i < n:
        row = order[i]
        size = length(p, row)
        content = -1
        is_whiteout = is_opaque = False
        while True:
            if marks[order[i]] == WHITEOUT:
                is_whiteout = True
            elif marks[order[i]] == OPAQUE:
                is_opaque = True
            elif content < 0:
                content = order[i]
            i += 1
            if i >= n or not same[i]:
                break
        if size == 0:  # the root: a whiteout of it is no name, so it cannot come here
            if content >= 0 and kind[content] != KIND_DIR:
                free(up)
                return -1 - content
            up[0].flags = (FLAG_OPAQUE if is_opaque else 0) | (FLAG_IMPLIED if content < 0 else 0)
            if room > 0:
                out_row[0] = content
                out_flags[0] = up[0].flags
            continue
        while not below(p, up[top - 1].row, up[top - 1].size, row):
            top -= 1
        if content < 0 and not is_opaque:
            for at in range(top):
                if up[at].replaced:
                    break
            else:
                at = top
            if at < top:
                continue  # taking away what lies under something taken away
        if up[top - 1].kind == KIND_WHITEOUT:
            # Gone and there again: it was replaced by a directory of its own.
            up[top - 1].kind = KIND_DIR
            if up[top - 1].out < room:
                out_kind[up[top - 1].out] = KIND_DIR
                out_flags[up[top - 1].out] = FLAG_OPAQUE
                out_row[up[top - 1].out] = -1
        elif up[top - 1].kind != KIND_DIR:
            if content > up[top - 1].content:
                free(up)
                return -1 - content
            continue  # it was there before a file took its parent's place
        for at in range(up[top - 1].size + 1, size):  # parents that nobody wrote down
            if p.arena[p.start[row] + at] == c'/' and at > 0:
                up[top].row = row
                up[top].size = at
                up[top].out = -1
                up[top].content = -1
                up[top].kind = KIND_DIR
                up[top].flags = FLAG_IMPLIED
                up[top].replaced = False
                top += 1
        up[top].row = row
        up[top].size = size
        up[top].out = -1
        up[top].content = content
        up[top].flags = 0
        up[top].replaced = is_whiteout
        if content >= 0:
            up[top].kind = kind[content]
            if kind[content] == KIND_DIR and (is_whiteout or is_opaque):
                up[top].flags = FLAG_OPAQUE
        elif is_opaque:
            up[top].kind = KIND_DIR
            up[top].flags = FLAG_OPAQUE if is_whiteout else FLAG_OPAQUE | FLAG_IMPLIED
        else:
            up[top].kind = KIND_WHITEOUT
        top += 1
        for at in range(top):
            if up[at].out >= 0:
                continue
            up[at].out = made
            if made < room:
                out_row[made] = up[at].content if up[at].kind != KIND_WHITEOUT else up[at].row
                out_name[made] = up[at].row
                out_size[made] = up[at].size
                out_kind[made] = up[at].kind
                out_flags[made] = up[at].flags
            made += 1
    free(up)
    return made
