import numpy as np
import numpy.typing as npt

_Bytes = npt.NDArray[np.uint8]
_Layers = npt.NDArray[np.uint16]
_Rows = npt.NDArray[np.int64]

def gather(column: list[_Bytes], source: _Layers, row: _Rows, begin: _Rows, width: int, out: _Bytes) -> None: ...
def uniform(column: list[_Bytes], width: int) -> bool: ...
