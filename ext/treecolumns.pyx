"""The columns of rows picked from several trees, in pieces of neighbours as ext/treestack.pyx gives them."""
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcmp, memcpy

# What a column's values are does not matter here, only how many bytes one has.
ctypedef fused Value:
    uint8_t
    uint16_t
    uint32_t
    uint64_t


cdef void pick(
    const uint8_t** parts, const uint16_t* source, const int64_t* row, const int64_t* begin, int64_t n, Value* out
) noexcept nogil:
    cdef int64_t i, j, size
    cdef const Value* values
    cdef Value* to
    for i in range(n):
        values = <const Value*>parts[source[i]] + row[i]
        to = out + begin[i]
        size = begin[i + 1] - begin[i]
        if size < 16:   # most pieces are small, and a call costs more than a few values
            for j in range(size):
                to[j] = values[j]
        else:
            memcpy(to, values, size * sizeof(Value))


def gather(
    list column, const uint16_t[::1] source, const int64_t[::1] row, const int64_t[::1] begin, int width, uint8_t[::1] out
) -> None:
    """Fill `out` with a column's values in the rows that stand in p pieces of k layers.

    column  k of uint8[n * width]  a layer's values as bytes
    source  uint16[p]              a piece's layer
    row     int64[p]               its first row there
    begin   int64[p+1]             its first row in the result
    width   bytes a value: 1, 2, 4 or 8
    out     uint8[begin[p] * width]  written

    In Python: out[begin[i]:begin[i + 1]] = column[source[i]][row[i]:row[i] + begin[i + 1] - begin[i]]
    O(rows), GIL released. ValueError if the shapes disagree, IndexError for a row that is not there, MemoryError.
    """
    cdef int64_t p = source.shape[0], k = len(column), at, i, size
    cdef const uint8_t[::1] part
    cdef const uint8_t** parts
    cdef int64_t* sizes
    cdef bint wrong = False
    if width not in (1, 2, 4, 8) or row.shape[0] != p or begin.shape[0] != p + 1 or begin[0] != 0:
        raise ValueError(f"gather: shapes disagree: {p} pieces, {row.shape[0]} rows, {begin.shape[0]} begins, {width} bytes")
    if begin[p] * width != out.shape[0]:
        raise ValueError(f"gather: {begin[p]} rows of {width} bytes, but room for {out.shape[0]} bytes")
    if p == 0:
        return
    parts = <const uint8_t**>malloc(k * (sizeof(uint8_t*) + sizeof(int64_t)) + 1)
    if parts == NULL:
        raise MemoryError()
    sizes = <int64_t*>(parts + k)
    try:
        for at in range(k):
            part = column[at]
            sizes[at] = part.shape[0] // width
            parts[at] = &part[0] if part.shape[0] else NULL
        with nogil:
            for i in range(p):
                size = begin[i + 1] - begin[i]
                if source[i] >= k or size < 0 or row[i] < 0 or row[i] > sizes[source[i]] - size:
                    wrong = True
                    break
            if not wrong and width == 1:
                pick[uint8_t](parts, &source[0], &row[0], &begin[0], p, &out[0])
            elif not wrong and width == 2:
                pick[uint16_t](parts, &source[0], &row[0], &begin[0], p, <uint16_t*>&out[0])
            elif not wrong and width == 4:
                pick[uint32_t](parts, &source[0], &row[0], &begin[0], p, <uint32_t*>&out[0])
            elif not wrong:
                pick[uint64_t](parts, &source[0], &row[0], &begin[0], p, <uint64_t*>&out[0])
        if wrong:
            raise IndexError(f"gather: row {row[i]} of layer {source[i]} is not there, or not {size} from there on")
    finally:
        free(parts)


def uniform(list column, int width) -> bool:
    """Whether a column has one value in all rows of k layers: the owner, mostly, or that there is no device.

    column  k of uint8[n * width]  a layer's values as bytes
    width   bytes a value

    In Python: len(set(values)) == 1
    O(n), GIL released while a layer is looked at.
    """
    cdef const uint8_t[::1] part
    cdef const uint8_t* first = NULL
    cdef const uint8_t* at
    cdef int64_t size
    cdef bint same
    if width < 1:
        raise ValueError(f"uniform: {width} bytes a value")
    for part in column:
        size = part.shape[0]
        if size < width:
            continue
        at = &part[0]
        if first == NULL:
            first = at
        with nogil:
            same = memcmp(first, at, width) == 0 and memcmp(at, at + width, size - width) == 0
        if not same:
            return False
    return first != NULL
