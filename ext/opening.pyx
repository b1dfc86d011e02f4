"""Opening what upper has under a name, where to open it is all there is to do: the short way of an overlay's open."""
from libc.errno cimport EOPNOTSUPP, errno
from libc.string cimport strcmp, strlen, strncmp

from posix_at cimport (
    O_CREAT, O_EXCL, O_NOFOLLOW, O_TRUNC, S_IFMT, S_IFREG, c_stat, close, flistxattr, fstat, ftruncate, geteuid, mode_t,
    open_at, ssize_t,
)

cdef extern from "Python.h":
    bytes PyUnicode_EncodeFSDefault(object text)
    bint PyUnicode_IS_ASCII(object text)
    const char* PyUnicode_1BYTE_DATA(object text)

cdef enum:
    STICKY = 0o1002      # a directory in which everybody may write, and only owners remove


cdef bint is_marked(int fd, const char* own) noexcept nogil:
    """Whether the file may be a metacopy or a whiteout. One list is cheaper than to ask for each."""
    cdef char[1024] names
    cdef ssize_t size = flistxattr(fd, names, 1024), at = 0
    cdef size_t n = strlen(own)
    if size < 0:
        return errno != EOPNOTSUPP
    while at < size:
        if strncmp(names + at, own, n) == 0 and (
                strcmp(names + at + n, "metacopy") == 0 or strcmp(names + at + n, "whiteout") == 0):
            return True
        at += strlen(names + at) + 1
    return False


cdef int open_there_at(int dir_fd, const char* name, int flags, mode_t mode, const char* own) noexcept nogil:
    """The descriptor, or -1."""
    cdef c_stat st
    cdef c_stat parent
    cdef int fd
    if flags & O_EXCL:
        return open_at(dir_fd, name, flags, mode)
    fd = open_at(dir_fd, name, (flags & ~(O_CREAT | O_TRUNC)) | O_NOFOLLOW, 0)
    if fd < 0:
        return -1
    if fstat(fd, &st) != 0:
        close(fd)
        return -1
    # There O_CREAT has its say about files of others: fs/namei.c, may_create_in_sticky.
    if flags & O_CREAT and st.st_uid != geteuid():
        if fstat(dir_fd, &parent) != 0 or parent.st_mode & <mode_t>STICKY == <mode_t>STICKY:
            close(fd)
            return -1
    if (st.st_mode & <mode_t>S_IFMT) != <mode_t>S_IFREG:
        return fd
    # The only blocks of a metacopy are those of its xattrs.
    if (st.st_blocks <= 8 and is_marked(fd, own)) or (flags & O_TRUNC and ftruncate(fd, 0) != 0):
        close(fd)
        return -1
    return fd


def open_known(dict nodes not None, str path not None, int flags, int mode, bytes own not None) -> int:
    """A descriptor of what upper has at `path`, if to open it is all there is to do; else -1, whatever the reason.

    nodes  directories that are known, by path; they have `upper_fd` (-1: not there), `dead`, and `names`, those that a lower
           has, or None if nobody has looked
    flags  of open(2), for writing: O_CREAT makes nothing, O_TRUNC spares what has to be looked at first. With O_EXCL a
           file is made if no lower has the name, and nothing is opened
    own    prefix of the marks metacopy and (on an empty file) whiteout, for which there is more to do

    In Python: os.open(name, flags & ~os.O_CREAT | os.O_NOFOLLOW, dir_fd=nodes[head].upper_fd), if it has neither xattr,
    where head, _, name = path.rpartition("/"). All of it at once, since the rest takes longer than the system call.
    """
    cdef Py_ssize_t slash = path.rfind("/"), length
    cdef const char* prefix = own
    cdef const char* name
    cdef bytes encoded
    cdef int dir_fd, fd
    node = nodes.get(path[:slash] if slash > 0 else "")
    if node is None or node.dead:
        return -1
    if flags & O_EXCL:
        names = node.names
        if names is None or path[slash + 1:] in names:
            return -1
    dir_fd = node.upper_fd
    if PyUnicode_IS_ASCII(path):
        name, length = PyUnicode_1BYTE_DATA(path) + slash + 1, len(path) - slash - 1
    else:
        encoded = PyUnicode_EncodeFSDefault(path[slash + 1:])
        name, length = encoded, len(encoded)
    if dir_fd < 0 or length != <Py_ssize_t>strlen(name):
        return -1
    with nogil:
        fd = open_there_at(dir_fd, name, flags, <mode_t>mode, prefix)
    return -1 if fd < 0 else fd
