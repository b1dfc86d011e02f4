"""Which inode a copy comes from. Overlayfs keeps it as a record of the inode's file handle: in the xattrs origin and upper,
and as the names in an index directory (fs/overlayfs/overlayfs.h, struct ovl_fb)."""
from libc.errno cimport ENOSYS, EOPNOTSUPP, EOVERFLOW, EPERM, errno
from libc.stdint cimport uint8_t
from libc.string cimport memcpy

from posix_at cimport O_CLOEXEC, O_NOFOLLOW, O_PATH, file_handle, name_to_handle_at, open_by_handle_at

import os

cdef extern from "Python.h":
    ctypedef struct PyObject
    ctypedef struct PyTypeObject
    PyTypeObject* Py_TYPE(object o)
    object PyStructSequence_New(PyTypeObject* kind)
    PyObject* PyStructSequence_GetItem(object o, Py_ssize_t i)
    void PyStructSequence_SetItem(object o, Py_ssize_t i, PyObject* value)    # takes over a reference
    void Py_XINCREF(PyObject* o)

cdef enum:
    HANDLE_MAX = 128         # bytes (fs.h, MAX_HANDLE_SZ)
    HEAD = 21                # bytes before the handle
    MAGIC = 0xFB
    BIG_ENDIAN = 1           # flags
    PATH_UPPER = 4           # the inode is one of upper's
    INO = 1                  # places in an os.stat_result
    DEV = 2
    NLINK = 3

cdef struct Handle:          # a struct file_handle with room
    unsigned int size        # of data (bytes)
    int type
    uint8_t[HANDLE_MAX] data

cdef struct Record:
    uint8_t version
    uint8_t magic
    uint8_t size             # of all of it that is used (bytes)
    uint8_t flags
    uint8_t type
    uint8_t[16] uuid
    uint8_t[HANDLE_MAX] handle


def record(int dir_fd, bytes name not None, bytes uuid not None, bint upper=False) -> bytes:
    """The record of `name` below dir_fd, a last symlink not followed; b"" where there are no handles.

    uuid   of its file system, 16 bytes
    upper  it is an inode of upper's

    OSError with name.
    """
    cdef const char* given = name
    cdef const char* fs = uuid
    cdef Handle handle
    cdef Record out
    cdef int mount_id, one = 1, status = 0
    if len(uuid) != 16:
        raise ValueError(f"record: a uuid has 16 bytes, not {len(uuid)}")
    handle.size = HANDLE_MAX
    with nogil:
        if name_to_handle_at(dir_fd, given, <file_handle*>&handle, &mount_id, 0) != 0:
            status = errno
    if status in (EOPNOTSUPP, ENOSYS, EPERM, EOVERFLOW):    # the file system has none, or a sandbox does not tell
        return b""
    if status != 0:
        raise OSError(status, os.strerror(status), os.fsdecode(name))
    out.version = 0
    out.magic = MAGIC
    out.size = <uint8_t>(HEAD + handle.size)
    out.flags = 0 if (<uint8_t*>&one)[0] == 1 else BIG_ENDIAN
    if upper:
        out.flags |= PATH_UPPER
    out.type = <uint8_t>handle.type
    memcpy(out.uuid, fs, 16)
    memcpy(out.handle, handle.data, handle.size)
    return (<char*>&out)[:out.size]


def open_record(int mount_fd, bytes given not None) -> int:
    """A descriptor (O_PATH) of the inode that a record names, on the file system of descriptor mount_fd.

    OSError: ESTALE if there is no such inode any more, EPERM without the capability DAC_READ_SEARCH. ValueError for what is
    no record.
    """
    cdef const char* data = given
    cdef Handle handle
    cdef int fd, status = 0
    if not HEAD < len(given) <= HEAD + HANDLE_MAX:
        raise ValueError(f"no record of a file handle: {len(given)} bytes")
    handle.size = <unsigned int>(len(given) - HEAD)
    handle.type = (<const uint8_t*>data)[4]
    memcpy(handle.data, data + HEAD, handle.size)
    with nogil:
        fd = open_by_handle_at(mount_fd, <file_handle*>&handle, O_PATH | O_NOFOLLOW | O_CLOEXEC)
        if fd < 0:
            status = errno
    if fd < 0:
        raise OSError(status, os.strerror(status))
    return fd


def renumbered(st not None, dev, ino, nlink) -> object:
    """os.stat_result `st` with another st_dev, st_ino and st_nlink.

    In Python: os.stat_result((st[0], ino, dev, nlink, *st[4:10]), st.__reduce__()[1][1])
    """
    cdef object out = PyStructSequence_New(Py_TYPE(st))
    cdef Py_ssize_t i, n = st.n_fields
    cdef PyObject* item
    if not isinstance(st, os.stat_result):
        raise TypeError(f"renumbered: no stat result but {type(st).__name__}")
    for i in range(n):
        item = (<PyObject*>ino if i == INO else <PyObject*>dev if i == DEV else <PyObject*>nlink if i == NLINK
                else PyStructSequence_GetItem(st, i))
        Py_XINCREF(item)
        PyStructSequence_SetItem(out, i, item)
    return out
