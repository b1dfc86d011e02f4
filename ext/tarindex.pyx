"""A window of a tar stream to rows: ustar, pax, GNU long names and base-256 numbers. Every byte is hostile until checked."""
from libc.stdint cimport INT64_MAX, int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memchr, memcmp, memcpy, memset

from tarfields cimport (
    BAD_CHECKSUM, BAD_DEVICE, BAD_NAME, BAD_NUMBER, BAD_SIZE, BAD_TYPE, BLOCK, END, GLOBAL, HAS_XATTRS, LONG_NAME, MORE,
    SPARSE_OLD, TOO_LONG, Meta, clean, field_size, number, read_records, zero,
)

# Where the state has what; the array is the caller's and goes from call to call.
cdef enum:
    OFFSET = 0           # in: the stream offset of buffer[0]; out: of the first byte not used
    LEFT = 1             # bytes of the last row's content still to come
    PADDING = 2          # bytes after it up to the next block
    ROWS = 3             # out: rows written
    FIRST = 4            # out: bytes at buffer[0] that go on the content of a row of an earlier call
    RECORDS = 5          # out: with GLOBAL
    RECORDS_END = 6
    NEED = 7             # out: with MORE: bytes that the next header needs at least, from its own beginning
    STATES = 8

cdef enum:
    FILE = 0
    DIR = 1
    SYMLINK = 2
    CHAR = 3
    BLOCKDEV = 4
    FIFO = 5
    LINK = 8             # a hard link: `regular` finds out to what
    LONGEST_PATH = 32768  # bytes; a path may be longer than PATH_MAX, made one directory at a time, but not for sense
    LONGEST_LINK = 4095  # PATH_MAX without its NUL

# One entry; the door hands the rows out as a structured array.
cdef packed struct Row:
    int64_t offset       # stream offset of the content
    int64_t size         # bytes of content in the tar
    int64_t mtime_ns
    uint64_t rdev
    int64_t path_end     # paths[previous path_end:path_end]
    int64_t link_end     # links[...]
    int64_t head         # where in the buffer the header block is
    int64_t records      # pax records: buffer[records:records_end]
    int64_t records_end
    int64_t data         # where in the buffer the content begins
    int64_t here         # how much of it is in the buffer
    uint32_t mode
    uint32_t uid
    uint32_t gid
    uint8_t kind
    uint8_t flags


cdef bint checksum_holds(const uint8_t* block) noexcept nogil:
    """Whether the block's sum is right, its bytes taken as unsigned, or as signed as some old archivers did."""
    cdef int64_t unsigned_sum = 8 * c' ', signed_sum = 8 * c' ', want = 0
    cdef int i
    for i in range(BLOCK):
        if i < 148 or i >= 156:
            unsigned_sum += block[i]
            signed_sum += <signed char>block[i]
    return number(block + 148, 8, &want) == 0 and (want == unsigned_sum or want == signed_sum)


cdef int64_t next_entry(
    const uint8_t* buffer, int64_t size, int64_t at, const uint8_t* defaults, int64_t defaults_size, int64_t limit,
    int64_t base, Row* row, uint8_t* paths, int64_t* path_size, uint8_t* links, int64_t* link_size, int64_t* status,
) noexcept nogil:
    """Read one entry's headers at buffer[at:]. Returns where they end; what was found is in *status: MORE with bytes needed
    in the return value, END, GLOBAL (records in row), 1000 for a row, or an error."""
    cdef Meta meta
    cdef const uint8_t* head
    cdef const uint8_t* long_path = NULL
    cdef const uint8_t* long_link = NULL
    cdef int64_t long_path_size = 0, long_link_size = 0
    cdef int64_t begin = at, length, value, made, records = -1, records_end = -1
    cdef int64_t dev_major = 0, dev_minor = 0
    cdef uint8_t kind
    cdef bint gnu
    memset(&meta, 0, sizeof(Meta))
    status[0] = read_records(defaults, defaults_size, &meta) if defaults_size > 0 else 0
    if status[0] < 0:
        return at
    while True:
        if at + BLOCK > size:
            status[0] = MORE
            return at + BLOCK - begin
        head = buffer + at
        if head[0] == 0 and head[148] == 0 and zero(head, BLOCK):
            status[0] = END
            return at + BLOCK
        if not checksum_holds(head):
            status[0] = BAD_CHECKSUM
            return at
        if number(head + 124, 12, &length) < 0:
            status[0] = BAD_NUMBER
            return at
        kind = head[156]
        if kind != c'x' and kind != c'X' and kind != c'g' and kind != c'L' and kind != c'K':
            break
        if length < 0 or length > limit or at - begin > limit:
            status[0] = TOO_LONG
            return at
        value = at + BLOCK + (length + BLOCK - 1) // BLOCK * BLOCK
        if value > size:
            status[0] = MORE
            return value + BLOCK - begin
        if kind == c'g':
            if at != begin:
                status[0] = BAD_TYPE   # a global header between an entry's own ones
                return at
            row.records = at + BLOCK
            row.records_end = at + BLOCK + length
            status[0] = GLOBAL
            return value
        if kind == c'L':
            long_path = buffer + at + BLOCK
            long_path_size = field_size(long_path, length)
        elif kind == c'K':
            long_link = buffer + at + BLOCK
            long_link_size = field_size(long_link, length)
        else:
            records = at + BLOCK
            records_end = at + BLOCK + length
            status[0] = read_records(buffer + records, length, &meta)
            if status[0] < 0:
                return at
        at = value
    # The entry itself. What pax says goes before what GNU long names say, and that before the header's own fields.
    gnu = memcmp(head + 257, b"ustar  ", 8) == 0   # with the NUL
    if meta.path_size == 0:
        if long_path != NULL:
            meta.path = long_path
            meta.path_size = long_path_size
        else:
            meta.path = head
            meta.path_size = field_size(head, 100)
            if not gnu and memcmp(head + 257, b"ustar", 5) == 0:
                meta.prefix = head + 345
                meta.prefix_size = field_size(head + 345, 155)
    if meta.link_size == 0:
        meta.link = long_link if long_link != NULL else head + 157
        meta.link_size = long_link_size if long_link != NULL else field_size(head + 157, 100)
    if not meta.has_size:
        meta.size = length
    if meta.size < 0 or meta.size > INT64_MAX // 4:
        status[0] = BAD_SIZE
        return at
    memset(row, 0, sizeof(Row))
    status[0] = BAD_NUMBER
    if number(head + 100, 8, &value) < 0:
        return at
    row.mode = value & 0o7777
    if not meta.has_uid and number(head + 108, 8, &meta.uid) < 0:
        return at
    if not meta.has_gid and number(head + 116, 8, &meta.gid) < 0:
        return at
    if not 0 <= meta.uid <= <int64_t>0xFFFFFFFE or not 0 <= meta.gid <= <int64_t>0xFFFFFFFE:
        return at
    if not meta.has_mtime:
        if number(head + 136, 12, &value) < 0:
            return at
        meta.mtime_ns = value * 1000000000 if <int64_t>-9000000000 < value < <int64_t>9000000000 else 0
    row.uid = <uint32_t>meta.uid
    row.gid = <uint32_t>meta.gid
    row.mtime_ns = meta.mtime_ns
    row.flags = meta.flags
    row.head = at
    row.records = records
    row.records_end = records_end
    at += BLOCK
    made = meta.path_size
    if kind == c'0' or kind == 0 or kind == c'7' or kind == c'S':
        row.kind = FILE
        if kind == c'S':
            row.flags |= SPARSE_OLD
            if head[482]:   # the map goes on in blocks of its own
                while True:
                    if at + BLOCK > size:
                        status[0] = MORE
                        return at + BLOCK - begin
                    at += BLOCK
                    if at - begin > limit:
                        status[0] = TOO_LONG
                        return at
                    if not buffer[at - BLOCK + 504]:
                        break
        elif kind != c'7' and made > 0 and meta.path[made - 1] == c'/':
            row.kind = DIR   # as archivers before POSIX wrote directories
    elif kind == c'1':
        row.kind = LINK
    elif kind == c'2':
        row.kind = SYMLINK
    elif kind == c'3' or kind == c'4':
        row.kind = CHAR if kind == c'3' else BLOCKDEV
        if number(head + 329, 8, &dev_major) < 0 or number(head + 337, 8, &dev_minor) < 0:
            return at
        if not 0 <= dev_major < (1 << 12) or not 0 <= dev_minor < (1 << 20):   # what Linux has room for
            status[0] = BAD_DEVICE
            return at
        row.rdev = (dev_minor & 0xFF) | (dev_major << 8) | ((dev_minor & ~<int64_t>0xFF) << 12)
    elif kind == c'5' or kind == c'D':
        row.kind = DIR
    elif kind == c'6':
        row.kind = FIFO
    else:
        status[0] = BAD_TYPE
        return at
    if row.kind != FILE:
        row.flags &= HAS_XATTRS   # only files have holes
    made = 0
    if meta.path_size > LONGEST_PATH or row.kind == SYMLINK and meta.link_size > LONGEST_LINK:
        status[0] = LONG_NAME
        return at
    if meta.prefix_size > 0:
        made = clean(meta.prefix, meta.prefix_size, paths, 0)
    if made >= 0:
        made = clean(meta.path, meta.path_size, paths, made)
    if made < 0:
        status[0] = made
        return at
    if made == 0 and row.kind != DIR:
        status[0] = BAD_NAME
        return at
    path_size[0] = made
    made = 0
    if row.kind == LINK:
        made = clean(meta.link, meta.link_size, links, 0)
    elif row.kind == SYMLINK:
        if memchr(meta.link, 0, meta.link_size) != NULL:
            made = BAD_NAME
        else:
            memcpy(links, meta.link, meta.link_size)
            made = meta.link_size
    if made < 0 or (made == 0 and (row.kind == LINK or row.kind == SYMLINK)):
        status[0] = made if made < 0 else BAD_NAME
        return at
    link_size[0] = made
    # Only files (and GNU's directory dumps) are followed by content, whatever the size of another may say.
    row.size = meta.size if row.kind == FILE or kind == c'D' else 0
    row.offset = base + at
    row.data = at
    status[0] = 1000
    return at


def parse(
    const uint8_t[::1] buffer, int64_t size, const uint8_t[::1] defaults, int64_t limit,
    uint8_t[::1] rows, uint8_t[::1] paths, uint8_t[::1] links, int64_t[::1] state,
) -> tuple[int, int]:
    """(status, bytes used) of the next window of a tar stream, buffer[:size], and its entries as rows.

    defaults  pax records that hold for all entries: of the global headers met so far; b"" for none
    limit     bytes of headers that one entry may have
    rows      written: packed structs (see ROW in tree/tarball.py); room for size // 512 + 1 of them
    paths     written: cleaned paths back to back, relative, without '.', doubled or trailing '/'; room for len(buffer) bytes
    links     written: symlink targets as they are, hard links' cleaned; room likewise
    state     int64[8]  offset, left, padding, rows, first, records, records_end, need: see above. All 0 at the beginning

    What is not used must be at the beginning of the next window. Content that does not fit goes on at the beginning of the
    next: state[FIRST] bytes of it are there. The statuses stand above. An error's state[ROWS] rows are good.
    GIL released. ValueError if the shapes disagree.
    """
    cdef int64_t status = MORE, used
    if state.shape[0] != STATES or size > buffer.shape[0] or size < 0:
        raise ValueError(f"parse: state {state.shape[0]}, size {size} of {buffer.shape[0]}")
    if rows.shape[0] < (size // BLOCK + 1) * <int64_t>sizeof(Row) or paths.shape[0] < size + 1 or links.shape[0] < size + 1:
        raise ValueError(f"parse: no room for the rows of {size} bytes")
    if state[LEFT] < 0 or state[PADDING] < 0:
        raise ValueError("parse: the state is not one")
    with nogil:
        used = parse_window(
            &buffer[0] if buffer.shape[0] else NULL, size, &defaults[0] if defaults.shape[0] else NULL, defaults.shape[0],
            limit, <Row*>&rows[0], &paths[0], &links[0], &state[0], &status,
        )
    return status, used


cdef int64_t parse_window(
    const uint8_t* buffer, int64_t size, const uint8_t* defaults, int64_t defaults_size, int64_t limit,
    Row* rows, uint8_t* paths, uint8_t* links, int64_t* state, int64_t* status,
) noexcept nogil:
    cdef int64_t at = 0, made = 0, end, n, path_end = 0, link_end = 0, path_size = 0, link_size = 0
    cdef int64_t base = state[OFFSET]
    cdef Row* row
    state[FIRST] = state[LEFT] if state[LEFT] < size else size
    at = state[FIRST]
    state[LEFT] -= at
    while True:
        if state[LEFT] == 0 and state[PADDING] > 0:
            n = state[PADDING] if state[PADDING] < size - at else size - at
            at += n
            state[PADDING] -= n
        if state[LEFT] > 0 or state[PADDING] > 0 or at == size:
            state[NEED] = BLOCK
            status[0] = MORE
            break
        row = rows + made
        end = next_entry(
            buffer, size, at, defaults, defaults_size, limit, base,
            row, paths + path_end, &path_size, links + link_end, &link_size, status,
        )
        if status[0] == MORE:
            state[NEED] = end
            break
        if status[0] == GLOBAL:
            state[RECORDS] = row.records
            state[RECORDS_END] = row.records_end
            at = end
            break
        if status[0] == END:
            at = end
            break
        if status[0] < 0:
            break
        path_end += path_size
        link_end += link_size
        row.path_end = path_end
        row.link_end = link_end
        made += 1
        at = end
        state[LEFT] = row.size
        state[PADDING] = (BLOCK - row.size % BLOCK) % BLOCK
        row.here = row.size if row.size < size - at else size - at
        at += row.here
        state[LEFT] -= row.here
    state[ROWS] = made
    state[OFFSET] = base + at
    return at
