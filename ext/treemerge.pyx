"""Order of paths: sorting one table, matching two trees, finding a row, gathering strings. Row numbers in and out."""
from libc.stdint cimport int64_t, uint8_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy

from treeorder cimport Paths, common, compare, length


# --- merging runs ---------------------------------------------------------------------------------------------------
#
# A run is rows in tree order, and beside each row how many leading bytes it shares with the row before it. Of two heads,
# the one that shares more with the last row written comes first; only heads that share equally much are compared, from
# that byte on. So a merge reads each byte of each path about once, however long the common prefixes are.

cdef int64_t merge_two(
    Paths p,
    const int64_t* a, const int64_t* a_lcp, int64_t n,
    const int64_t* b, const int64_t* b_lcp, int64_t m,
    int64_t* out, int64_t* out_lcp,
) noexcept nogil:
    """Runs a and b (the later, whose rows go first among equals) into out. Returns n + m."""
    cdef int64_t i = 0, j = 0, k = 0, la = 0, lb = 0, shared
    cdef int order
    if n > 0:
        la = a_lcp[0]
    if m > 0:
        lb = b_lcp[0]
    while i < n and j < m:
        if la > lb:
            order = -1
        elif lb > la:
            order = 1
        else:
            shared = la
            order = compare(
                p.arena + p.start[a[i]], length(p, a[i]), p.arena + p.start[b[j]], length(p, b[j]), &shared
            )
            if order < 0:    # b stays and now shares this much with the row written, a's
                lb = shared
            else:
                la = shared
        if order < 0:
            out[k] = a[i]
            out_lcp[k] = la
            i += 1
            if i < n:
                la = a_lcp[i]
        else:
            out[k] = b[j]
            out_lcp[k] = lb
            j += 1
            if j < m:
                lb = b_lcp[j]
        k += 1
    while i < n:
        out[k] = a[i]
        out_lcp[k] = la
        i += 1
        k += 1
        if i < n:
            la = a_lcp[i]
    while j < m:
        out[k] = b[j]
        out_lcp[k] = lb
        j += 1
        k += 1
        if j < m:
            lb = b_lcp[j]
    return k


cdef int merge_runs(
    Paths p, int64_t* bound, int64_t k, int64_t* rows, int64_t* lcp, int64_t n, uint8_t* same
) noexcept nogil:
    """Rows of k adjacent runs (run r is rows[bound[r]:bound[r + 1]]) into one, in place, neighbours first. 0, or -1: memory.

    Of equal rows those of the later run come first. bound is used up. same[i] becomes 1 where row i's path is row i-1's.
    """
    cdef int64_t* other = <int64_t*>malloc(2 * (n + 1) * sizeof(int64_t))
    cdef int64_t* a_rows = rows
    cdef int64_t* a_lcp = lcp
    cdef int64_t* b_rows = other
    cdef int64_t* b_lcp = other + n
    cdef int64_t* swap
    cdef int64_t r, i, lo, mid, hi, left
    if other == NULL:
        return -1
    for r in range(k):
        lo = bound[r]
        if lo < bound[r + 1]:
            a_lcp[lo] = 0
        for i in range(lo + 1, bound[r + 1]):
            left = length(p, a_rows[i])
            if length(p, a_rows[i - 1]) < left:
                left = length(p, a_rows[i - 1])
            a_lcp[i] = common(p.arena + p.start[a_rows[i - 1]], p.arena + p.start[a_rows[i]], 0, left)
    while k > 1:
        for r in range(0, k, 2):
            lo = bound[r]
            mid = bound[r + 1]
            hi = bound[r + 2] if r + 2 <= k else mid
            merge_two(p, a_rows + lo, a_lcp + lo, mid - lo, a_rows + mid, a_lcp + mid, hi - mid, b_rows + lo, b_lcp + lo)
            bound[r // 2] = lo
        k = (k + 1) // 2
        bound[k] = n
        swap = a_rows
        a_rows = b_rows
        b_rows = swap
        swap = a_lcp
        a_lcp = b_lcp
        b_lcp = swap
    if a_rows != rows:
        memcpy(rows, a_rows, n * sizeof(int64_t))
        memcpy(lcp, a_lcp, n * sizeof(int64_t))
    for i in range(n):
        left = length(p, rows[i])
        same[i] = i > 0 and lcp[i] == left and length(p, rows[i - 1]) == left
    free(other)
    return 0


cdef int64_t find_runs(Paths p, int64_t n, int64_t* bound) noexcept nogil:
    """The strictly ascending runs of rows 0..n, as bound[0..k]. Returns k."""
    cdef int64_t i, k = 0, lcp
    for i in range(n):
        lcp = 0
        if i == 0 or compare(
            p.arena + p.start[i - 1], length(p, i - 1), p.arena + p.start[i], length(p, i), &lcp
        ) >= 0:
            bound[k] = i
            k += 1
    bound[k] = n
    return k


cdef Paths paths_of(const uint8_t[::1] arena, const int64_t[::1] start) except *:
    """The strings as the loops take them. ValueError unless start climbs from 0 to the arena's end."""
    cdef Paths p
    cdef int64_t i
    if start.shape[0] < 1 or start[0] != 0 or start[start.shape[0] - 1] != arena.shape[0]:
        raise ValueError(f"start must run from 0 to the arena's {arena.shape[0]} bytes")
    for i in range(start.shape[0] - 1):
        if start[i + 1] < start[i]:
            raise ValueError(f"start falls at {i}")
    p.arena = &arena[0] if arena.shape[0] else NULL
    p.start = &start[0]
    return p


def match(
    const uint8_t[::1] arena_a, const int64_t[::1] start_a, const uint8_t[::1] arena_b, const int64_t[::1] start_b,
    int64_t[::1] out_a, int64_t[::1] out_b,
) -> int:
    """How many different paths two trees have; for each of them, in tree order, its row in either.

    arena_a, start_a  uint8[], int64[n+1]  row i's path is arena[start[i]:start[i+1]], in tree order
    arena_b, start_b  uint8[], int64[m+1]  likewise
    out_a, out_b      int64[n+m]  written: the row of the path in a and in b, -1 where it has none

    In Python: [(find(a, path), find(b, path)) for path in sorted({*a, *b}, key=tree_key)]
    O(bytes), GIL released. ValueError if the shapes disagree.
    """
    cdef Paths a = paths_of(arena_a, start_a), b = paths_of(arena_b, start_b)
    cdef int64_t n = start_a.shape[0] - 1, m = start_b.shape[0] - 1, i = 0, j = 0, made = 0, lcp
    cdef int64_t* to_a
    cdef int64_t* to_b
    cdef int order
    if out_a.shape[0] != n + m or out_b.shape[0] != n + m:
        raise ValueError(f"match: shapes disagree: {n} and {m} rows, out {out_a.shape[0]} and {out_b.shape[0]}")
    if n + m == 0:
        return 0
    to_a = &out_a[0]
    to_b = &out_b[0]
    with nogil:
        while i < n or j < m:
            if j == m:
                order = -1
            elif i == n:
                order = 1
            else:
                lcp = 0
                order = compare(a.arena + a.start[i], length(a, i), b.arena + b.start[j], length(b, j), &lcp)
            to_a[made] = i if order <= 0 else -1
            to_b[made] = j if order >= 0 else -1
            i += order <= 0
            j += order >= 0
            made += 1
    return made


def sort_order(const uint8_t[::1] arena, const int64_t[::1] start, int64_t[::1] out, uint8_t[::1] same) -> None:
    """Fill `out` with all rows in tree order, of equal paths the later row first. Runs that are in order cost one pass.

    arena  uint8[m]    every path, back to back
    start  int64[n+1]  row i's path is arena[start[i]:start[i+1]]
    out    int64[n]    written
    same   uint8[n]    written; 1 where out[i] has the path of out[i-1]

    In Python: sorted(range(n), key=lambda i: (tree_key(path(i)), -i))
    O(n log runs), GIL released. ValueError if the shapes disagree, MemoryError.
    """
    cdef Paths p = paths_of(arena, start)
    cdef int64_t n = start.shape[0] - 1, i, k
    cdef int64_t* work
    cdef int status
    if out.shape[0] != n or same.shape[0] != n:
        raise ValueError(f"sort_order: shapes disagree: {n} rows, out {out.shape[0]}, same {same.shape[0]}")
    if n == 0:
        return
    work = <int64_t*>malloc((2 * n + 3) * sizeof(int64_t))
    if work == NULL:
        raise MemoryError()
    with nogil:
        for i in range(n):
            out[i] = i
        k = find_runs(p, n, work + n)
        status = merge_runs(p, work + n, k, &out[0], work, n, &same[0])
        free(work)
    if status < 0:
        raise MemoryError()


# --- one tree -------------------------------------------------------------------------------------------------------


def find(const uint8_t[::1] arena, const int64_t[::1] start, const uint8_t[::1] path) -> int:
    """The first row of a sorted tree whose path is not before `path`; its number is n if there is none.

    In Python: bisect_left(range(n), tree_key(path), key=lambda i: tree_key(path(i)))
    O(log n) comparisons. The caller compares the row's path with what was asked for.
    """
    cdef Paths p
    cdef int64_t lo = 0, hi = start.shape[0] - 1, mid, lcp
    cdef const uint8_t* want = &path[0] if path.shape[0] else NULL
    if hi < 0 or start[hi] > arena.shape[0]:
        raise ValueError("find: shapes disagree")
    p.arena = &arena[0] if arena.shape[0] else NULL
    p.start = &start[0]
    while lo < hi:
        mid = (lo + hi) // 2
        lcp = 0
        if not 0 <= start[mid] <= start[mid + 1] <= arena.shape[0]:   # the tree may come from a damaged file
            raise ValueError(f"find: start is wrong at {mid}")
        if compare(p.arena + p.start[mid], length(p, mid), want, path.shape[0], &lcp) < 0:
            lo = mid + 1
        else:
            hi = mid
    return lo


def family(const uint8_t[::1] arena, const int64_t[::1] start, int64_t[::1] parents, int64_t[::1] ends) -> None:
    """Fill `parents` with each row's directory (-1: none) and `ends` with the first row after it that is not below it.

    arena    uint8[m]    every path of a sorted tree, back to back
    start    int64[n+1]  row i's path is arena[start[i]:start[i+1]]
    parents  int64[n]    written; the nearest directory above that has a row
    ends     int64[n]    written; the subtree of i is the rows i:ends[i]

    In Python: ends[i] = next((j for j in range(i + 1, n) if not path(j).startswith(path(i) + "/")), n), the root aside
    O(n) for trees of bounded depth, GIL released. ValueError if the shapes disagree, MemoryError.
    """
    cdef Paths p = paths_of(arena, start)
    cdef int64_t n = start.shape[0] - 1, i, top = 0, row, size
    cdef int64_t* stack
    if parents.shape[0] != n or ends.shape[0] != n:
        raise ValueError(f"family: shapes disagree: {n} rows, parents {parents.shape[0]}, ends {ends.shape[0]}")
    if n == 0:
        return
    stack = <int64_t*>malloc(n * sizeof(int64_t))
    if stack == NULL:
        raise MemoryError()
    with nogil:
        for i in range(n):
            while top > 0:
                row = stack[top - 1]
                size = length(p, row)
                if size == 0 or (
                    length(p, i) > size
                    and p.arena[p.start[i] + size] == c'/'
                    and common(p.arena + p.start[row], p.arena + p.start[i], 0, size) == size
                ):
                    break
                ends[row] = i
                top -= 1
            parents[i] = stack[top - 1] if top > 0 else -1
            stack[top] = i
            top += 1
        while top > 0:
            top -= 1
            ends[stack[top]] = n
        free(stack)


def gather(
    const uint8_t[::1] arena, const int64_t[::1] start, const int64_t[::1] rows, uint8_t[::1] out, int64_t[::1] out_start
) -> None:
    """Fill `out` with the strings of `rows`, or their beginnings, back to back at the offsets that `out_start` gives.

    arena      uint8[m]    every string, back to back
    start      int64[n+1]  string i is arena[start[i]:start[i+1]]
    rows       int64[r]    which
    out        uint8[o]    written
    out_start  int64[r+1]  where each goes; out_start[i+1] - out_start[i] says how many bytes of string rows[i]

    In Python: b"".join(string(rows[i])[: out_start[i + 1] - out_start[i]] for i in range(r))
    O(bytes), GIL released. ValueError if the shapes disagree, IndexError for a row that is not there.
    """
    cdef int64_t n = start.shape[0] - 1, r = rows.shape[0], i, size
    cdef const uint8_t* source = &arena[0] if arena.shape[0] else NULL
    cdef uint8_t* target = &out[0] if out.shape[0] else NULL
    cdef bint wrong = False
    if out_start.shape[0] != r + 1 or out_start[r] != out.shape[0] or n < 0 or start[n] != arena.shape[0]:
        raise ValueError(f"gather: shapes disagree: {r} rows, out_start {out_start.shape[0]}")
    with nogil:
        for i in range(r):
            if rows[i] < 0 or rows[i] >= n:
                wrong = True
                break
            size = out_start[i + 1] - out_start[i]
            if size < 0 or size > start[rows[i] + 1] - start[rows[i]] or out_start[i] < 0 or out_start[i + 1] > out.shape[0]:
                wrong = True
                break
            if not 0 <= start[rows[i]] <= start[rows[i] + 1] <= arena.shape[0]:   # the tree may come from a damaged file
                wrong = True
                break
            if size > 0:
                memcpy(target + out_start[i], source + start[rows[i]], size)
    if wrong:
        raise IndexError(f"gather: row {rows[i]} of {n} is not there, or shorter than {out_start[i + 1] - out_start[i]}")
