import numpy as np
import numpy.typing as npt

_Bytes = npt.NDArray[np.uint8]
_Rows = npt.NDArray[np.int64]

def classify(arena: _Bytes, start: _Rows, out: _Bytes) -> int: ...
def strip(arena: _Bytes, start: _Rows, marks: _Bytes, out: _Bytes, out_start: _Rows) -> int: ...
def regular(
    arena: _Bytes,
    start: _Rows,
    order: _Rows,
    same: _Bytes,
    kind: _Bytes,
    marks: _Bytes,
    out_row: _Rows,
    out_name: _Rows,
    out_size: _Rows,
    out_kind: _Bytes,
    out_flags: _Bytes,
) -> int: ...
