"""Sizes as Docker's options have them: 64m, 10G, 1.5GiB, 4096. Powers of 1024, however written (go-units, RAMInBytes)."""

from __future__ import annotations

import re

from overlaykit.errors import InvalidReference

SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?([kmgtp]?)i?b?\Z", re.IGNORECASE)
UNITS = ("", "k", "m", "g", "t", "p")
LIMIT = 1 << 63  # bytes


def parse_size(text: str, what: str) -> int:
    """Bytes that `text` says. InvalidReference, which names `what`."""
    found = SIZE.match(text)
    size = int(float(found[1]) * 1024 ** UNITS.index(found[2].lower())) if found else LIMIT
    if size >= LIMIT:
        raise InvalidReference(f"{what}: {text!r} is no size", hint="such as 4096, 64m or 10G")
    return size
