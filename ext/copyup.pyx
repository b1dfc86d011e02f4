"""Copying one inode, or many, from a lower directory into an upper: made under a temporary name in work, then renamed.

The order is that of a careful copy: create with no rights for others, data, owner, mode, xattrs, times, fsync, rename.
Owner before mode and both before xattrs, because chown clears setuid bits and security.capability. A step that fails
removes the temporary and is reported: what cannot be kept is an error. Follows fs/overlayfs/copy_up.c in what is copied.
"""
from cpython.exc cimport PyErr_CheckSignals
from libc.errno cimport EEXIST, EINVAL, EIO, ENODATA, ENOMEM, ENOSYS, EOPNOTSUPP, EPERM, ERANGE, errno
from libc.stdint cimport int32_t, int64_t, uint8_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, strlen, strncmp

from filedata cimport Copy, copy_step
from posix_at cimport (
    AT_REMOVEDIR, AT_SYMLINK_NOFOLLOW, NAME_MAX, O_CREAT, O_DIRECTORY, O_EXCL, O_NOATIME, O_NOFOLLOW, O_NONBLOCK, O_RDONLY,
    O_WRONLY, PATH_MAX, RENAME_NOREPLACE, S_IFDIR, S_IFLNK, S_IFMT, S_IFREG, SEEK_SET, c_stat, close, fchmod, fchmodat,
    fchownat, fgetxattr, flistxattr, fsetxattr, fstat, fstatat, fsync, ftruncate, futimens, lgetxattr, llistxattr, lseek,
    lsetxattr, mkdirat, mknodat, mode_t, open_at, readlinkat, rename_at as c_rename_at, snprintf, ssize_t, symlinkat,
    timespec, unlinkat, utimensat,
)

import os

# What to copy and how; the doors' `what`.
cdef enum:
    C_NO_DATA = 1        # an empty file: whoever opens with O_TRUNC wants nothing of the old content
    C_METACOPY = 2       # size and attributes only, marked so: the data stays below
    C_SYNC = 4           # fsync before the rename
    C_KEEP_TIMES = 8     # give the directory that gains the name its times back

NO_DATA = C_NO_DATA
METACOPY = C_METACOPY
SYNC = C_SYNC
KEEP_TIMES = C_KEEP_TIMES

cdef enum:
    BATCH = 4096         # files between signal checks

# --- attributes -----------------------------------------------------------------------------------------------------

cdef bint is_private(const char* name, const char* own) noexcept nogil:
    """Whether an xattr is the overlay's own bookkeeping: own + NAME, but not the escaped own + "overlay." + NAME."""
    cdef size_t n = strlen(own)
    if strncmp(name, own, n) != 0:
        return False
    return strncmp(name + n, "overlay.", 8) != 0


cdef bint must_keep(const char* name) noexcept nogil:
    """Whether a file system that cannot store the xattr makes the copy-up fail (ovl_must_copy_xattr)."""
    return strncmp(name, "security.", 9) == 0 or strncmp(name, "system.posix_acl_", 17) == 0


cdef int copy_xattrs(int src, const char* src_path, int dst, const char* dst_path, const char* own) noexcept nogil:
    """0 or -errno. By descriptor where it is not -1, else by path, never following a last symlink."""
    cdef ssize_t size, n
    cdef char* names = NULL
    cdef char* name
    cdef char* value = NULL
    cdef size_t room = 0
    cdef int status = 0
    while True:
        size = flistxattr(src, names, room) if src >= 0 else llistxattr(src_path, names, room)
        if size < 0 and errno == ERANGE:
            size = 65536
        elif size < 0:
            status = 0 if errno in (EOPNOTSUPP, ENOSYS) else -errno
            break
        elif size == 0 or <size_t>size <= room:
            break
        free(names)
        room = <size_t>size
        names = <char*>malloc(room)
        if names == NULL:
            return -ENOMEM
    if status == 0 and size > 0:
        value = <char*>malloc(65536)    # XATTR_SIZE_MAX
        if value == NULL:
            status = -ENOMEM
        name = names
        while status == 0 and name < names + size:
            if not is_private(name, own):
                n = fgetxattr(src, name, value, 65536) if src >= 0 else lgetxattr(src_path, name, value, 65536)
                if n < 0:
                    status = 0 if errno == ENODATA else -errno
                elif (fsetxattr(dst, name, value, <size_t>n, 0) if dst >= 0
                        else lsetxattr(dst_path, name, value, <size_t>n, 0)) != 0:
                    status = -errno
                    if status == -EOPNOTSUPP and not must_keep(name):
                        status = 0
            name += strlen(name) + 1
    free(value)
    free(names)
    return status


cdef int set_origin(Copy* c, const char* dst_path, const char* own, const uint8_t* origin, size_t size) noexcept nogil:
    """Have the copy say which lower inode it comes from. 0 or -errno."""
    cdef char[64] mark
    cdef int status
    snprintf(mark, 64, "%sorigin", own)
    if (fsetxattr(c.dst, mark, origin, size, 0) if c.dst >= 0 else lsetxattr(dst_path, mark, origin, size, 0)) != 0:
        status = -errno
        return 0 if status in (-EOPNOTSUPP, -EPERM) else status    # user.* is for files and directories only
    return 0


cdef int finish(
    Copy* c, int src_dir, const char* src, int work, const char* temp, const char* own, int what, const uint8_t* origin,
    size_t origin_size
) noexcept nogil:
    """Owner, mode, xattrs, times, fsync of the temporary. 0 or -errno."""
    cdef char[PATH_MAX] src_path
    cdef char[PATH_MAX] dst_path
    cdef char[64] mark
    cdef timespec[2] times
    cdef c_stat made
    cdef int status
    cdef bint link = (c.st.st_mode & <mode_t>S_IFMT) == <mode_t>S_IFLNK
    src_path[0] = dst_path[0] = 0
    if fstatat(work, temp, &made, AT_SYMLINK_NOFOLLOW) != 0:
        return -errno
    if made.st_uid != c.st.st_uid or made.st_gid != c.st.st_gid:
        if fchownat(work, temp, c.st.st_uid, c.st.st_gid, AT_SYMLINK_NOFOLLOW) != 0:
            return -errno
    if c.dst >= 0:
        if fchmod(c.dst, c.st.st_mode & 0o7777) != 0:
            return -errno
    elif not link:
        # Nobody else can reach into work, so the temporary cannot be a symlink by now.
        if fchmodat(work, temp, c.st.st_mode & 0o7777, 0) != 0:
            return -errno
    if c.dst < 0:
        snprintf(src_path, PATH_MAX, "/proc/self/fd/%d/%s", src_dir, src)
        snprintf(dst_path, PATH_MAX, "/proc/self/fd/%d/%s", work, temp)
    status = copy_xattrs(c.src, src_path, c.dst, dst_path, own)
    if status < 0:
        return status
    if origin_size > 0:
        status = set_origin(c, dst_path, own, origin, origin_size)
        if status < 0:
            return status
    if what & C_METACOPY and c.dst >= 0 and (c.st.st_mode & <mode_t>S_IFMT) == <mode_t>S_IFREG:
        snprintf(mark, 64, "%smetacopy", own)
        if fsetxattr(c.dst, mark, "", 0, 0) != 0:
            return -errno
    times[0] = c.st.st_atim
    times[1] = c.st.st_mtim
    if (futimens(c.dst, times) if c.dst >= 0 else utimensat(work, temp, times, AT_SYMLINK_NOFOLLOW)) != 0:
        return -errno
    if what & C_SYNC and c.dst >= 0 and fsync(c.dst) != 0:
        return -errno
    return 0


cdef int begin(Copy* c, int src_dir, const char* src, int work, const char* temp, int what) noexcept nogil:
    """Look at the source, create the temporary. 0 or -errno; either way c.src and c.dst are set."""
    cdef mode_t kind
    cdef char[PATH_MAX] target
    cdef ssize_t n
    c.src = c.dst = -1
    c.at = 0
    c.cloned = c.plain = False
    if fstatat(src_dir, src, &c.st, AT_SYMLINK_NOFOLLOW) != 0:
        return -errno
    kind = c.st.st_mode & <mode_t>S_IFMT
    if kind == <mode_t>S_IFREG or kind == <mode_t>S_IFDIR:
        # Reading must not change the lower's atime; O_NOATIME is for its owner and root only.
        c.src = open_at(src_dir, src, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_NOATIME, 0)
        if c.src == -EPERM:
            c.src = open_at(src_dir, src, O_RDONLY | O_NOFOLLOW | O_NONBLOCK, 0)
        if c.src < 0:
            return c.src
        if fstat(c.src, &c.st) != 0:
            return -errno
        if (c.st.st_mode & <mode_t>S_IFMT) != kind:
            return -EIO    # swapped between the two looks: lowers must not change
    if kind == <mode_t>S_IFREG:
        c.dst = open_at(work, temp, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW, 0o600)
        if c.dst < 0:
            return c.dst
        if what & C_METACOPY and ftruncate(c.dst, c.st.st_size) != 0:
            return -errno
    elif kind == <mode_t>S_IFDIR:
        if mkdirat(work, temp, 0o700) != 0:
            return -errno
        c.dst = open_at(work, temp, O_RDONLY | O_DIRECTORY | O_NOFOLLOW, 0)
        if c.dst < 0:
            return c.dst
    elif kind == <mode_t>S_IFLNK:
        n = readlinkat(src_dir, src, target, PATH_MAX - 1)
        if n < 0:
            return -errno
        target[n] = 0
        if symlinkat(target, work, temp) != 0:
            return -errno
    elif mknodat(work, temp, kind | 0o600, c.st.st_rdev) != 0:
        return -errno
    if kind != <mode_t>S_IFREG or what & (C_NO_DATA | C_METACOPY):
        c.cloned = True
    return 0


cdef int publish(int work, const char* temp, int dst_dir, const char* dst, int what) noexcept nogil:
    """Rename the temporary into place; nothing may be there. 0 or -errno."""
    cdef c_stat parent
    cdef timespec[2] times
    cdef int status
    if what & C_KEEP_TIMES and fstatat(dst_dir, ".", &parent, 0) != 0:
        return -errno
    status = c_rename_at(work, temp, dst_dir, dst, RENAME_NOREPLACE)
    if status == -EINVAL:    # a file system without flags; one writer holds work, so nothing comes between
        status = -EEXIST if fstatat(dst_dir, dst, &parent, AT_SYMLINK_NOFOLLOW) == 0 else c_rename_at(
            work, temp, dst_dir, dst, 0
        )
    if status == 0 and what & C_KEEP_TIMES:
        times[0] = parent.st_atim
        times[1] = parent.st_mtim
        utimensat(dst_dir, ".", times, 0)    # best effort, as the kernel's
    return status


cdef void release(Copy* c) noexcept nogil:
    if c.src >= 0:
        close(c.src)
    if c.dst >= 0:
        close(c.dst)


cdef void discard(Copy* c, int work, const char* temp) noexcept nogil:
    unlinkat(work, temp, AT_REMOVEDIR if (c.st.st_mode & <mode_t>S_IFMT) == <mode_t>S_IFDIR else 0)


cdef int copy_whole(
    int src_dir, const char* src, int work, const char* temp, int dst_dir, const char* dst, const char* own, int what
) noexcept nogil:
    """All of one inode. 0 or -errno; on failure nothing is left in work."""
    cdef Copy c
    cdef int status = begin(&c, src_dir, src, work, temp, what)
    if status == -EEXIST:    # somebody's temporary: not ours to remove
        release(&c)
        return status
    while status == 0:
        status = copy_step(&c)
        if status <= 0:
            break
        status = 0
    if status == 0:
        status = finish(&c, src_dir, src, work, temp, own, what, NULL, 0)
    release(&c)
    if status == 0:
        status = publish(work, temp, dst_dir, dst, what)
    if status < 0:
        discard(&c, work, temp)
    return status


# --- doors ----------------------------------------------------------------------------------------------------------

cdef object fail(int status, bytes name):
    raise OSError(-status, os.strerror(-status), os.fsdecode(name))


def copy_up(int src_dir, bytes src not None, int work, bytes temp not None, int dst_dir, bytes dst not None,
            bytes own not None, int what=0, bytes origin not None=b"") -> None:
    """Copy one inode of any kind: `src` below src_dir, made as `temp` below work, renamed to `dst` below dst_dir.

    own     prefix of the xattrs that stay behind ("trusted.overlay." or "user.overlay."), escaped ones excepted
    what    NO_DATA | METACOPY | SYNC | KEEP_TIMES
    origin  the copy's xattr of that name, which says where it comes from (ext/origin.pyx, record); b"": none

    A directory comes without what is in it. Reflink, else copy_file_range, else read and write; holes are kept. OSError
    with src; nothing is left in work then. Checks for signals every 64 MiB.
    In Python: shutil.copy2(src, temp); os.chown(temp, ...); os.rename(temp, dst)
    """
    cdef const char* src_name = src
    cdef const char* temp_name = temp
    cdef const char* dst_name = dst
    cdef const char* prefix = own
    cdef const uint8_t* source = <const uint8_t*><const char*>origin
    cdef size_t source_size = <size_t>len(origin)
    cdef Copy c
    cdef int status
    with nogil:
        status = begin(&c, src_dir, src_name, work, temp_name, what)
    if status < 0:
        release(&c)
        if status != -EEXIST:
            discard(&c, work, temp_name)
        fail(status, src)
    try:
        while True:
            with nogil:
                status = copy_step(&c)
            if status <= 0:
                break
            PyErr_CheckSignals()
        if status == 0:
            with nogil:
                status = finish(&c, src_dir, src_name, work, temp_name, prefix, what, source, source_size)
                if status == 0:
                    status = publish(work, temp_name, dst_dir, dst_name, what)
        if status < 0:
            fail(status, src)
    except BaseException:
        discard(&c, work, temp_name)
        raise
    finally:
        release(&c)


def copy_up_many(const int32_t[::1] src_dirs, const int32_t[::1] dst_dirs, const uint8_t[::1] arena,
                 const int64_t[::1] start, int work, bytes own not None, int what, int32_t[::1] errnos) -> int:
    """How many of n copies failed. Row i: its name below src_dirs[i] to the same name below dst_dirs[i].

    src_dirs, dst_dirs  int32[n]    directory descriptors
    arena, start        uint8[m], int64[n+1]  name i is arena[start[i]:start[i+1]], one name, no NUL
    errnos              int32[n]    written: 0, or why row i was not copied

    In Python: [copy_up(s, name, work, b"#%x" % i, d, name, own, what) for i, (s, d, name) in enumerate(rows)]
    """
    cdef int64_t n = src_dirs.shape[0], i, stop, size
    cdef int64_t failures = 0
    cdef char[256] name
    cdef char[32] temp
    cdef const char* prefix = own
    cdef int status
    if dst_dirs.shape[0] != n or start.shape[0] != n + 1 or errnos.shape[0] != n or start[n] != arena.shape[0]:
        raise ValueError(f"copy_up_many: shapes disagree: {n} sources, {dst_dirs.shape[0]} targets, {start.shape[0]} starts")
    i = 0
    while i < n:
        stop = n if n - i < BATCH else i + BATCH
        with nogil:
            while i < stop:
                size = start[i + 1] - start[i]
                if size < 1 or size > NAME_MAX or start[i] < 0 or start[i + 1] > arena.shape[0]:
                    status = -EINVAL
                else:
                    memcpy(name, &arena[start[i]], <size_t>size)
                    name[size] = 0
                    snprintf(temp, 32, "#%llx", <unsigned long long>i)
                    status = copy_whole(src_dirs[i], name, work, temp, dst_dirs[i], name, prefix, what)
                errnos[i] = -status
                failures += status != 0
                i += 1
        PyErr_CheckSignals()
    return failures


def copy_data(int src, int dst, int64_t size, progress=None) -> None:
    """Fill file descriptor dst with `size` bytes of src from its start: reflink, copy_file_range, or read and write; holes
    are kept. progress: called with the bytes that are done, every 64 MiB. OSError; EIO when src is shorter."""
    cdef Copy c
    cdef int status
    c.src = src
    c.dst = dst
    c.at = 0
    c.cloned = c.plain = False
    if fstat(src, &c.st) != 0:
        fail(-errno, b"")
    c.st.st_size = size
    if lseek(src, 0, SEEK_SET) < 0 or lseek(dst, 0, SEEK_SET) < 0:
        fail(-errno, b"")
    while True:
        with nogil:
            status = copy_step(&c)
        if status <= 0:
            break
        PyErr_CheckSignals()
        if progress is not None:
            progress(c.at)
    if status < 0:
        fail(status, b"")


def rename_at(int old_dir, bytes old not None, int new_dir, bytes new not None, int flags=0) -> None:
    """Rename with renameat2's flags (NOREPLACE 1, EXCHANGE 2, WHITEOUT 4). OSError with both names."""
    cdef const char* a = old
    cdef const char* b = new
    cdef int status
    with nogil:
        status = c_rename_at(old_dir, a, new_dir, b, <unsigned int>flags)
    if status < 0:
        raise OSError(-status, os.strerror(-status), os.fsdecode(old), None, os.fsdecode(new))
