"""Reading the content of many files for whoever hashes it: opened, read and closed in batches, without the GIL.

Small files share a buffer, so that a batch is read in one go and hashed while it is in the cache; large ones come in
pieces, and holes are not read at all. The hash is the caller's: xxhash to see whether a file changed, hashlib to name it.
"""
from cpython.exc cimport PyErr_CheckSignals
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from libc.errno cimport EINVAL, EIO, ENAMETOOLONG, ENXIO, errno
from libc.stdint cimport int32_t, int64_t, uint8_t
from libc.string cimport memcmp, memcpy

from posix_at cimport (
    O_DIRECTORY, O_NOFOLLOW, O_NONBLOCK, O_PATH, O_RDONLY, SEEK_DATA, SEEK_HOLE, SEEK_SET, c_stat, close, fstat,
    lseek, open_at, read_full, read_some,
)

cdef enum:
    BATCH = 4096         # files between signal checks
    ZEROES = 1 << 20     # bytes of a hole that are handed over at a time

cdef struct Parent:
    int fd               # the directory of the last file opened, -1: none yet
    const uint8_t* path  # its path
    int64_t length


cdef int enter(int root, const uint8_t* path, int64_t length, Parent* parent) noexcept nogil:
    """The descriptor of directory `path` below root, kept in *parent until another is wanted; or -errno. Follows nothing."""
    cdef char name[256]
    cdef int64_t begin = 0, end
    cdef int fd = root, down
    if length == 0:
        return root
    if parent.fd >= 0 and parent.length == length and memcmp(parent.path, path, <size_t>length) == 0:
        return parent.fd
    if parent.fd >= 0:
        close(parent.fd)
        parent.fd = -1
    while begin < length:
        end = begin
        while end < length and path[end] != c'/':
            end += 1
        if end - begin > 255:
            down = -ENAMETOOLONG
        else:
            memcpy(name, path + begin, <size_t>(end - begin))
            name[end - begin] = 0
            down = open_at(fd, name, O_PATH | O_DIRECTORY | O_NOFOLLOW, 0)
        if fd != root:
            close(fd)
        if down < 0:
            return down
        fd = down
        begin = end + 1
    parent.fd = fd
    parent.path = path
    parent.length = length
    return fd


cdef int open_file(int root, const uint8_t* path, int64_t length, Parent* parent) noexcept nogil:
    """A descriptor of file `path` for reading, or -errno."""
    cdef char name[256]
    cdef int64_t slash = length
    cdef int directory
    while slash > 0 and path[slash - 1] != c'/':
        slash -= 1
    if length - slash > 255 or length == slash:
        return -ENAMETOOLONG if length > slash else -EINVAL
    directory = enter(root, path, slash - 1 if slash > 0 else 0, parent)
    if directory < 0:
        return directory
    memcpy(name, path + slash, <size_t>(length - slash))
    name[length - slash] = 0
    return open_at(directory, name, O_RDONLY | O_NOFOLLOW | O_NONBLOCK, 0)


cdef int64_t read_batch(
    int root, const uint8_t* arena, const int64_t* start, const int64_t* rows, const int64_t* sizes, int64_t at, int64_t n,
    uint8_t* buffer, int64_t room, int64_t* ends, int32_t* errnos, Parent* parent,
) noexcept nogil:
    """Files at..n back to back into buffer, as many as fit and at most BATCH: the index of the first that was not read."""
    cdef int64_t first = at, used = 0, got, size, row
    cdef int fd
    while at < n and at - first < BATCH:
        size = sizes[at]
        if size < 0 or used + size + 1 > room:
            break
        row = rows[at]
        errnos[at] = 0
        fd = open_file(root, arena + start[row], start[row + 1] - start[row], parent)
        if fd < 0:
            errnos[at] = -fd
        else:
            # One byte more than there should be: a file that has grown shows without another call.
            got = read_some(fd, buffer + used, <size_t>(size + 1))
            if 0 < got < size:
                size = read_full(fd, buffer + used + got, size + 1 - got)
                got = size if size < 0 else got + size
                size = sizes[at]
            if got != size:
                errnos[at] = <int32_t>-got if got < 0 else EIO
            close(fd)
            if errnos[at] == 0:
                used += size
        ends[at - first] = used
        at += 1
    return at


cdef object hash_large(int fd, int64_t size, object new, uint8_t[::1] buffer, object view):
    """The digest of one file in pieces, or an errno. Holes are hashed and not read."""
    cdef int64_t at = 0, end, data, got = 0, room = buffer.shape[0]
    cdef uint8_t* into = &buffer[0]
    cdef c_stat st
    cdef bint sparse
    hasher = new()
    if fstat(fd, &st) != 0:
        return errno
    if st.st_size != size:
        return EIO
    sparse = st.st_blocks * 512 < size
    zeroes = bytes(ZEROES) if sparse else b""
    while at < size:
        end = size
        if sparse:
            data = lseek(fd, at, SEEK_DATA)
            if data < 0 and errno == ENXIO:
                data = size
            elif data < 0:    # the file system cannot tell
                data = at
                sparse = False
            while at < data:
                got = data - at if data - at < ZEROES else ZEROES
                hasher.update(memoryview(zeroes)[:got])
                at += got
            if at >= size:
                break
            if sparse:
                end = lseek(fd, at, SEEK_HOLE)
                if end < 0 or end > size:
                    end = size
            if lseek(fd, at, SEEK_SET) < 0:
                return errno
        while at < end:
            with nogil:
                got = read_full(fd, into, end - at if end - at < room else room)
            if got <= 0:
                return -got if got < 0 else EIO
            hasher.update(view[:got])
            at += got
            PyErr_CheckSignals()
    return hasher.digest()


def hash_files(int root, const uint8_t[::1] arena, const int64_t[::1] start, const int64_t[::1] rows,
               const int64_t[::1] sizes, object digest, object new, uint8_t[::1] buffer,
               uint8_t[:, ::1] out, int32_t[::1] errnos) -> int:
    """How many of k files could not be hashed.

    root          directory descriptor; paths are below it, and no symlink is followed
    arena, start  uint8[m], int64[n+1]  row i's path is arena[start[i]:start[i+1]]
    rows, sizes   int64[k]    the rows to hash, best in tree order, and what size (bytes) each file has
    digest, new   digest(buffer) -> bytes, and new() for an object with update and digest: of xxhash, hashlib
    buffer        uint8[b]    scratch; files that do not fit come in pieces of it
    out           uint8[k,w]  written: the digests, w bytes each; zeroes where errnos says why there is none
    errnos        int32[k]    written: 0, EIO for a file of another size than expected, or what opening and reading said

    In Python: [digest(open(os.path.join(root, path(row)), "rb").read()) for row in rows]
    """
    cdef int64_t k = rows.shape[0], n = start.shape[0] - 1, width = out.shape[1], room = buffer.shape[0]
    cdef int64_t at = 0, stop, i, begin, row, failures = 0
    cdef int64_t[BATCH] ends
    cdef Parent parent
    cdef int fd
    if sizes.shape[0] != k or out.shape[0] != k or errnos.shape[0] != k or n < 0 or start[n] != arena.shape[0]:
        raise ValueError(f"hash_files: shapes disagree: {k} rows, {sizes.shape[0]} sizes, {out.shape[0]} digests")
    if room < 1:
        raise ValueError("hash_files: no buffer")
    for i in range(k):
        if rows[i] < 0 or rows[i] >= n:
            raise ValueError(f"hash_files: row {rows[i]} of {n}")
    if k == 0 or arena.shape[0] == 0:
        return 0
    parent.fd = -1
    parent.path = NULL
    parent.length = 0
    view = memoryview(buffer)
    try:
        while at < k:
            with nogil:
                stop = read_batch(
                    root, &arena[0], &start[0], &rows[0], &sizes[0], at, k, &buffer[0], room, ends, &errnos[0], &parent
                )
            begin = 0
            for i in range(at, stop):
                if errnos[i] == 0:
                    keep(digest(view[begin:ends[i - at]]), &out[i, 0], width)
                else:
                    out[i, :] = 0
                    failures += 1
                begin = ends[i - at]
            PyErr_CheckSignals()
            if stop == at:    # too large for the buffer
                row = rows[at]
                with nogil:
                    fd = open_file(root, &arena[start[row]], start[row + 1] - start[row], &parent)
                if fd < 0:
                    found = -fd
                else:
                    try:
                        found = hash_large(fd, sizes[at], new, buffer, view)
                    finally:
                        close(fd)
                if isinstance(found, bytes):
                    errnos[at] = 0
                    keep(found, &out[at, 0], width)
                else:
                    errnos[at] = found
                    out[at, :] = 0
                    failures += 1
                stop = at + 1
            at = stop
    finally:
        if parent.fd >= 0:
            close(parent.fd)
    return failures


cdef int keep(object found, uint8_t* into, int64_t width) except -1:
    """A digest into its place in the caller's array."""
    cdef bytes value = found
    if PyBytes_GET_SIZE(value) != width:
        raise ValueError(f"hash_files: a digest of {len(value)} bytes, not {width}")
    memcpy(into, PyBytes_AS_STRING(value), <size_t>width)
    return 0
