"""Many byte strings in one array: paths and link targets, without a Python object each."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from overlaykit._ext import treemerge

Rows = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Strings:
    """Byte strings back to back: string i is arena[start[i]:start[i+1]]. arena uint8[m], start int64[n+1]."""

    arena: npt.NDArray[np.uint8]
    start: npt.NDArray[np.int64]

    @staticmethod
    def of(strings: Sequence[bytes]) -> Strings:
        start = np.zeros(len(strings) + 1, np.int64)
        np.cumsum(np.fromiter(map(len, strings), np.int64, len(strings)), out=start[1:])
        return Strings(np.frombuffer(b"".join(strings), np.uint8), start)

    def __len__(self) -> int:
        return len(self.start) - 1

    def __getitem__(self, i: int) -> bytes:
        if not 0 <= i < len(self):
            raise IndexError(i)
        return self.arena[self.start[i] : self.start[i + 1]].tobytes()

    def __iter__(self) -> Iterator[bytes]:
        data, start = self.arena.tobytes(), self.start.tolist()
        return (data[a:b] for a, b in pairwise(start))

    def decoded(self) -> list[str]:
        """Each as os.fsdecode has it."""
        data, start = self.arena.tobytes(), self.start.tolist()
        if data.isascii():  # then bytes and characters count alike, and one decoding serves all
            text = data.decode("ascii")
            return [text[a:b] for a, b in pairwise(start)]
        return [os.fsdecode(data[a:b]) for a, b in pairwise(start)]

    def copy(self) -> Strings:
        """The same in memory of its own, as much as it takes."""
        return Strings(self.arena.copy(), self.start.copy())

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        return np.diff(self.start)

    def take(self, rows: Rows, sizes: Rows | None = None) -> Strings:
        """The strings of `rows`, in that order; of each only the first `sizes` bytes where sizes are given."""
        start = np.zeros(len(rows) + 1, np.int64)
        np.cumsum(self.lengths[rows] if sizes is None else sizes, out=start[1:])
        arena = np.empty(int(start[-1]), np.uint8)
        treemerge.gather(self.arena, self.start, rows, arena, start)
        return Strings(arena, start)

    def unlike(self, other: Strings) -> Mask:
        """bool[n]: which strings differ from those of as many others."""
        unlike: Mask = self.lengths != other.lengths
        same = np.flatnonzero(~unlike)
        if len(same) < len(unlike):
            self, other = self.take(same), other.take(same)
        # Of equal lengths all begin at equal places, so it is enough to look at the bytes.
        bytes_apart = np.flatnonzero(self.arena != other.arena)
        unlike[same[np.searchsorted(self.start, bytes_apart, "right") - 1]] = True
        return unlike

    @staticmethod
    def concat(parts: Sequence[Strings]) -> Strings:
        start = np.zeros(sum(map(len, parts)) + 1, np.int64)
        if parts:
            np.cumsum(np.concatenate([p.lengths for p in parts]), out=start[1:])
            return Strings(np.concatenate([p.arena for p in parts]), start)
        return Strings(np.empty(0, np.uint8), start)
