"""The names in a directory of one layer. Built from ext/listing.pyx."""

import numpy as np
import numpy.typing as npt

def from_disk(fd: int, layer: int, names: dict[str, int], unsure: list[str], doubt_files: bool = False) -> None: ...
def from_tree(
    arena: npt.NDArray[np.uint8],
    start: npt.NDArray[np.int64],
    kind: npt.NDArray[np.uint8],
    ends: npt.NDArray[np.int64],
    looks: npt.NDArray[np.uint8],
    row: int,
    layer: int,
    names: dict[str, int],
    gone: list[str],
) -> None: ...
