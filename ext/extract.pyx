"""Rows of a tar window to files on disk: made below one directory descriptor, one component at a time, nothing followed."""
from cpython.exc cimport PyErr_CheckSignals
from libc.errno cimport EEXIST, EINVAL, ENAMETOOLONG, ENOENT, errno
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy

from posix_at cimport (
    AT_SYMLINK_NOFOLLOW,
    O_CREAT,
    O_DIRECTORY,
    O_EXCL,
    O_NOFOLLOW,
    O_PATH,
    O_RDONLY,
    O_WRONLY,
    PATH_MAX,
    S_IFBLK,
    S_IFCHR,
    S_IFIFO,
    UTIME_OMIT,
    close,
    fchmod,
    fchmodat,
    fchown,
    fchownat,
    futimens,
    linkat,
    mkdirat,
    mknodat,
    open_at,
    symlinkat,
    timespec,
    utimensat,
    write_full,
)

cdef enum:
    FILE = 0
    DIR = 1
    SYMLINK = 2
    CHAR = 3
    BLOCKDEV = 4
    FIFO = 5
    DEPTH = 64           # directories kept open on the way down; below them only the last one is
    NAME = 256           # bytes of a component, with its NUL; longer is ENAMETOOLONG on every file system of Linux

# As ext/tarindex.pyx writes it.
cdef packed struct Row:
    int64_t offset
    int64_t size
    int64_t mtime_ns
    uint64_t rdev
    int64_t path_end
    int64_t link_end
    int64_t head
    int64_t records
    int64_t records_end
    int64_t data
    int64_t here
    uint32_t mode
    uint32_t uid
    uint32_t gid
    uint8_t kind
    uint8_t flags

# The directories open between the root and the last entry's.
cdef struct Way:
    int root
    int depth
    int fds[DEPTH]
    int64_t ends[DEPTH]      # fds[i] is the directory path[:ends[i]]
    const uint8_t* path      # of the last entry; valid as long as the paths are
    int deep                 # one more, below the last level that is kept: path[:deep_end]; -1: none
    int64_t deep_end
    int64_t deep_levels      # how far below


cdef void start_at(Way* way, int root) noexcept nogil:
    way.root = root
    way.depth = 0
    way.deep = -1
    way.path = NULL


cdef void leave_deep(Way* way) noexcept nogil:
    if way.deep >= 0:
        close(way.deep)
        way.deep = -1


cdef void leave(Way* way, int depth) noexcept nogil:
    """Close all but `depth` of the open directories."""
    leave_deep(way)
    while way.depth > depth:
        way.depth -= 1
        close(way.fds[way.depth])


cdef void climb(Way* way, const uint8_t* path, int64_t n) noexcept nogil:
    """Make the deep directory one on the way to path[:n], whose first DEPTH levels are the last entry's: by "..", so that
    the entries of a deep tree, one after another, do not each cost the whole way down."""
    cdef int64_t at = way.ends[DEPTH - 1] + 1, end, shared = 0, shared_end = 0
    cdef int fd
    while at <= way.deep_end:
        end = at
        while end < way.deep_end and way.path[end] != c'/':
            end += 1
        if end >= n or path[end] != c'/' or memcmp(way.path + at, path + at, end - at) != 0:
            break
        shared += 1
        shared_end = end
        at = end + 1
    if shared < way.deep_levels - shared:   # down again is nearer
        leave_deep(way)
        return
    while way.deep_levels > shared:
        fd = open_at(way.deep, "..", O_PATH | O_DIRECTORY | O_NOFOLLOW, 0)
        leave_deep(way)
        if fd < 0:
            return
        way.deep = fd
        way.deep_levels -= 1
    way.deep_end = shared_end


cdef int component(char* name, const uint8_t* path, int64_t n) noexcept nogil:
    if n >= NAME:
        return -ENAMETOOLONG
    memcpy(name, path, n)
    name[n] = 0
    return 0


cdef int enter(Way* way, const uint8_t* path, int64_t n, char* name) noexcept nogil:
    """The open directory that holds path[:n], whose last component goes to `name`; or -errno.

    Directories that are not there are made: archives need not write them. A symlink on the way is -ENOTDIR.
    """
    cdef int64_t at = 0, end, same = 0
    cdef int depth = 0, fd, parent, status
    while depth < way.depth:
        end = way.ends[depth]
        if end >= n or path[end] != c'/' or memcmp(way.path + same, path + same, end - same) != 0:
            break
        same = end
        depth += 1
    if way.deep >= 0 and depth == DEPTH:
        climb(way, path, n)
    if way.deep < 0 or depth < DEPTH:
        leave(way, depth)
    way.path = path
    if way.deep >= 0:
        parent = way.deep
        at = way.deep_end + 1
    else:
        parent = way.fds[depth - 1] if depth > 0 else way.root
        at = same + 1 if depth > 0 else 0
    while True:
        end = at
        while end < n and path[end] != c'/':
            end += 1
        status = component(name, path + at, end - at)
        if status < 0:
            return status
        if end == n:
            return parent
        fd = open_at(parent, name, O_PATH | O_DIRECTORY | O_NOFOLLOW, 0)
        if fd == -ENOENT:
            if mkdirat(parent, name, 0o755) != 0 and errno != EEXIST:
                return -errno
            fd = open_at(parent, name, O_PATH | O_DIRECTORY | O_NOFOLLOW, 0)
        if fd < 0:
            return fd
        if way.depth < DEPTH:
            way.fds[way.depth] = fd
            way.ends[way.depth] = end
            way.depth += 1
        else:
            way.deep_levels = way.deep_levels + 1 if way.deep >= 0 else 1
            leave_deep(way)
            way.deep = fd
            way.deep_end = end
        parent = fd
        at = end + 1


cdef inline void times_of(int64_t mtime_ns, timespec* times) noexcept nogil:
    cdef int64_t seconds = mtime_ns // 1000000000, nanos = mtime_ns % 1000000000
    if nanos < 0:
        nanos += 1000000000
        seconds -= 1
    times[0].tv_sec = 0
    times[0].tv_nsec = UTIME_OMIT   # when it was read is nobody's business here
    times[1].tv_sec = seconds
    times[1].tv_nsec = nanos


cdef inline bint plain(uint32_t mode, uint32_t umask) noexcept nogil:
    """Whether a file made with this mode has it: nothing that creating or changing the owner would take off."""
    return mode & 0o7000 == 0 and mode & umask == 0


cdef int finish_file(
    int fd, uint32_t mode, uint32_t uid, uint32_t gid, int64_t mtime_ns, uint32_t me, uint32_t mine, uint32_t umask
) noexcept nogil:
    """Owner, mode, times, in the order in which none undoes another. 0 or -errno."""
    cdef timespec times[2]
    if (uid != me or gid != mine) and fchown(fd, uid, gid) != 0:
        return -errno
    if not plain(mode, umask) and fchmod(fd, mode) != 0:
        return -errno
    times_of(mtime_ns, times)
    return 0 if futimens(fd, times) == 0 else -errno


cdef int make(
    Way* way, const Row* row, const uint8_t* path, int64_t n, const uint8_t* link, int64_t m, const uint8_t* buffer,
    uint32_t me, uint32_t mine, uint32_t umask, int* open_file,
) noexcept nogil:
    """One entry on disk. 0 or -errno; a file whose content goes on in the next window stays open in *open_file."""
    cdef char name[NAME]
    cdef char target[PATH_MAX]
    cdef timespec times[2]
    cdef int parent, fd, status
    if n == 0:
        return 0   # the root is there; its attributes come last, with the other directories'
    parent = enter(way, path, n, name)
    if parent < 0:
        return parent
    if row.kind == FILE:
        fd = open_at(parent, name, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW, row.mode & 0o777)
        if fd < 0:
            return fd
        status = write_full(fd, buffer + row.data, row.here)
        if status == 0 and row.here < row.size:
            open_file[0] = fd
            return 0
        if status == 0:
            status = finish_file(fd, row.mode, row.uid, row.gid, row.mtime_ns, me, mine, umask)
        if close(fd) != 0 and status == 0:
            status = -errno
        return status
    if row.kind == DIR:
        # Its attributes come last: what is made in it would change its times, and its mode might keep us out.
        return 0 if mkdirat(parent, name, 0o700) == 0 else -errno
    if row.kind == SYMLINK:
        if m >= PATH_MAX:
            return -ENAMETOOLONG
        memcpy(target, link, m)
        target[m] = 0
        status = symlinkat(target, parent, name)
    elif row.kind == FIFO:
        status = mknodat(parent, name, S_IFIFO | 0o600, 0)
    elif row.kind == CHAR or row.kind == BLOCKDEV:
        status = mknodat(parent, name, (S_IFCHR if row.kind == CHAR else S_IFBLK) | 0o600, row.rdev)
    else:
        return -EINVAL
    if status != 0:
        return -errno
    if (row.uid != me or row.gid != mine) and fchownat(parent, name, row.uid, row.gid, AT_SYMLINK_NOFOLLOW) != 0:
        return -errno
    if row.kind != SYMLINK and fchmodat(parent, name, row.mode, 0) != 0:
        return -errno
    times_of(row.mtime_ns, times)
    return 0 if utimensat(parent, name, times, AT_SYMLINK_NOFOLLOW) == 0 else -errno


def create(
    int root_fd, const uint8_t[::1] buffer, const uint8_t[::1] rows, const uint8_t[::1] paths, const uint8_t[::1] links,
    const uint8_t[::1] skip, int64_t first, uint32_t me, uint32_t mine, uint32_t umask,
) -> tuple[int, int, int]:
    """(row, errno, fd): entries first, first + 1 ... made below `root_fd`, up to the row that failed (errno 0: all).

    buffer, rows, paths, links  a window as ext/tarindex.pyx wrote it
    skip      uint8[n]  1 for a row to leave out
    me, mine  the ids that new files get by themselves; umask what is taken off their modes (0o777 if unsure)
    fd        the last file, still open, if its content goes on in the next window; else -1. The caller closes it

    Directories are made 0700 with no other attribute: `attributes` sets those when all is there.
    GIL released. ValueError if the shapes disagree.
    """
    cdef int64_t n = skip.shape[0], i, path_begin, link_begin
    cdef const Row* row = <const Row*>&rows[0] if rows.shape[0] else NULL
    cdef const uint8_t* path_data = &paths[0] if paths.shape[0] else NULL
    cdef const uint8_t* link_data = &links[0] if links.shape[0] else NULL
    cdef Way way
    cdef int status = 0, open_file = -1
    if rows.shape[0] != n * <int64_t>sizeof(Row) or not 0 <= first <= n:
        raise ValueError(f"create: shapes disagree: {rows.shape[0]} bytes of rows, skip {n}, first {first}")
    for i in range(n):
        path_begin = row[i - 1].path_end if i else 0
        link_begin = row[i - 1].link_end if i else 0
        if not (
            0 <= path_begin <= row[i].path_end <= paths.shape[0] and 0 <= link_begin <= row[i].link_end <= links.shape[0]
            and 0 <= row[i].data and 0 <= row[i].here and row[i].data + row[i].here <= buffer.shape[0]
        ):
            raise ValueError(f"create: row {i} is not of this window")
    start_at(&way, root_fd)
    i = first
    with nogil:
        while i < n:
            if not skip[i]:
                path_begin = row[i - 1].path_end if i else 0
                link_begin = row[i - 1].link_end if i else 0
                status = make(
                    &way, row + i, path_data + path_begin, row[i].path_end - path_begin,
                    link_data + link_begin, row[i].link_end - link_begin, &buffer[0], me, mine, umask, &open_file,
                )
                if status < 0:
                    break
            i += 1
        leave(&way, 0)
    try:
        PyErr_CheckSignals()
    except BaseException:
        if open_file >= 0:
            close(open_file)   # nobody else knows of it
        raise
    return i, -status, open_file


def finish(int fd, uint32_t mode, uint32_t uid, uint32_t gid, int64_t mtime_ns, uint32_t me, uint32_t mine) -> int:
    """0 or an errno: give the open file its owner, mode and modification time. The descriptor stays open."""
    cdef int status
    with nogil:
        status = finish_file(fd, mode, uid, gid, mtime_ns, me, mine, 0o777)
        # Nothing can be taken off it, but it may have been made with more.
        if status == 0 and mode == 0 and fchmod(fd, 0) != 0:
            status = -errno
    return -status


cdef int set_directory(
    int parent, const char* name, uint32_t mode, uint32_t uid, uint32_t gid, int64_t mtime_ns, uint32_t me, uint32_t mine
) noexcept nogil:
    """0 or -errno."""
    cdef timespec times[2]
    cdef int status = 0
    # By a descriptor: fchmodat would follow a symlink.
    cdef int fd = open_at(parent, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW, 0)
    if fd < 0:
        return fd
    times_of(mtime_ns, times)
    if (uid != me or gid != mine) and fchown(fd, uid, gid) != 0:
        status = -errno
    elif fchmod(fd, mode) != 0 or futimens(fd, times) != 0:
        status = -errno
    close(fd)
    return status


def attributes(
    int root_fd, const uint8_t[::1] arena, const int64_t[::1] start, const int64_t[::1] rows,
    const uint32_t[::1] mode, const uint32_t[::1] uid, const uint32_t[::1] gid, const int64_t[::1] mtime_ns,
    uint32_t me, uint32_t mine,
) -> tuple[int, int]:
    """(i, errno): owner, mode and times given to directories rows[0], rows[1] ... up to the one that failed (errno 0: all).

    arena, start                paths of a tree
    rows                        int64[r]  which, children before their parents: a mode might keep us out
    mode, uid, gid, mtime_ns    the tree's columns

    The root itself is left to the caller, who has it open. GIL released. ValueError if the shapes disagree.
    """
    cdef int64_t n = start.shape[0] - 1, r = rows.shape[0], i = 0, row
    cdef char name[NAME]
    cdef Way way
    cdef int status = 0, parent
    if n < 0 or mode.shape[0] != n or uid.shape[0] != n or gid.shape[0] != n or mtime_ns.shape[0] != n:
        raise ValueError(f"attributes: shapes disagree: {n} rows, mode {mode.shape[0]}")
    for i in range(r):
        if not 0 <= rows[i] < n or start[rows[i] + 1] > arena.shape[0] or start[rows[i]] >= start[rows[i] + 1]:
            raise ValueError(f"attributes: no row {rows[i]} to set")
    start_at(&way, root_fd)
    i = 0
    with nogil:
        while i < r:
            row = rows[i]
            parent = enter(&way, &arena[start[row]], start[row + 1] - start[row], name)
            if parent < 0:
                status = parent
                break
            status = set_directory(parent, name, mode[row], uid[row], gid[row], mtime_ns[row], me, mine)
            if status == -ENOENT:
                # Nobody wrote it, and nothing was made in it: what it holds are marks.
                status = 0 if mkdirat(parent, name, 0o700) == 0 else -errno
                if status == 0:
                    status = set_directory(parent, name, mode[row], uid[row], gid[row], mtime_ns[row], me, mine)
            if status < 0:
                break
            i += 1
        leave(&way, 0)
    PyErr_CheckSignals()
    return i, -status


def nodes(
    int root_fd, const uint8_t[::1] arena, const int64_t[::1] start, const int64_t[::1] rows, const int64_t[::1] targets,
) -> tuple[int, int]:
    """(i, errno): hard links and whiteouts made for rows[0], rows[1] ... up to the one that failed (errno 0: all).

    arena, start  paths of a tree
    rows          int64[r]  which to make
    targets       int64[r]  the row that rows[i] is another name of; -1: a whiteout, char device 0:0

    GIL released. ValueError if the shapes disagree.
    """
    cdef int64_t n = start.shape[0] - 1, r = rows.shape[0], i = 0, row, target
    cdef char name[NAME]
    cdef char old_name[NAME]
    cdef Way way, old_way
    cdef int status = 0, parent, old_parent
    if n < 0 or targets.shape[0] != r:
        raise ValueError(f"nodes: shapes disagree: {r} rows, {targets.shape[0]} targets")
    for i in range(r):
        if not 0 <= rows[i] < n or not -1 <= targets[i] < n or start[rows[i]] >= start[rows[i] + 1]:
            raise ValueError(f"nodes: no row {rows[i]} to make, or no target {targets[i]}")
    if start[n] > arena.shape[0]:
        raise ValueError(f"nodes: start ends at {start[n]}, the arena at {arena.shape[0]}")
    start_at(&way, root_fd)
    start_at(&old_way, root_fd)
    i = 0
    with nogil:
        while i < r:
            row = rows[i]
            target = targets[i]
            parent = enter(&way, &arena[start[row]], start[row + 1] - start[row], name)
            if parent < 0:
                status = parent
                break
            if target < 0:
                status = 0 if mknodat(parent, name, S_IFCHR, 0) == 0 else -errno
            else:
                old_parent = enter(&old_way, &arena[start[target]], start[target + 1] - start[target], old_name)
                if old_parent < 0:
                    status = old_parent
                else:
                    status = 0 if linkat(old_parent, old_name, parent, name, 0) == 0 else -errno
            if status < 0:
                break
            i += 1
        leave(&way, 0)
        leave(&old_way, 0)
    PyErr_CheckSignals()
    return i, -status
