"""Header: the data of one file into another, a piece at a time: reflink, copy_file_range, or read and write; holes stay."""
from libc.errno cimport EINVAL, EIO, ENOMEM, ENOSYS, EOPNOTSUPP, ENXIO, EINTR, EPERM, EXDEV, errno
from libc.stdint cimport int64_t, uint8_t
from libc.stdlib cimport free, malloc

from posix_at cimport (
    FICLONE, SEEK_DATA, SEEK_HOLE, SEEK_SET, c_stat, copy_file_range, ftruncate, ioctl, lseek, read_some, ssize_t,
    write_full,
)

cdef enum:
    PIECE = 64 << 20     # bytes between signal checks: 20 ms on a slow disk
    BUFFER = 1 << 20     # bytes, where only read and write will do: few calls, and still in the cache

cdef struct Copy:
    int src              # open for regular files and directories, else -1
    int dst              # likewise
    c_stat st            # of the source
    int64_t at           # data copied so far (bytes)
    bint cloned          # the data is here already
    bint plain           # read and write: copy_file_range will not do


cdef inline int64_t by_read_write(int src, int dst, int64_t size) noexcept nogil:
    """Bytes copied from offset to offset of both, up to size; or -errno."""
    cdef uint8_t* buffer = <uint8_t*>malloc(BUFFER)
    cdef int64_t done = 0
    cdef ssize_t n
    cdef int status
    if buffer == NULL:
        return -ENOMEM
    while done < size:
        n = read_some(src, buffer, <size_t>(size - done if size - done < BUFFER else BUFFER))
        if n <= 0:
            done = n if n < 0 else done
            break
        status = write_full(dst, buffer, n)
        if status < 0:
            done = status
            break
        done += n
    free(buffer)
    return done


cdef inline int64_t copy_piece(Copy* c, int64_t size) noexcept nogil:
    """Bytes copied from c.at on, up to size, both offsets already there; 0: the source ended early; or -errno."""
    cdef int64_t done = 0
    cdef ssize_t n
    while done < size and not c.plain:
        n = copy_file_range(c.src, NULL, c.dst, NULL, <size_t>(size - done), 0)
        if n > 0:
            done += n
        elif n == 0:
            return done
        elif errno == EINTR:
            continue
        elif done == 0 and errno in (EXDEV, EINVAL, EOPNOTSUPP, ENOSYS, EPERM):
            c.plain = True   # another file system, or one that cannot: from here on by hand
        else:
            return -errno
    if done < size:
        n = by_read_write(c.src, c.dst, size - done)
        return n if n < 0 else done + n
    return done


cdef inline int copy_step(Copy* c) noexcept nogil:
    """1: more to do; 0: the data is complete; or -errno. About PIECE bytes a call. Holes stay holes."""
    cdef int64_t size = c.st.st_size, begin, end, budget = PIECE, n
    if c.cloned or size == 0:
        return 0
    if c.at == 0 and ioctl(c.dst, FICLONE, c.src) == 0:
        c.cloned = True
        return 0
    if c.st.st_blocks * 512 >= size:    # no room for a hole: spare the seeks
        n = copy_piece(c, size - c.at if size - c.at < budget else budget)
        if n <= 0:
            return <int>n if n < 0 else -EIO
        c.at += n
        return 1 if c.at < size else 0
    while budget > 0 and c.at < size:
        begin = lseek(c.src, c.at, SEEK_DATA)
        if begin < 0 and errno == ENXIO:    # nothing but a hole from here
            c.at = size
            break
        if begin < 0 and errno in (EINVAL, EOPNOTSUPP):
            begin = c.at
            end = size
        elif begin < 0:
            return -errno
        else:
            end = lseek(c.src, begin, SEEK_HOLE)
            if end < 0:
                return -errno
        if begin >= size:
            c.at = size
            break
        end = end if end < size else size
        end = end if end - begin < budget else begin + budget
        if lseek(c.src, begin, SEEK_SET) < 0 or lseek(c.dst, begin, SEEK_SET) < 0:
            return -errno
        n = copy_piece(c, end - begin)
        if n <= 0:
            return <int>n if n < 0 else -EIO
        budget -= n
        c.at = begin + n
    if c.at < size:
        return 1
    return 0 if ftruncate(c.dst, size) == 0 else -errno
