"""A directory to columns: getdents, fstatat, readlink and xattrs, in tree order, nothing followed."""
from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.errno cimport EINTR, ELOOP, ENODATA, ENOENT, ENOSYS, ENOTDIR, EOPNOTSUPP, ESTALE, errno
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc, qsort, realloc
from libc.string cimport memcpy, memset, strcmp, strlen

from posix_at cimport (
    AT_SYMLINK_NOFOLLOW,
    O_DIRECTORY,
    O_NOFOLLOW,
    O_RDONLY,
    PATH_MAX,
    S_IFDIR,
    S_IFLNK,
    S_IFMT,
    SYS_getdents64,
    XATTR_LIST_MAX,
    XATTR_SIZE_MAX,
    c_stat,
    close,
    fstat,
    fstatat,
    lgetxattr,
    linux_dirent,
    llistxattr,
    open_at,
    readlinkat,
    snprintf,
    ssize_t,
    syscall,
    timespec,
)

import os

cdef extern from "Python.h":
    int poll_signals "PyErr_CheckSignals"() noexcept   # -1: a handler raised; what it raised stays set

cdef extern from *:
    """
    static int overlaykit_pending(void) { return PyErr_Occurred() ? -1 : 0; }
    /* Linux 6.13: xattrs by directory descriptor and name. The numbers are the same on every architecture. */
    struct overlaykit_xattr_args { unsigned long long value; unsigned int size; unsigned int flags; };
    """
    int raise_pending "overlaykit_pending"() except -1
    struct xattr_args "overlaykit_xattr_args":
        uint64_t value
        uint32_t size
        uint32_t flags

cdef enum:
    SYS_GETXATTRAT = 464
    SYS_LISTXATTRAT = 465
    DENTS = 256 << 10        # bytes of directory entries a getdents64
    SIGNAL_ENTRIES = 4096    # entries between two looks for signals
    KEPT = 64                # directories held open on the way down; trees may be deeper than a process has descriptors
    KEYS = 9600              # xattrs of one entry: XATTR_LIST_MAX bytes hold no more names of 7, the shortest ("user.x")
    LAST_SECOND = 9223372035  # in the year 2262, the last of which int64 holds the nanoseconds
    INTERRUPTED = -4096      # beyond every errno

# Bytes that grow.
cdef struct Vector:
    char* data
    int64_t size
    int64_t room

# What is known of one entry; the door hands the rows out as a structured array.
cdef packed struct Row:
    uint64_t dev
    uint64_t ino
    uint64_t rdev
    int64_t size
    int64_t mtime_ns
    int64_t ctime_ns
    int64_t blocks
    int64_t path_end     # paths[previous path_end:path_end]
    int64_t link_end     # links[...]: a symlink's target
    int64_t xattr_end    # xattrs[...]: name NUL, uint32 length, value, and so on
    uint32_t mode        # with its type
    uint32_t uid
    uint32_t gid
    uint32_t nlink

cdef struct Scan:
    Vector rows
    Vector paths
    Vector links
    Vector xattrs
    Vector path          # of the entry at hand, and of the one that failed
    char* buffer         # XATTR_LIST_MAX + XATTR_SIZE_MAX bytes of scratch
    char* dents          # DENTS bytes for one getdents64
    const char** keys    # KEYS names in it
    const char* skip     # names of xattrs that nobody wants, each with its NUL, and then one more
    bint want_xattrs
    bint old_kernel      # no listxattrat
    int64_t entries


cdef int grow(Vector* v, int64_t more) noexcept nogil:
    """Room for `more` bytes; 0, or -1 without memory."""
    cdef int64_t room
    cdef char* data
    if v.size + more <= v.room:
        return 0
    room = (v.size + more) * 3 // 2 + 256
    data = <char*>realloc(v.data, room)
    if data == NULL:
        return -1
    v.data = data
    v.room = room
    return 0


cdef int push(Vector* v, const void* data, int64_t n) noexcept nogil:
    if n == 0:
        return 0
    if grow(v, n) < 0:
        return -1
    memcpy(v.data + v.size, data, n)
    v.size += n
    return 0


cdef int name_order(const void* a, const void* b) noexcept nogil:
    return strcmp((<const char**>a)[0], (<const char**>b)[0])


cdef inline bint vanished(int status) noexcept nogil:
    """An entry that went away, or became something else, between two calls: as if it had never been listed."""
    return status == -ENOENT or status == -ENOTDIR or status == -ELOOP


cdef ssize_t list_xattrs(Scan* s, int dir_fd, const char* name, char* path) noexcept nogil:
    """Bytes of names in s.buffer, or -errno. `path` is scratch and names the entry through /proc for old kernels."""
    cdef ssize_t n
    if not s.old_kernel:
        n = syscall(SYS_LISTXATTRAT, dir_fd, name, AT_SYMLINK_NOFOLLOW, s.buffer, <size_t>XATTR_LIST_MAX)
        if n >= 0 or errno != ENOSYS:
            return n if n >= 0 else -errno
        s.old_kernel = True
    if snprintf(path, PATH_MAX, "/proc/self/fd/%d/%s", dir_fd, name) >= PATH_MAX:
        return -EOPNOTSUPP
    n = llistxattr(path, s.buffer, XATTR_LIST_MAX)
    return n if n >= 0 else -errno


cdef ssize_t get_xattr(Scan* s, int dir_fd, const char* name, const char* path, const char* key) noexcept nogil:
    cdef xattr_args args
    cdef ssize_t n
    if s.old_kernel:
        n = lgetxattr(path, key, s.buffer + XATTR_LIST_MAX, XATTR_SIZE_MAX)
    else:
        args.value = <uint64_t><size_t>(s.buffer + XATTR_LIST_MAX)
        args.size = XATTR_SIZE_MAX
        args.flags = 0
        n = syscall(SYS_GETXATTRAT, dir_fd, name, AT_SYMLINK_NOFOLLOW, key, &args, sizeof(xattr_args))
    return n if n >= 0 else -errno


cdef inline bint skipped(const Scan* s, const char* key) noexcept nogil:
    cdef const char* name = s.skip
    while name[0] != 0:
        if strcmp(name, key) == 0:
            return True
        name += strlen(name) + 1
    return False


cdef int add_xattrs(Scan* s, int dir_fd, const char* name) noexcept nogil:
    """The xattrs of one entry, sorted by name, onto s.xattrs. 0, -errno, or 1 without memory."""
    cdef char path[PATH_MAX]
    cdef const char** keys = s.keys
    cdef ssize_t listed = list_xattrs(s, dir_fd, name, path), n
    cdef int64_t at = 0
    cdef int count = 0, i
    cdef uint32_t size
    if listed <= 0:
        return 0 if listed == 0 or listed == -EOPNOTSUPP else <int>listed
    while at < listed and count < KEYS:
        keys[count] = s.buffer + at
        at += strlen(s.buffer + at) + 1
        if not skipped(s, keys[count]):
            count += 1
    qsort(keys, count, sizeof(char*), name_order)
    for i in range(count):
        n = get_xattr(s, dir_fd, name, path, keys[i])
        if n == -ENODATA:
            continue   # taken off meanwhile, or one that is listed but not for us to read
        if n < 0:
            return <int>n
        size = <uint32_t>n
        if (
            push(&s.xattrs, keys[i], strlen(keys[i]) + 1) < 0
            or push(&s.xattrs, &size, 4) < 0
            or push(&s.xattrs, s.buffer + XATTR_LIST_MAX, n) < 0
        ):
            return 1
    return 0


cdef inline int64_t nanoseconds(const timespec* t) noexcept nogil:
    """Since 1970; 0 for what has no room, as ext/tarindex.pyx has it."""
    if t.tv_sec > LAST_SECOND or t.tv_sec < -LAST_SECOND:
        return 0
    return <int64_t>t.tv_sec * 1000000000 + t.tv_nsec


cdef int add_row(Scan* s, int dir_fd, const char* name, const c_stat* st) noexcept nogil:
    """One entry onto the columns. 0, -errno, or 1 without memory."""
    cdef Row row
    cdef int status
    cdef ssize_t n
    cdef int64_t links = s.links.size, xattrs = s.xattrs.size
    if (st.st_mode & S_IFMT) == S_IFLNK:
        if grow(&s.links, PATH_MAX) < 0:
            return 1
        n = readlinkat(dir_fd, name, s.links.data + s.links.size, PATH_MAX)
        if n < 0:
            return -errno
        s.links.size += n
    if s.want_xattrs:
        status = add_xattrs(s, dir_fd, name)
        if status != 0:
            s.links.size = links
            s.xattrs.size = xattrs
            return status
    if push(&s.paths, s.path.data, s.path.size) < 0:
        return 1
    memset(&row, 0, sizeof(Row))
    row.dev = st.st_dev
    row.ino = st.st_ino
    row.rdev = st.st_rdev
    row.size = st.st_size
    row.mtime_ns = nanoseconds(&st.st_mtim)
    row.ctime_ns = nanoseconds(&st.st_ctim)
    row.blocks = st.st_blocks
    row.path_end = s.paths.size
    row.link_end = s.links.size
    row.xattr_end = s.xattrs.size
    row.mode = st.st_mode
    row.uid = st.st_uid
    row.gid = st.st_gid
    row.nlink = <uint32_t>st.st_nlink
    s.entries += 1
    return 1 if push(&s.rows, &row, sizeof(Row)) < 0 else 0


cdef int list_names(Scan* s, int fd, Vector* names, Vector* order) noexcept nogil:
    """The sorted names of a directory: order has pointers into names. 0, -errno, or 1 without memory."""
    cdef long n
    cdef int64_t at, count = 0, i
    cdef const char* name
    cdef linux_dirent* entry
    cdef int status = 0
    while status == 0:
        n = syscall(SYS_getdents64, fd, s.dents, <size_t>DENTS)
        if n < 0 and errno == EINTR:
            continue
        if n <= 0:
            # ENOENT: the directory was removed after it was opened, so it is empty.
            status = -errno if n < 0 and errno != ENOENT else 0
            break
        at = 0
        while at < n:
            entry = <linux_dirent*>(s.dents + at)
            at += entry.d_reclen
            name = entry.d_name
            if name[0] == c'.' and (name[1] == 0 or (name[1] == c'.' and name[2] == 0)):
                continue
            if push(names, name, strlen(name) + 1) < 0:
                status = 1
                break
            count += 1
    if status == 0 and grow(order, count * <int64_t>sizeof(char*)) < 0:
        status = 1
    if status != 0 or count == 0:
        return status
    at = 0
    for i in range(count):
        (<const char**>order.data)[i] = names.data + at
        at += strlen(names.data + at) + 1
    order.size = count
    qsort(order.data, count, sizeof(char*), name_order)
    return 0


# A directory on the way down.
cdef struct Level:
    int fd           # -1: given up for deeper ones; its child's ".." leads back
    uint64_t dev
    uint64_t ino
    int64_t size     # bytes of its path
    Vector names
    Vector order     # pointers into names
    int64_t next     # the entry of order to go on with


cdef int descend(Scan* s, Vector* levels, int fd, const c_stat* st) noexcept nogil:
    """Make directory `fd`, whose path is s.path, the last level; it owns the descriptor. 0, -errno, or 1 without memory."""
    cdef Level level
    cdef Level* above
    cdef int status
    cdef int64_t depth
    memset(&level, 0, sizeof(Level))
    level.fd = fd
    level.dev = st.st_dev
    level.ino = st.st_ino
    level.size = s.path.size
    status = list_names(s, fd, &level.names, &level.order)
    if status == 0 and push(levels, &level, sizeof(Level)) < 0:
        status = 1
    if status != 0:
        free(level.names.data)
        free(level.order.data)
        close(fd)
        return status
    depth = levels.size // <int64_t>sizeof(Level)
    if depth > KEPT:
        above = <Level*>levels.data + (depth - 1 - KEPT)
        close(above.fd)
        above.fd = -1
    return 0


cdef int ascend(Vector* levels) noexcept nogil:
    """Leave the last level, the one above it open again. 0 or -errno; -ESTALE if that one has been moved meanwhile."""
    cdef Level* level = <Level*>(levels.data + levels.size) - 1
    cdef Level* above = level - 1
    cdef c_stat st
    cdef int status = 0
    if levels.size > <int64_t>sizeof(Level) and above.fd < 0:
        above.fd = open_at(level.fd, "..", O_RDONLY | O_DIRECTORY | O_NOFOLLOW, 0)
        if above.fd < 0:
            status = above.fd
            above.fd = -1
        elif fstat(above.fd, &st) != 0:
            status = -errno
        elif st.st_dev != above.dev or st.st_ino != above.ino:
            status = -ESTALE
    close(level.fd)
    free(level.names.data)
    free(level.order.data)
    levels.size -= sizeof(Level)
    return status


cdef int visit(Scan* s, Vector* levels, int fd, const char* name) noexcept nogil:
    """One entry of directory `fd`, s.path being its path: a row, and a new level if it is a directory. As `descend`."""
    cdef c_stat st
    cdef int child, status
    if fstatat(fd, name, &st, AT_SYMLINK_NOFOLLOW) != 0:
        return -errno
    if (st.st_mode & S_IFMT) != S_IFDIR:
        return add_row(s, fd, name, &st)
    # Opened before it is written down, so that the row and what is below it are of one directory.
    child = open_at(fd, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW, 0)
    if child < 0:
        return child
    status = 0 if fstat(child, &st) == 0 else -errno
    if status == 0:
        status = add_row(s, fd, name, &st)
    if status != 0:
        close(child)
        return status
    return descend(s, levels, child, &st)


cdef int walk(Scan* s, Vector* levels) noexcept nogil:
    """Everything below the first level. 0, -errno, 1 without memory, INTERRUPTED. What is left in levels is the caller's."""
    cdef Level* level
    cdef const char* name
    cdef int64_t n
    cdef int status = 0
    while levels.size > 0 and status == 0:
        level = <Level*>(levels.data + levels.size) - 1
        s.path.size = level.size
        if level.next == level.order.size:
            status = ascend(levels)
            continue
        name = (<const char**>level.order.data)[level.next]
        level.next += 1
        n = strlen(name)
        if grow(&s.path, n + 1) < 0:
            return 1
        if s.path.size > 0:
            s.path.data[s.path.size] = c'/'
            s.path.size += 1
        memcpy(s.path.data + s.path.size, name, n)
        s.path.size += n
        if s.entries % SIGNAL_ENTRIES == SIGNAL_ENTRIES - 1:
            with gil:
                if poll_signals() < 0:
                    return INTERRUPTED
        status = visit(s, levels, level.fd, name)
        if vanished(status):
            status = 0
    return status


cdef bytes taken(Vector* v):
    return PyBytes_FromStringAndSize(v.data, v.size)


def scan(int dir_fd, bint xattrs, tuple skip = ()) -> tuple[bytes, bytes, bytes, bytes]:
    """All entries below directory `dir_fd`, the directory itself first, in tree order, as four byte strings.

    rows    n packed structs: dev, ino, rdev, size, mtime_ns, ctime_ns, blocks, path_end, link_end, xattr_end (8 bytes each),
            mode, uid, gid, nlink (4 bytes each)
    paths   every path back to back; row i's ends at path_end
    links   every symlink's target back to back; row i's ends at link_end
    xattrs  name NUL uint32 length, value, and so on; row i's end at xattr_end. Empty unless asked for
    skip    the names, as bytes, of xattrs to leave out

    In Python: os.walk with lstat, readlink and listxattr of each entry, sorted
    At most KEPT descriptors are open besides the caller's, which stays as it is. Entries that vanish meanwhile are left out.
    GIL released, signals looked for. OSError with the path relative to the directory.
    """
    cdef Scan s
    cdef Vector levels
    cdef c_stat st
    cdef int status, fd
    cdef bytes unwanted = b"".join([name + b"\0" for name in skip])   # ends in two NULs: one is every bytes object's own
    memset(&s, 0, sizeof(Scan))
    s.skip = unwanted
    memset(&levels, 0, sizeof(Vector))
    s.want_xattrs = xattrs
    try:
        s.buffer = <char*>malloc(XATTR_LIST_MAX + XATTR_SIZE_MAX)
        s.keys = <const char**>malloc(KEYS * sizeof(char*))
        s.dents = <char*>malloc(DENTS)
        if s.buffer == NULL or s.keys == NULL or s.dents == NULL or grow(&s.path, 1) < 0:
            raise MemoryError()
        with nogil:
            # Opened anew: the caller's may have been read before, or be O_PATH.
            fd = open_at(dir_fd, ".", O_RDONLY | O_DIRECTORY, 0)
            status = 0 if fd >= 0 else fd
            if status == 0 and fstat(fd, &st) != 0:
                status = -errno
            if status == 0:
                status = add_row(&s, fd, ".", &st)
            if status == 0:
                status = descend(&s, &levels, fd, &st)
                fd = -1
            if status == 0:
                status = walk(&s, &levels)
            if fd >= 0:
                close(fd)
            while levels.size > 0:
                ascend(&levels)
        if status == INTERRUPTED:
            raise_pending()
        if status > 0:
            raise MemoryError()
        if status < 0:
            raise OSError(-status, os.strerror(-status), os.fsdecode(taken(&s.path)) or ".")
        return taken(&s.rows), taken(&s.paths), taken(&s.links), taken(&s.xattrs)
    finally:
        free(s.rows.data)
        free(s.paths.data)
        free(s.links.data)
        free(s.xattrs.data)
        free(s.path.data)
        free(s.buffer)
        free(s.dents)
        free(s.keys)
        free(levels.data)
