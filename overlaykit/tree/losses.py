"""What a format or a file system could not carry. Nothing is dropped in silence: who cannot keep a thing says so here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Loss:
    """One thing that was not kept: `path` as in the tree ("" for the root), `what` in words."""

    path: str
    what: str

    def __str__(self) -> str:
        return f"/{self.path}: {self.what}"


Losses = list[Loss]
