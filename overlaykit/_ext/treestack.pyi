import numpy as np
import numpy.typing as npt

_Bytes = npt.NDArray[np.uint8]
_Layers = npt.NDArray[np.uint16]
_Rows = npt.NDArray[np.int64]

def resolve(
    arenas: list[_Bytes],
    starts: list[_Rows],
    kinds: list[_Bytes],
    flags: list[_Bytes],
    keep_whiteouts: bool,
    out_layer: _Layers,
    out_flags: _Bytes,
    out_start: _Rows,
    out_arena: _Bytes,
    out_source: _Layers,
    out_row: _Rows,
    out_begin: _Rows,
) -> tuple[int, int, int]: ...
