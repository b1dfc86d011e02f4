"""Opening what upper has, the short way. Built from ext/opening.pyx."""

from typing import Any

def open_known(nodes: dict[str, Any], path: str, flags: int, mode: int, own: bytes) -> int: ...
