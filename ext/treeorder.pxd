"""Header: byte strings back to back, and the order of paths.

Tree order is bytewise with '/' below every other byte, so that a directory is followed at once by all that lies under it
("etc", "etc/passwd", "etc-old"). A path has no NUL, so '/' can stand as 0, below which only the end of the path comes.
"""
from libc.stdint cimport int64_t, uint8_t, uint64_t
from libc.string cimport memcpy


cdef struct Paths:
    const uint8_t* arena   # every path, back to back
    const int64_t* start   # path i is arena[start[i]:start[i + 1]]


cdef inline int64_t length(Paths p, int64_t i) noexcept nogil:
    return p.start[i + 1] - p.start[i]


cdef inline int weight(uint8_t byte) noexcept nogil:
    """Where a byte stands in tree order."""
    return 0 if byte == c'/' else byte


cdef extern from *:
    """
    /* The index of the first byte in which two words from memory differ. */
    static inline int overlaykit_first_difference(unsigned long long x, unsigned long long y) {
    #if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
        return __builtin_clzll(x ^ y) >> 3;
    #else
        return __builtin_ctzll(x ^ y) >> 3;
    #endif
    }
    """
    void prefetch "__builtin_prefetch"(const void* address) noexcept nogil
    int first_difference "overlaykit_first_difference"(uint64_t x, uint64_t y) noexcept nogil


cdef inline int64_t common(const uint8_t* a, const uint8_t* b, int64_t at, int64_t end) noexcept nogil:
    """The first index in at..end where a and b differ, else end; before `at` they must agree.

    Eight bytes a step: paths share long prefixes.
    """
    cdef uint64_t x, y
    while at + 8 <= end:
        memcpy(&x, a + at, 8)
        memcpy(&y, b + at, 8)
        if x != y:
            return at + first_difference(x, y)
        at += 8
    if end >= 8:
        # The last eight bytes at once: those before `at` are equal.
        memcpy(&x, a + end - 8, 8)
        memcpy(&y, b + end - 8, 8)
        return end if x == y else end - 8 + first_difference(x, y)
    while at < end and a[at] == b[at]:
        at += 1
    return at


cdef inline int compare(const uint8_t* a, int64_t n, const uint8_t* b, int64_t m, int64_t* lcp) noexcept nogil:
    """-1, 0 or 1 as a comes before b in tree order. In *lcp: how many leading bytes were known to agree; then, do agree."""
    cdef int64_t end = n if n < m else m
    cdef int64_t at = common(a, b, lcp[0], end)
    lcp[0] = at
    if at < end:
        return -1 if weight(a[at]) < weight(b[at]) else 1
    if n == m:
        return 0
    return -1 if n < m else 1
