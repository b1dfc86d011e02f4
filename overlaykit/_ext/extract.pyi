import numpy as np
import numpy.typing as npt

_Bytes = npt.NDArray[np.uint8]
_Rows = npt.NDArray[np.int64]
_Words = npt.NDArray[np.uint32]

def create(
    root_fd: int,
    buffer: memoryview,
    rows: _Bytes,
    paths: _Bytes,
    links: _Bytes,
    skip: _Bytes,
    first: int,
    me: int,
    mine: int,
    umask: int,
) -> tuple[int, int, int]: ...
def finish(fd: int, mode: int, uid: int, gid: int, mtime_ns: int, me: int, mine: int) -> int: ...
def attributes(
    root_fd: int,
    arena: _Bytes,
    start: _Rows,
    rows: _Rows,
    mode: _Words,
    uid: _Words,
    gid: _Words,
    mtime_ns: _Rows,
    me: int,
    mine: int,
) -> tuple[int, int]: ...
def nodes(root_fd: int, arena: _Bytes, start: _Rows, rows: _Rows, targets: _Rows) -> tuple[int, int]: ...
