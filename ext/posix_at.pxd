"""Header: every libc and Linux declaration the kernels use, and inlines that retry EINTR and answer -errno.

Directories come as descriptors, names as NUL-terminated bytes relative to them; every open is O_CLOEXEC.
"""
from libc.errno cimport EINTR, ENOSYS, errno
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t

cdef extern from "<sys/types.h>" nogil:
    ctypedef unsigned int mode_t
    ctypedef unsigned int uid_t
    ctypedef unsigned int gid_t
    ctypedef unsigned long dev_t
    ctypedef unsigned long ino_t
    ctypedef long off_t
    ctypedef long ssize_t

cdef extern from "<time.h>" nogil:
    struct timespec:
        long tv_sec
        long tv_nsec

cdef extern from "<sys/stat.h>" nogil:
    struct c_stat "stat":
        dev_t st_dev
        ino_t st_ino
        mode_t st_mode
        unsigned long st_nlink
        uid_t st_uid
        gid_t st_gid
        dev_t st_rdev
        off_t st_size
        long st_blksize
        long st_blocks
        timespec st_atim
        timespec st_mtim
        timespec st_ctim
    int fstat(int fd, c_stat* out)
    int fstatat(int dir_fd, const char* name, c_stat* out, int flags)
    int mkdirat(int dir_fd, const char* name, mode_t mode)
    int mknodat(int dir_fd, const char* name, mode_t mode, dev_t device)
    int fchmod(int fd, mode_t mode)
    int fchmodat(int dir_fd, const char* name, mode_t mode, int flags)
    int futimens(int fd, const timespec* times)
    int utimensat(int dir_fd, const char* name, const timespec* times, int flags)
    enum: S_IFMT, S_IFREG, S_IFDIR, S_IFLNK, S_IFCHR, S_IFBLK, S_IFIFO, S_IFSOCK, UTIME_OMIT

cdef extern from "<fcntl.h>" nogil:
    int openat(int dir_fd, const char* name, int flags, ...)
    int posix_fadvise(int fd, off_t offset, off_t length, int advice)
    int fallocate(int fd, int mode, off_t offset, off_t length)
    enum: O_RDONLY, O_WRONLY, O_RDWR, O_CREAT, O_EXCL, O_TRUNC, O_APPEND, O_DIRECTORY, O_NOFOLLOW, O_PATH, O_CLOEXEC
    enum: O_NONBLOCK, O_NOATIME, O_TMPFILE, AT_FDCWD, AT_SYMLINK_NOFOLLOW, AT_EMPTY_PATH, AT_REMOVEDIR, AT_SYMLINK_FOLLOW
    enum: POSIX_FADV_SEQUENTIAL, POSIX_FADV_WILLNEED

    struct file_handle:
        unsigned int handle_bytes
        int handle_type
        unsigned char f_handle[1]    # as many as handle_bytes says
    int name_to_handle_at(int dir_fd, const char* name, file_handle* out, int* mount_id, int flags)
    int open_by_handle_at(int mount_fd, file_handle* handle, int flags)

cdef extern from "<unistd.h>" nogil:
    ssize_t c_read "read"(int fd, void* buffer, size_t size)
    ssize_t c_pread "pread"(int fd, void* buffer, size_t size, off_t offset)
    ssize_t c_write "write"(int fd, const void* buffer, size_t size)
    ssize_t c_pwrite "pwrite"(int fd, const void* buffer, size_t size, off_t offset)
    ssize_t readlinkat(int dir_fd, const char* name, char* buffer, size_t size)
    int symlinkat(const char* target, int dir_fd, const char* name)
    int linkat(int old_dir, const char* old, int new_dir, const char* new, int flags)
    int unlinkat(int dir_fd, const char* name, int flags)
    int fchown(int fd, uid_t uid, gid_t gid)
    int fchownat(int dir_fd, const char* name, uid_t uid, gid_t gid, int flags)
    int ftruncate(int fd, off_t size)
    int fsync(int fd)
    int fdatasync(int fd)
    int close(int fd)
    off_t lseek(int fd, off_t offset, int whence)
    ssize_t copy_file_range(int src, off_t* at, int dst, off_t* to, size_t size, unsigned int flags)
    uid_t geteuid()
    long syscall(long number, ...)
    enum: SEEK_SET, SEEK_DATA, SEEK_HOLE

cdef extern from "<stdio.h>" nogil:
    int renameat(int old_dir, const char* old, int new_dir, const char* new)
    int snprintf(char* out, size_t size, const char* form, ...)
    enum: RENAME_NOREPLACE, RENAME_EXCHANGE, RENAME_WHITEOUT

cdef extern from "<sys/xattr.h>" nogil:
    ssize_t flistxattr(int fd, char* names, size_t size)
    ssize_t fgetxattr(int fd, const char* name, void* value, size_t size)
    int fsetxattr(int fd, const char* name, const void* value, size_t size, int flags)
    ssize_t llistxattr(const char* path, char* names, size_t size)
    ssize_t lgetxattr(const char* path, const char* name, void* value, size_t size)
    int lsetxattr(const char* path, const char* name, const void* value, size_t size, int flags)

cdef extern from "<sys/ioctl.h>" nogil:
    int ioctl(int fd, unsigned long request, ...)

cdef extern from "<linux/fs.h>" nogil:
    enum: FICLONE

cdef extern from "<sys/syscall.h>" nogil:
    enum: SYS_openat2, SYS_renameat2, SYS_getdents64

cdef extern from "<linux/openat2.h>" nogil:
    struct open_how:
        uint64_t flags
        uint64_t mode
        uint64_t resolve
    enum: RESOLVE_NO_XDEV, RESOLVE_NO_MAGICLINKS, RESOLVE_NO_SYMLINKS, RESOLVE_BENEATH, RESOLVE_IN_ROOT

cdef extern from "<dirent.h>" nogil:
    enum: DT_UNKNOWN, DT_FIFO, DT_CHR, DT_DIR, DT_BLK, DT_REG, DT_LNK, DT_SOCK

cdef extern from *:
    """
    #include <stdint.h>
    /* What getdents64(2) writes; glibc declares it only under another name. */
    struct overlaykit_dirent {
        uint64_t d_ino; int64_t d_off; unsigned short d_reclen; unsigned char d_type; char d_name[];
    };
    """
    struct linux_dirent "overlaykit_dirent":
        uint64_t d_ino
        int64_t d_off
        unsigned short d_reclen
        unsigned char d_type
        char d_name[1]

cdef extern from "<linux/limits.h>" nogil:
    enum: PATH_MAX, NAME_MAX, XATTR_SIZE_MAX, XATTR_LIST_MAX


cdef inline int open_at(int dir_fd, const char* name, int flags, mode_t mode) noexcept nogil:
    """A descriptor, or -errno."""
    cdef int fd
    while True:
        fd = openat(dir_fd, name, flags | O_CLOEXEC, mode)
        if fd >= 0:
            return fd
        if errno != EINTR:
            return -errno


cdef inline int open_at2(int dir_fd, const char* path, uint64_t flags, uint64_t mode, uint64_t resolve) noexcept nogil:
    """A descriptor, or -errno; -ENOSYS where the kernel has no openat2 (before 5.6) or a sandbox hides it."""
    cdef open_how how
    cdef long fd
    how.flags = flags | <uint64_t>O_CLOEXEC
    how.mode = mode
    how.resolve = resolve
    while True:
        fd = syscall(SYS_openat2, dir_fd, path, &how, sizeof(open_how))
        if fd >= 0:
            return <int>fd
        if errno != EINTR:
            return -errno


cdef inline ssize_t read_some(int fd, void* buffer, size_t size) noexcept nogil:
    """Bytes read, 0 at the end, or -errno."""
    cdef ssize_t n
    while True:
        n = c_read(fd, buffer, size)
        if n >= 0:
            return n
        if errno != EINTR:
            return -errno


cdef inline int64_t read_full(int fd, uint8_t* buffer, int64_t size) noexcept nogil:
    """Bytes read, fewer than size only at the end of the file, or -errno."""
    cdef int64_t done = 0
    cdef ssize_t n
    while done < size:
        n = read_some(fd, buffer + done, <size_t>(size - done))
        if n < 0:
            return n
        if n == 0:
            break
        done += n
    return done


cdef inline int write_full(int fd, const uint8_t* buffer, int64_t size) noexcept nogil:
    """0 when every byte is written, or -errno."""
    cdef int64_t done = 0
    cdef ssize_t n
    while done < size:
        n = c_write(fd, buffer + done, <size_t>(size - done))
        if n >= 0:
            done += n
        elif errno != EINTR:
            return -errno
    return 0


cdef inline int pwrite_full(int fd, const uint8_t* buffer, int64_t size, int64_t offset) noexcept nogil:
    """0 when every byte is written at offset, or -errno."""
    cdef int64_t done = 0
    cdef ssize_t n
    while done < size:
        n = c_pwrite(fd, buffer + done, <size_t>(size - done), offset + done)
        if n >= 0:
            done += n
        elif errno != EINTR:
            return -errno
    return 0


cdef inline int rename_at(int old_dir, const char* old, int new_dir, const char* new, unsigned int flags) noexcept nogil:
    """0 or -errno. Without flags it is renameat(2), which every file system has."""
    cdef long status
    if flags == 0:
        status = renameat(old_dir, old, new_dir, new)
    else:
        status = syscall(SYS_renameat2, old_dir, old, new_dir, new, flags)
    return 0 if status == 0 else -errno
