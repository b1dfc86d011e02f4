import numpy as np
import numpy.typing as npt

_Bytes = npt.NDArray[np.uint8]
_Rows = npt.NDArray[np.int64]

def parse(
    buffer: bytes,
    size: int,
    defaults: bytes,
    limit: int,
    rows: _Bytes,
    paths: _Bytes,
    links: _Bytes,
    state: _Rows,
) -> tuple[int, int]: ...
