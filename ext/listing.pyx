"""The names in a directory of one layer, from disk or from a Tree's columns, as a merged listing takes them up."""
from cpython.mem cimport PyMem_Free, PyMem_Malloc
from cpython.ref cimport PyObject
from libc.errno cimport EINTR, errno
from libc.stdint cimport int64_t, uint8_t
from libc.string cimport strlen

from posix_at cimport DT_DIR, DT_LNK, DT_REG, SYS_getdents64, linux_dirent, ssize_t, syscall

import os

cdef extern from "Python.h":
    object PyUnicode_DecodeFSDefaultAndSize(const char* text, Py_ssize_t size)
    PyObject* PyDict_SetDefault(object mapping, object key, object value) except NULL

# What a name is: overlaykit/overlay/layers.py, Look
cdef enum:
    OTHER = 0
    DIR = 1
    LINK = 2
    FILE = 3
    WHITEOUT = 4

cdef enum:
    DENTS = 256 << 10    # bytes of directory entries a getdents64: 8,000 names, still in the cache


cdef inline bint put(dict names, object name, object value):
    """Whether `name` is new; the layer above has the say over one that is not. No other layer has this `value`."""
    return PyDict_SetDefault(names, name, value) == <PyObject*>value


def from_disk(int fd, int layer, dict names, list unsure, bint doubt_files=False) -> None:
    """Put into `names` what directory fd holds and `names` lacks: name -> layer << 2 | its Look.

    fd           open for reading, at its start
    layer        a number that no name has yet
    unsure       gains the names whose Look has to be asked for: devices, pipes, sockets, what the file system does not tell
    doubt_files  files too, since they may be whiteouts

    In Python: [names.setdefault(e.name, layer << 2 | look(e)) for e in os.scandir(fd)]
    O(n), GIL released while the system reads. OSError, MemoryError.
    """
    cdef uint8_t* buffer = <uint8_t*>PyMem_Malloc(DENTS)
    cdef linux_dirent* entry
    cdef ssize_t n, at
    cdef int code
    cdef uint8_t kind
    cdef const char* text
    cdef list values = [layer << 2 | look for look in range(4)]
    if buffer == NULL:
        raise MemoryError()
    try:
        while True:
            with nogil:
                n = syscall(SYS_getdents64, fd, buffer, <size_t>DENTS)
                code = errno
            if n < 0:
                if code == EINTR:
                    continue
                raise OSError(code, os.strerror(code))
            if n == 0:
                return
            at = 0
            while at < n:
                entry = <linux_dirent*>(buffer + at)
                at += entry.d_reclen
                text = entry.d_name
                if text[0] == c'.' and (text[1] == 0 or (text[1] == c'.' and text[2] == 0)):
                    continue
                kind = entry.d_type
                kind = FILE if kind == DT_REG else DIR if kind == DT_DIR else LINK if kind == DT_LNK else OTHER
                name = PyUnicode_DecodeFSDefaultAndSize(text, <Py_ssize_t>strlen(text))
                if put(names, name, values[kind]) and (kind == OTHER or (doubt_files and kind == FILE)):
                    unsure.append(name)
    finally:
        PyMem_Free(buffer)


def from_tree(
    const uint8_t[::1] arena, const int64_t[::1] start, const uint8_t[::1] kind, const int64_t[::1] ends,
    const uint8_t[::1] looks, int64_t row, int layer, dict names, list gone,
) -> None:
    """Put into `names` the children of directory `row` that `names` lacks: name -> layer << 2 | its Look.

    arena, start  uint8[m], int64[n+1]  path i is arena[start[i]:start[i+1]]
    kind          uint8[n]
    ends          int64[n]  the first row after row i that is not below it
    looks         uint8[...]  the Look of each kind
    layer         a number that no name has yet
    gone          gains the names of whiteouts: they stand in for lower names until all layers are in

    In Python: [names.setdefault(name(r), layer << 2 | looks[kind[r]]) for r in tree.children(row)]
    O(children). ValueError if the shapes disagree.
    """
    cdef int64_t n = kind.shape[0], child, end, skip
    cdef uint8_t look
    cdef list values = [layer << 2 | plain for plain in range(4)] + [layer << 2]   # a value of its own: see put
    if start.shape[0] != n + 1 or ends.shape[0] != n or not 0 <= row < n or start[n] != arena.shape[0]:
        raise ValueError(f"from_tree: shapes disagree: {start.shape[0]} starts, {n} kinds, {ends.shape[0]} ends, row {row}")
    skip = start[row + 1] - start[row]
    skip += skip > 0
    child, end = row + 1, ends[row]
    if end > n or skip < 0:
        raise ValueError(f"from_tree: row {row} has a path of {skip} bytes and ends at {end} of {n}")
    while child < end:
        if (start[child] < 0 or start[child + 1] > start[n] or start[child + 1] - start[child] <= skip
                or kind[child] >= looks.shape[0] or looks[kind[child]] > WHITEOUT or ends[child] <= child):
            raise ValueError(f"from_tree: row {child} is not below row {row}")
        look = looks[kind[child]]
        name = PyUnicode_DecodeFSDefaultAndSize(
            <const char*>&arena[start[child] + skip], <Py_ssize_t>(start[child + 1] - start[child] - skip)
        )
        if put(names, name, values[look]) and look == WHITEOUT:
            gone.append(name)
        child = ends[child]
