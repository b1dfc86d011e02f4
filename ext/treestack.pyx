"""A stack of layers to what one sees of it: merging and whiteouts in one pass. Their columns: ext/treecolumns.pyx."""
from libc.stdint cimport int64_t, uint8_t, uint16_t
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memchr, memcpy, memset

from treeorder cimport common, compare, prefetch, weight

# Kinds and flags of a row, as in tree/entry.py.
cdef enum:
    KIND_DIR = 1
    KIND_WHITEOUT = 7
    FLAG_OPAQUE = 1
    FLAG_IMPLIED = 2

cdef enum:
    STREAK = 1         # rows of one layer, one after another, before the end of a run is looked for,
    STEP = 4           # in steps of so many,
    STEPS = 16         # which grow after so many
    NO_MEMORY = -1
    UNSORTED = -2      # and below: of layer -2 - status


# --- what one sees --------------------------------------------------------------------------------------------------
#
# Every layer has a head, its next row, and knows how many leading bytes that shares with the row written last. The head
# that shares most comes first; only heads that share equally much are compared, from that byte on. So a merge reads each
# byte of each path about once, however long the common prefixes are, and what a layer alone has goes by without comparing.
# The heads stand in a tree of losers: a new head meets the losers between its leaf and the root, log2(k) of them.
#
# Rows that share more with the last one than any other head does are the layer's own: where a few have come one after
# another, the end of their run is looked for in growing steps, and the run is written in one piece.

cdef struct Layer:
    const uint8_t* path     # the head's
    int64_t size            # of it, in bytes
    int64_t shared          # leading bytes it shares with the row written last; -1: the layer is used up
    const int64_t* start
    const uint8_t* kind
    const uint8_t* flags
    int64_t row             # the head
    int64_t n

# A visible directory on the way down.
cdef struct Shown:
    int64_t size    # bytes of its path
    int64_t floor   # the lowest layer whose rows under it may show

# What is written. Rows that are neighbours in one layer and in the result are one piece of it.
cdef struct Stack:
    uint16_t* layer         # a row's uppermost layer that has the path
    uint8_t* flags
    int64_t* start
    uint8_t* arena
    uint16_t* source        # a piece's layer,
    int64_t* row            # its first row there,
    int64_t* begin          # and its first row in the result
    int64_t pieces
    int64_t next            # the row of the last piece's layer that would make it longer
    int64_t made            # rows written
    int64_t unwritten       # directories among them whose attributes no layer wrote
    int64_t written         # bytes of the arena written,
    const uint8_t* pending  # and paths that are still to be copied there
    int64_t waiting         # (bytes)
    Shown* shown            # the visible directories on the way down to the row at hand
    int64_t top
    int64_t room


cdef inline int64_t play(Layer* layers, int64_t a, int64_t b) noexcept nogil:
    """Which of two heads comes first; of equal paths the upper layer's. The other now knows what it shares with it."""
    cdef int64_t shared = layers[a].shared
    cdef int order
    if shared != layers[b].shared:
        return a if shared > layers[b].shared else b
    if shared < 0:
        return a
    order = compare(layers[a].path, layers[a].size, layers[b].path, layers[b].size, &shared)
    if order < 0 or (order == 0 and a > b):
        layers[b].shared = shared
        return a
    layers[a].shared = shared
    return b


cdef inline bint advance(Layer* layer) noexcept nogil:
    """Go on to the layer's next row. False if that is not after the one before it."""
    cdef const uint8_t* last = layer.path
    cdef int64_t size = layer.size, shared
    layer.row += 1
    if layer.row == layer.n:
        layer.shared = -1
        return True
    layer.path = last + size
    layer.size = layer.start[layer.row + 1] - layer.start[layer.row]
    shared = common(last, layer.path, 0, size if size < layer.size else layer.size)
    layer.shared = shared
    return shared < layer.size and (shared == size or weight(last[shared]) < weight(layer.path[shared]))


cdef inline int64_t most_shared(const Layer* layers, const int64_t* losers, int64_t node) noexcept nogil:
    """The most that any head which lost on the way from `node` to the root shares with the row written last."""
    cdef int64_t most = -1
    while node > 0:
        if layers[losers[node]].shared > most:
            most = layers[losers[node]].shared
        node >>= 1
    return most


cdef inline bint begins(const Layer* layer, int64_t row, const uint8_t* prefix, int64_t n) noexcept nogil:
    """Whether a later row of the layer begins with the n bytes at prefix, which are part of its head."""
    cdef int64_t at = layer.start[row] - layer.start[layer.row]
    return layer.start[row + 1] - layer.start[row] >= n and common(layer.path + at, prefix, 0, n) == n


cdef int64_t run_end(const Layer* layer, int64_t n) noexcept nogil:
    """The first row after the head that does not begin with the head's first n bytes; the head if it is near."""
    cdef int64_t low = layer.row, high, step = STEP, steps = 0, middle
    while low + step < layer.n and begins(layer, low + step, layer.path, n):
        low += step
        if low + 3 * step < layer.n:
            prefetch(layer.path + (layer.start[low + 3 * step] - layer.start[layer.row]))
        steps += 1
        if steps >= STEPS:   # until then the next probe is in the cache before it is asked for
            step *= 2
    if steps == 0:
        return low
    high = low + step if low + step < layer.n else layer.n
    while high - low > 1:
        middle = (low + high) // 2
        if begins(layer, middle, layer.path, n):
            low = middle
        else:
            high = middle
    return high


cdef inline void put_paths(Stack* out, const uint8_t* path, int64_t size) noexcept nogil:
    """Add paths to the result: neighbours in a layer's arena wait until they can go in one piece."""
    if path != out.pending + out.waiting:
        if out.waiting > 0:
            memcpy(out.arena + out.written, out.pending, out.waiting)
            out.written += out.waiting
        out.pending = path
        out.waiting = 0
    out.waiting += size


cdef int push(Stack* out, int64_t size, int64_t floor) noexcept nogil:
    """One more visible directory on the way down. 0 or NO_MEMORY."""
    cdef Shown* grown
    if out.top == out.room:
        grown = <Shown*>realloc(out.shown, 2 * out.room * sizeof(Shown))
        if grown == NULL:
            return NO_MEMORY
        out.shown = grown
        out.room *= 2
    out.shown[out.top].size = size
    out.shown[out.top].floor = floor
    out.top += 1
    return 0


cdef inline void put_piece(Stack* out, int64_t layer, int64_t row, int64_t n) noexcept nogil:
    """Say where the next n rows of the result come from."""
    if out.pieces == 0 or out.next != row or out.source[out.pieces - 1] != layer:
        out.source[out.pieces] = <uint16_t>layer
        out.row[out.pieces] = row
        out.begin[out.pieces] = out.made
        out.pieces += 1
    out.next = row + n


cdef void put_other(Stack* out, int64_t layer, int64_t row) noexcept nogil:
    """The last row written has its attributes from elsewhere."""
    out.made -= 1
    if out.begin[out.pieces - 1] == out.made:
        out.pieces -= 1
    out.next = -1
    put_piece(out, layer, row, 1)
    out.made += 1


cdef void put_rows(Layer* layer, int64_t number, int64_t row, int64_t end, uint8_t mask, Stack* out) noexcept nogil:
    """Write the layer's rows row:end, all of which show. mask: the flags that stay."""
    cdef int64_t i, shift = out.start[out.made] - layer.start[row]
    cdef uint16_t* to_layer = out.layer + out.made - row
    cdef uint8_t* to_flags = out.flags + out.made - row
    cdef int64_t* to_start = out.start + out.made - row
    cdef uint8_t seen = 0
    put_paths(out, layer.path + (layer.start[row] - layer.start[layer.row]), layer.start[end] - layer.start[row])
    put_piece(out, number, row, end - row)
    for i in range(row, end):
        to_layer[i] = <uint16_t>number
    for i in range(row, end):
        to_flags[i] = layer.flags[i] & mask
        seen |= layer.flags[i]
    if seen & FLAG_IMPLIED:
        for i in range(row, end):
            out.unwritten += (layer.flags[i] & FLAG_IMPLIED) != 0
    for i in range(row + 1, end + 1):
        to_start[i] = layer.start[i] + shift
    out.made += end - row


cdef void put_run(Layer* layer, int64_t number, int64_t end, bint keep_whiteouts, Stack* out) noexcept nogil:
    """Write the layer's rows from its head to `end`, of which all parents show."""
    cdef int64_t row = layer.row, stop
    cdef const uint8_t* gone
    if keep_whiteouts:
        put_rows(layer, number, row, end, 0xFF, out)
        return
    while row < end:
        gone = <const uint8_t*>memchr(layer.kind + row, KIND_WHITEOUT, end - row)
        stop = gone - layer.kind if gone != NULL else end
        if stop > row:
            put_rows(layer, number, row, stop, <uint8_t>~(FLAG_OPAQUE | FLAG_IMPLIED), out)
        row = stop + 1


cdef int64_t resolve_rows(Layer* layers, int64_t k, int64_t* losers, bint keep_whiteouts, Stack* out) noexcept nogil:
    """0, or a status. losers has room for 2 * width, the power of two from k on; layers for width."""
    cdef int64_t width = 1, i, w, other, node, end
    cdef int64_t size, last_size = -1, shared, parent = 0, floor = 0, bound, streak = 0
    cdef const uint8_t* path
    cdef uint8_t kind, flags
    cdef bint open = False               # the path at hand is a directory, and lower layers may have a say in it
    cdef bint opaque = False, attributes = False
    cdef Layer* layer
    while width < k:
        width *= 2
    for i in range(width):
        losers[width + i] = i   # winners, while the tree is built
    for node in range(width - 1, 0, -1):
        w = play(layers, losers[2 * node], losers[2 * node + 1])
        losers[node] = w
    # Each inner node has its winner; what stays in it is the loser.
    w = losers[1]
    for node in range(1, width):
        losers[node] = losers[2 * node] + losers[2 * node + 1] - losers[node]
    bound = most_shared(layers, losers, (width + w) // 2)
    out.start[0] = 0
    while layers[w].shared >= 0:
        layer = &layers[w]
        path = layer.path
        size = layer.size
        shared = layer.shared
        kind = layer.kind[layer.row]
        flags = layer.flags[layer.row]
        if shared == last_size and size == shared:   # a lower layer's row of the same path
            if open:
                if w < floor:
                    open = False
                elif kind != KIND_DIR:
                    open = False
                    if keep_whiteouts:
                        out.flags[out.made - 1] = FLAG_OPAQUE
                else:
                    if not attributes and not flags & FLAG_IMPLIED:
                        # looked for below an opaque mark too: the mark takes the children, not the mode
                        attributes = True
                        out.unwritten -= 1
                        put_other(out, w, layer.row)
                        out.flags[out.made - 1] &= <uint8_t>~FLAG_IMPLIED
                    if not opaque:
                        out.shown[out.top - 1].floor = w
                        opaque = flags & FLAG_OPAQUE
                        if opaque and keep_whiteouts:
                            out.flags[out.made - 1] |= FLAG_OPAQUE
        else:
            # Layers are regular, so the row before this one is its parent, or under its parent. The parent's path ends
            # where it did, unless the two rows part before that.
            if shared == last_size and (shared == 0 or path[shared] == c'/'):
                parent = shared
            elif shared <= parent:
                parent = shared
                while parent > 0 and path[parent] != c'/':
                    parent -= 1
            while out.top > 0 and out.shown[out.top - 1].size > parent:
                out.top -= 1
            open = False
            last_size = size
            if size == 0:
                out.top = 0
                floor = 0
            elif out.top == 0 or out.shown[out.top - 1].size != parent:
                floor = k   # the parent does not show, and neither does this
            else:
                floor = out.shown[out.top - 1].floor
            if w >= floor and (kind != KIND_WHITEOUT or keep_whiteouts):
                i = out.made
                out.layer[i] = <uint16_t>w
                out.start[i + 1] = out.start[i] + size
                put_paths(out, path, size)
                put_piece(out, w, layer.row, 1)
                if kind == KIND_DIR:
                    open = True
                    attributes = not flags & FLAG_IMPLIED
                    opaque = flags & FLAG_OPAQUE
                    out.unwritten += not attributes
                    flags = flags & (FLAG_OPAQUE | FLAG_IMPLIED) if keep_whiteouts else 0
                    if push(out, size, w) < 0:
                        return NO_MEMORY
                out.flags[i] = flags
                out.made += 1
        if not advance(layer):
            return UNSORTED - w
        if layer.shared > bound:
            streak += 1
            # Nothing of another layer comes before the end of the run. Do all its parents show? They are in it, or above
            # the row just read: then it is enough that the nearest of those does.
            if (
                streak >= STREAK and out.top > 0 and out.shown[out.top - 1].floor <= w
                and out.shown[out.top - 1].size == (last_size if kind == KIND_DIR else parent)
            ):
                streak = 0
                end = run_end(layer, bound + 1)
                if end > layer.row:
                    put_run(layer, w, end, keep_whiteouts, out)
                    # Go on as if every row had been read: the directories down to the last of them.
                    size = layer.start[end] - layer.start[end - 1]
                    shared = common(path, layer.path + (layer.start[end - 1] - layer.start[layer.row]), 0,
                                    last_size if last_size < size else size)
                    path = layer.path + (layer.start[end - 1] - layer.start[layer.row])
                    while out.top > 0 and out.shown[out.top - 1].size > 0 and (
                        out.shown[out.top - 1].size > shared
                        or (out.shown[out.top - 1].size < size and path[out.shown[out.top - 1].size] != c'/')
                    ):
                        out.top -= 1
                    parent = out.shown[out.top - 1].size
                    for i in range(parent + 1, size):
                        if path[i] == c'/':
                            parent = i
                            if push(out, i, w) < 0:
                                return NO_MEMORY
                    if layer.kind[end - 1] == KIND_DIR and push(out, size, w) < 0:
                        return NO_MEMORY
                    open = False
                    last_size = size
                    layer.row = end - 1
                    layer.path = path
                    layer.size = size
                    if not advance(layer):
                        return UNSORTED - w
            if layer.shared > bound:
                continue
        streak = 0
        node = (width + w) // 2
        while node > 0:
            other = losers[node]
            i = play(layers, w, other)
            losers[node] = w + other - i
            w = i
            node >>= 1
        bound = most_shared(layers, losers, (width + w) // 2)
    if out.waiting > 0:
        memcpy(out.arena + out.written, out.pending, out.waiting)
    return 0


cdef bint falls(const int64_t* start, int64_t n) noexcept nogil:
    """Whether any offset is less than the one before it."""
    cdef int64_t i, steps = 0
    for i in range(n):   # to the end, come what may, and without comparing: so it takes several at a time
        steps |= start[i + 1] - start[i]
    return steps < 0


def resolve(
    list arenas, list starts, list kinds, list flags, bint keep_whiteouts, uint16_t[::1] out_layer, uint8_t[::1] out_flags,
    int64_t[::1] out_start, uint8_t[::1] out_arena, uint16_t[::1] out_source, int64_t[::1] out_row, int64_t[::1] out_begin,
) -> tuple[int, int, int]:
    """How many paths of k regular layers one sees, in how many pieces, and how many are directories that nobody wrote.

    arenas          k of uint8[m]    every path of a layer in tree order, back to back; layer 0 is the bottom
    starts          k of int64[n+1]  row i's path is arena[start[i]:start[i+1]]
    kinds, flags    k of uint8[n] each
    keep_whiteouts  False: merge, what one sees; True: squash, one changeset that does what all do
    out_layer       uint16[N]   written: the uppermost layer that has the path; N is the sum of all n
    out_flags       uint8[N]    written: OPAQUE and IMPLIED of the result
    out_start       int64[N+1]  written: the paths of the result
    out_arena       uint8[M]    written; M is the sum of all m

    The mode, owner, times and xattrs that count are those of the rows that stand in pieces of layers, each as long as the
    next one's begin allows. Of a directory that nobody wrote it is the uppermost layer's row.

    out_source      uint16[N]   written: a piece's layer
    out_row         int64[N]    written: its first row there
    out_begin       int64[N+1]  written: its first row in the result; after the last, the number of rows

    The specification is `resolve` in tests/reference.py; see also image-spec layer.md, "Whiteouts", and the kernel's
    overlayfs.rst, "Merged directories".
    O(N log k), GIL released. ValueError if the shapes disagree or a layer is not in tree order, MemoryError.
    """
    cdef int64_t k = len(arenas), width = 1, rows = 0, size = 0, status = 0, n, at
    cdef const uint8_t[::1] bytes_view
    cdef const int64_t[::1] start_view
    cdef Stack out
    cdef Layer* layers
    cdef int64_t* losers
    if not k == len(starts) == len(kinds) == len(flags) or not 0 < k <= 0xFFFF:
        raise ValueError(f"resolve: {k} arenas, {len(starts)} starts, {len(kinds)} kinds, {len(flags)} flags")
    while width < k:
        width *= 2
    layers = <Layer*>malloc(width * sizeof(Layer) + 2 * width * sizeof(int64_t))
    if layers == NULL:
        raise MemoryError()
    losers = <int64_t*>(layers + width)
    memset(&out, 0, sizeof(Stack))
    try:
        for at in range(width):
            layers[at].shared = -1
        for at in range(k):
            start_view = starts[at]
            n = start_view.shape[0] - 1
            bytes_view = arenas[at]
            if n < 0 or start_view[0] != 0 or start_view[n] != bytes_view.shape[0]:
                raise ValueError(f"resolve: layer {at}: start must run from 0 to {bytes_view.shape[0]}")
            if falls(&start_view[0], n):
                raise ValueError(f"resolve: layer {at}: start falls")
            layers[at].path = &bytes_view[0] if bytes_view.shape[0] else NULL
            layers[at].start = &start_view[0]
            layers[at].size = start_view[1] if n > 0 else 0
            layers[at].row = 0
            layers[at].n = n
            layers[at].shared = 0 if n > 0 else -1
            rows += n
            size += bytes_view.shape[0]
            bytes_view = kinds[at]
            if bytes_view.shape[0] != n:
                raise ValueError(f"resolve: layer {at}: {n} rows, {bytes_view.shape[0]} kinds")
            layers[at].kind = &bytes_view[0] if n else NULL
            bytes_view = flags[at]
            if bytes_view.shape[0] != n:
                raise ValueError(f"resolve: layer {at}: {n} rows, {bytes_view.shape[0]} flags")
            layers[at].flags = &bytes_view[0] if n else NULL
        if (
            out_layer.shape[0] != rows or out_source.shape[0] != rows or out_row.shape[0] != rows
            or out_begin.shape[0] != rows + 1
            or out_flags.shape[0] != rows or out_start.shape[0] != rows + 1 or out_arena.shape[0] != size
        ):
            raise ValueError(f"resolve: shapes disagree: {rows} rows of {size} bytes, out {out_row.shape[0]}")
        out_start[0] = out_begin[0] = 0
        if rows > 0:
            out.room = 64
            out.shown = <Shown*>malloc(out.room * sizeof(Shown))
            if out.shown == NULL:
                raise MemoryError()
            out.layer = &out_layer[0]
            out.source = &out_source[0]
            out.row = &out_row[0]
            out.begin = &out_begin[0]
            out.flags = &out_flags[0]
            out.start = &out_start[0]
            out.arena = &out_arena[0] if size else NULL
            with nogil:
                status = resolve_rows(layers, k, losers, keep_whiteouts, &out)
        if status == NO_MEMORY:
            raise MemoryError()
        if status < 0:
            at = UNSORTED - status
            raise ValueError(f"resolve: layer {at} is not in tree order at row {layers[at].row}")
        out_begin[out.pieces] = out.made
        return out.made, out.pieces, out.unwritten
    finally:
        free(out.shown)
        free(layers)
