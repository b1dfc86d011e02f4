"""Bytes as people read them: in powers of 1000 as Docker prints them, or of 1024 as files and blocks are made."""

from __future__ import annotations

DECIMAL = 1000, ("B", "kB", "MB", "GB", "TB", "PB", "EB")
BINARY = 1024, (" B", " KiB", " MiB", " GiB", " TiB", " PiB", " EiB")


def size(count: float, *, binary: bool = False) -> str:
    """`count` bytes with three digits: "74.8MB", or binary "4 KiB"."""
    base, units = BINARY if binary else DECIMAL
    unit = units[0]
    for unit in units:  # noqa: B007
        if count < 999.5:
            break
        count /= base
    return f"{count:.3g}{unit}"
