"""Reading many files in batches for whoever hashes them. Built from ext/contenthash.pyx."""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

def hash_files(
    root: int,
    arena: npt.NDArray[np.uint8],
    start: npt.NDArray[np.int64],
    rows: npt.NDArray[np.int64],
    sizes: npt.NDArray[np.int64],
    digest: Callable[[memoryview], bytes],
    new: Callable[[], Any],
    buffer: npt.NDArray[np.uint8],
    out: npt.NDArray[np.uint8],
    errnos: npt.NDArray[np.int32],
) -> int: ...
