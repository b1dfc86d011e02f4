"""Copying inodes from a lower directory into an upper. Built from ext/copyup.pyx."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

NO_DATA: int
METACOPY: int
SYNC: int
KEEP_TIMES: int

def copy_up(
    src_dir: int,
    src: bytes,
    work: int,
    temp: bytes,
    dst_dir: int,
    dst: bytes,
    own: bytes,
    what: int = 0,
    origin: bytes = b"",
) -> None: ...
def copy_up_many(
    src_dirs: npt.NDArray[np.int32],
    dst_dirs: npt.NDArray[np.int32],
    arena: npt.NDArray[np.uint8],
    start: npt.NDArray[np.int64],
    work: int,
    own: bytes,
    what: int,
    errnos: npt.NDArray[np.int32],
) -> int: ...
def copy_data(src: int, dst: int, size: int, progress: Callable[[int], object] | None = None) -> None: ...
def rename_at(old_dir: int, old: bytes, new_dir: int, new: bytes, flags: int = 0) -> None: ...
