"""Opening below a directory that somebody else wrote: symlinks stay inside it (RESOLVE_IN_ROOT) or are refused
(RESOLVE_BENEATH and RESOLVE_NO_SYMLINKS). Without openat2 the same by a walk of O_PATH descriptors, a name at a time."""
from libc.errno cimport E2BIG, EAGAIN, EINVAL, ELOOP, ENAMETOOLONG, ENOENT, ENOSYS, EPERM, EXDEV, errno
from libc.stdint cimport uint64_t
from libc.string cimport memcpy, memmove, strlen

from posix_at cimport (
    AT_SYMLINK_NOFOLLOW, O_CLOEXEC, O_CREAT, O_DIRECTORY, O_EXCL, O_NOFOLLOW, O_PATH, PATH_MAX,
    RESOLVE_BENEATH, RESOLVE_IN_ROOT, RESOLVE_NO_MAGICLINKS, RESOLVE_NO_SYMLINKS, S_IFLNK, S_IFMT,
    c_stat, close, fstatat, mkdirat, mode_t, open_at, open_at2, readlinkat, ssize_t,
)

import os

cdef enum:
    MAX_LINKS = 40    # symlinks in one path before ELOOP, as the kernel has it (namei.c, MAXSYMLINKS)
    MAX_DEPTH = 2048  # names in a path of PATH_MAX bytes


cdef bint has_openat2 = True   # until the kernel says no


cdef int walk(int root, const char* path, int flags, mode_t mode, bint links) noexcept nogil:
    """A descriptor of `path` below root, or -errno: what openat2 would give, a name at a time.

    links: symlinks are followed, inside root; else any symlink but a last one opened by O_NOFOLLOW is ELOOP, and a path
    that leads above root is EXDEV.
    """
    cdef char rest[2 * PATH_MAX]
    cdef char name[256]
    cdef char target[PATH_MAX]
    cdef int[MAX_DEPTH] stack
    cdef int depth = 0, fd = -1, hops = 0, status = 0
    cdef size_t begin = 0, size = strlen(path), n, left
    cdef ssize_t got
    cdef bint last, slash
    cdef c_stat st
    if size == 0:
        return -ENOENT
    if size >= PATH_MAX:
        return -ENAMETOOLONG
    if path[0] == c'/' and not links:
        return -EXDEV
    memcpy(rest, path, size + 1)
    while status == 0:
        while rest[begin] == c'/':
            begin += 1
        n = 0
        while rest[begin + n] != 0 and rest[begin + n] != c'/':
            n += 1
        if n == 0 or (n == 1 and rest[begin] == c'.'):
            begin += n
            if rest[begin] == 0:     # nothing more: the directory itself
                fd = open_at(stack[depth - 1] if depth > 0 else root, ".", flags & ~(O_CREAT | O_EXCL), 0)
                status = fd if fd < 0 else 1
            continue
        if n == 2 and rest[begin] == c'.' and rest[begin + 1] == c'.':
            begin += 2
            if depth > 0:
                depth -= 1
                close(stack[depth])
            elif not links:
                status = -EXDEV
            continue
        if n > 255:
            status = -ENAMETOOLONG
            break
        memcpy(name, &rest[begin], n)
        name[n] = 0
        left = begin + n
        slash = rest[left] == c'/'
        while rest[left] == c'/':
            left += 1
        last = rest[left] == 0
        if fstatat(stack[depth - 1] if depth > 0 else root, name, &st, AT_SYMLINK_NOFOLLOW) != 0:
            status = -errno
            if not (status == -ENOENT and last and not slash and flags & O_CREAT):
                break
            status = 0
            st.st_mode = 0
        if (st.st_mode & <mode_t>S_IFMT) == <mode_t>S_IFLNK and (
            not last or slash or not (flags & O_NOFOLLOW or (flags & O_CREAT and flags & O_EXCL))
        ):
            hops += 1
            if not links or hops > MAX_LINKS:
                status = -ELOOP
                break
            got = readlinkat(stack[depth - 1] if depth > 0 else root, name, target, PATH_MAX - 1)
            if got < 0:
                status = -errno
                if status != -EINVAL:
                    break
                status = 0           # no symlink any more since we looked: look again, as often as there may be links
                continue
            if <size_t>got + strlen(&rest[begin + n]) >= PATH_MAX:
                status = -ENAMETOOLONG
                break
            memmove(rest + got, &rest[begin + n], strlen(&rest[begin + n]) + 1)
            memcpy(rest, target, <size_t>got)
            begin = 0
            if got > 0 and target[0] == c'/':
                while depth > 0:
                    depth -= 1
                    close(stack[depth])
            continue
        # Whoever swaps a name for a symlink between the look and the open meets O_NOFOLLOW.
        if last and not slash:
            fd = open_at(stack[depth - 1] if depth > 0 else root, name, flags | O_NOFOLLOW, mode)
            status = fd if fd < 0 else 1
            break
        if depth == MAX_DEPTH:
            status = -ENAMETOOLONG
            break
        fd = open_at(stack[depth - 1] if depth > 0 else root, name, O_PATH | O_NOFOLLOW | O_DIRECTORY, 0)
        if fd < 0:
            status = fd
            break
        stack[depth] = fd
        depth += 1
        begin = left
        if last:                     # "name/": the directory just opened
            fd = open_at(fd, ".", flags & ~(O_CREAT | O_EXCL), 0)
            status = fd if fd < 0 else 1
    while depth > 0:
        depth -= 1
        close(stack[depth])
    return fd if status > 0 else status


cdef int open_below(int root, const char* path, int flags, mode_t mode, bint links) noexcept nogil:
    global has_openat2
    cdef uint64_t resolve = RESOLVE_NO_MAGICLINKS
    cdef int fd
    if has_openat2:
        resolve |= RESOLVE_IN_ROOT if links else RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS
        fd = open_at2(root, path, <uint64_t>flags, <uint64_t>mode if flags & O_CREAT else 0, resolve)
        # EAGAIN: a rename raced with "..": only the walk can tell. EPERM and ENOSYS: a sandbox that knows no openat2.
        if fd != -ENOSYS and fd != -EPERM and fd != -E2BIG and fd != -EAGAIN:
            return fd
        if fd == -ENOSYS:
            has_openat2 = False
    return walk(root, path, flags, mode, links)


def use_openat2(bint wanted) -> bool:
    """Whether openat2 was in use before; from now on as `wanted`. For tests of the walk, and for sandboxes."""
    global has_openat2
    before = has_openat2
    has_openat2 = wanted
    return before


def open_in_root(int root, bytes path not None, int flags, int mode=0o777) -> int:
    """A descriptor of `path` as it would be seen after chroot to directory fd `root`: links and ".." stay inside.

    In Python: os.open(path, flags, mode) in a process that did os.chroot(root). OSError with path.
    """
    cdef const char* name = path
    cdef int fd
    if len(path) != <Py_ssize_t>strlen(name):
        raise ValueError("embedded null byte")
    with nogil:
        fd = open_below(root, name, flags, <mode_t>mode, True)
    if fd < 0:
        raise OSError(-fd, os.strerror(-fd), os.fsdecode(path))
    return fd


def open_beneath(int root, bytes path not None, int flags, int mode=0o777) -> int:
    """A descriptor of `path` below directory fd `root`, no symlink anywhere: ELOOP for one, EXDEV for a way out.

    With O_NOFOLLOW and O_PATH a last symlink opens as itself. OSError with path.
    """
    cdef const char* name = path
    cdef int fd
    if len(path) != <Py_ssize_t>strlen(name):
        raise ValueError("embedded null byte")
    with nogil:
        fd = open_below(root, name, flags, <mode_t>mode, False)
    if fd < 0:
        raise OSError(-fd, os.strerror(-fd), os.fsdecode(path))
    return fd


def mkdir_in_root(int root, bytes path not None, int mode=0o777) -> None:
    """Make directory `path` as after chroot to `root`; the parent must exist. OSError with path."""
    cdef int parent, status
    head, _, name = path.rstrip(b"/").rpartition(b"/")
    cdef const char* last = name
    if not name or name in (b".", b".."):
        raise OSError(EINVAL, os.strerror(EINVAL), os.fsdecode(path))
    parent = open_in_root(root, head or (b"/" if path[:1] == b"/" else b"."), O_PATH | O_DIRECTORY | O_CLOEXEC)
    with nogil:
        status = 0 if mkdirat(parent, last, <mode_t>mode) == 0 else -errno
        close(parent)
    if status < 0:
        raise OSError(-status, os.strerror(-status), os.fsdecode(path))
