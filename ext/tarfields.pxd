"""Header: what the fields and pax records of a tar's headers say. Every byte is hostile until checked."""
from libc.stdint cimport INT64_MAX, int64_t, uint8_t
from libc.string cimport memchr, memcmp, memcpy

# What `parse` answers; tree/tarball.py has the words.
cdef enum:
    MORE = 0             # the window is used up, or its tail is the beginning of a header
    END = 1              # the end-of-archive blocks
    GLOBAL = 2           # a pax global header: its records are at state[RECORDS]:state[RECORDS_END]
    BAD_CHECKSUM = -1
    BAD_NUMBER = -2
    BAD_RECORD = -3      # a pax record that is none
    PARENT = -4          # ".." in a path
    BAD_NAME = -5        # NUL or nothing where a name should be
    BAD_TYPE = -6
    BAD_SIZE = -7
    BAD_DEVICE = -8
    TOO_LONG = -9        # more than `limit` bytes of headers for one entry
    LONG_NAME = -10      # a path or a symlink's target that Linux has no room for

cdef enum:
    BLOCK = 512
    HAS_XATTRS = 1       # flags of an entry
    SPARSE_OLD = 2       # GNU type S: the map follows the numbers in the header
    SPARSE_PAX = 4       # GNU.sparse.* records: the map is there (0.0, 0.1) or in front of the content (1.0)

# What the headers of one entry say, gathered before it becomes a row.
cdef struct Meta:
    const uint8_t* path
    int64_t path_size
    const uint8_t* prefix
    int64_t prefix_size
    const uint8_t* link
    int64_t link_size
    int64_t size
    int64_t uid
    int64_t gid
    int64_t mtime_ns
    bint has_size
    bint has_uid
    bint has_gid
    bint has_mtime
    uint8_t flags


cdef inline int64_t field_size(const uint8_t* field, int64_t width) noexcept nogil:
    """Bytes up to the NUL, or all."""
    cdef const void* nul = memchr(field, 0, width)
    return width if nul == NULL else <const uint8_t*>nul - field


cdef inline int number(const uint8_t* field, int width, int64_t* out) noexcept nogil:
    """A header's number: octal, or base-256 where the first bit is set. 0 or BAD_NUMBER."""
    cdef int i = 0
    cdef int64_t value
    if field[0] & 0x80:
        value = -1 if field[0] & 0x40 else 0
        value = value * 64 + (field[0] & 0x3F)
        for i in range(1, width):
            if value > (INT64_MAX >> 8) or value < -(INT64_MAX >> 8):
                return BAD_NUMBER
            value = value * 256 + field[i]
        out[0] = value
        return 0
    value = 0
    while i < width and field[i] == c' ':
        i += 1
    while i < width and c'0' <= field[i] <= c'7':
        if value > (INT64_MAX >> 3):
            return BAD_NUMBER
        value = value * 8 + field[i] - c'0'
        i += 1
    if i < width and field[i] != 0 and field[i] != c' ':
        return BAD_NUMBER
    out[0] = value
    return 0


cdef inline int decimal(const uint8_t* text, int64_t n, int64_t* out) noexcept nogil:
    """A pax number without a sign or fraction. 0 or BAD_NUMBER."""
    cdef int64_t i, value = 0
    if n == 0:
        return BAD_NUMBER
    for i in range(n):
        if not c'0' <= text[i] <= c'9' or value > (INT64_MAX - 9) // 10:
            return BAD_NUMBER
        value = value * 10 + text[i] - c'0'
    out[0] = value
    return 0


cdef inline int timestamp(const uint8_t* text, int64_t n, int64_t* out) noexcept nogil:
    """A pax time, -12.345678901 say, as nanoseconds, further digits cut off towards the past. 0 or BAD_NUMBER."""
    cdef bint negative = n > 0 and text[0] == c'-'
    cdef int64_t i, dot, seconds = 0, nanos = 0, unit = 100000000
    cdef bint rest = False
    if negative:
        text += 1
        n -= 1
    dot = 0
    while dot < n and text[dot] != c'.':
        dot += 1
    if decimal(text, dot, &seconds) < 0:
        return BAD_NUMBER
    for i in range(dot + 1, n):
        if not c'0' <= text[i] <= c'9':
            return BAD_NUMBER
        nanos += (text[i] - c'0') * unit
        rest = rest or unit == 0 and text[i] != c'0'
        unit //= 10
    if seconds > INT64_MAX // 1000000000 - 1:
        out[0] = 0   # beyond the year 2262: nothing that a file system of ours keeps
    elif negative:
        out[0] = -seconds * 1000000000 - nanos - rest
    else:
        out[0] = seconds * 1000000000 + nanos
    return 0


cdef inline bint key_is(const uint8_t* key, int64_t n, const char* want, int64_t m) noexcept nogil:
    return n == m and memcmp(key, want, m) == 0


cdef inline bint key_begins(const uint8_t* key, int64_t n, const char* want, int64_t m) noexcept nogil:
    return n >= m and memcmp(key, want, m) == 0


cdef inline int read_records(const uint8_t* data, int64_t n, Meta* meta) noexcept nogil:
    """pax records, "LENGTH KEY=VALUE\\n" each, into meta. An empty value takes a key back. 0 or what is wrong."""
    cdef int64_t at = 0, size, key, value, m
    cdef const uint8_t* v
    while at < n:
        size = 0
        key = at
        while key < n and c'0' <= data[key] <= c'9' and size <= n:
            size = size * 10 + data[key] - c'0'
            key += 1
        if key == at or key >= n or data[key] != c' ' or size <= key + 1 - at or size > n - at:
            return BAD_RECORD
        if data[at + size - 1] != c'\n':
            return BAD_RECORD
        key += 1
        value = key
        while value < at + size - 1 and data[value] != c'=':
            value += 1
        if value >= at + size - 1 or value == key:
            return BAD_RECORD
        v = data + value + 1
        m = at + size - 1 - (value + 1)
        if key_is(data + key, value - key, b"path", 4):
            meta.path = v
            meta.path_size = m
        elif key_is(data + key, value - key, b"linkpath", 8):
            meta.link = v
            meta.link_size = m
        elif key_is(data + key, value - key, b"size", 4):
            meta.has_size = m > 0
            if m > 0 and decimal(v, m, &meta.size) < 0:
                return BAD_NUMBER
        elif key_is(data + key, value - key, b"uid", 3):
            meta.has_uid = m > 0
            if m > 0 and decimal(v, m, &meta.uid) < 0:
                return BAD_NUMBER
        elif key_is(data + key, value - key, b"gid", 3):
            meta.has_gid = m > 0
            if m > 0 and decimal(v, m, &meta.gid) < 0:
                return BAD_NUMBER
        elif key_is(data + key, value - key, b"mtime", 5):
            meta.has_mtime = m > 0
            if m > 0 and timestamp(v, m, &meta.mtime_ns) < 0:
                return BAD_NUMBER
        elif (
            key_begins(data + key, value - key, b"SCHILY.xattr.", 13)
            or key_begins(data + key, value - key, b"LIBARCHIVE.xattr.", 17)
        ):
            meta.flags |= HAS_XATTRS
            if memchr(data + key, 0, value - key) != NULL:
                return BAD_RECORD
        elif key_begins(data + key, value - key, b"GNU.sparse.", 11):
            meta.flags |= SPARSE_PAX
            if key_is(data + key, value - key, b"GNU.sparse.name", 15):
                meta.path = v
                meta.path_size = m
        at += size
    return 0


cdef inline int64_t clean(const uint8_t* path, int64_t n, uint8_t* out, int64_t made) noexcept nogil:
    """`path` onto out[:made] (0, or what a prefix gave) without leading, doubled and trailing '/' and '.'. Bytes, or < 0."""
    cdef int64_t at = 0, end
    while at < n:
        end = at
        while end < n and path[end] != c'/':
            if path[end] == 0:
                return BAD_NAME
            end += 1
        if end - at == 2 and path[at] == c'.' and path[at + 1] == c'.':
            return PARENT
        if end > at and not (end - at == 1 and path[at] == c'.'):
            if made > 0:
                out[made] = c'/'
                made += 1
            memcpy(out + made, path + at, end - at)
            made += end - at
        at = end + 1
    return made


cdef inline bint zero(const uint8_t* data, int64_t n) noexcept nogil:
    cdef int64_t i
    for i in range(n):
        if data[i]:
            return False
    return True
