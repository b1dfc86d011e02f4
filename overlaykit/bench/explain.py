"""Where a writable layer's bytes come from: copied up and never changed, or written; and what would be better in a volume.

Reads a container's upper directory, ours or one that Docker or podman made, and writes nothing.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from overlaykit.errors import NotFound
from overlaykit.overlay import View
from overlaykit.tree.table import StrPath
from overlaykit.tree.whiteout import METACOPY, OPAQUE, REDIRECT

BLOCK = 4096  # bytes that are compared at once: a page, which is what a program dirties
WORTH = 1 << 20  # bytes that a directory has to have for a volume to be worth its name
SHARE = 0.1  # of the layer's bytes
SYSTEM = frozenset({"bin", "boot", "etc", "lib", "lib32", "lib64", "sbin", "usr"})


@dataclass(frozen=True, slots=True)
class CopiedUp:
    """A file that the image has and the writable layer has too. unchanged: bytes in blocks that are still the image's.

    size is 0 for a metacopy: its data was never copied.
    """

    path: str
    size: int
    unchanged: int


@dataclass(frozen=True, slots=True)
class Advice:
    """A directory with much of the writable layer's bytes. where: "volume", or "image" for what programs live in."""

    path: str
    size: int
    files: int
    where: str


@dataclass(frozen=True, slots=True)
class Explanation:
    """size and files: of the writable layer."""

    size: int
    files: int
    copied_up: tuple[CopiedUp, ...]
    advice: tuple[Advice, ...]

    @property
    def unchanged(self) -> int:
        return sum(file.unchanged for file in self.copied_up)


def find_lowers(upper: StrPath) -> list[Path]:
    """The lowers of an upper directory DIFF that Docker or podman made, bottom first. NotFound without their note.

    Both write DIFF/../lower: the links in HOME/l to each layer's directory, the highest first.
    """
    place = Path(os.path.realpath(upper)).parent
    try:
        text = (place / "lower").read_text().strip()
    except (OSError, UnicodeDecodeError):
        raise NotFound(
            f"{upper}: no file beside it says what is below", hint="name the lowers, bottom first: --lower DIR"
        ) from None
    return [Path(os.path.realpath(place.parent / part)) for part in reversed(text.split(":"))]


def explain(upper: StrPath, lowers: Sequence[StrPath]) -> Explanation:
    """What is in `upper`, compared with `lowers` (bottom first). OSError for what cannot be read."""
    copied: list[CopiedUp] = []
    size = files = 0
    weights: dict[str, tuple[int, int]] = {}
    userxattr = _has(upper, "user.overlay.origin") or _has(upper, "user.overlay.impure")
    with View(lowers, userxattr=userxattr) as below:
        for path, lower_path, place in _files(Path(os.path.realpath(upper)), "", ""):
            try:
                fd = os.open(place, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            except FileNotFoundError:  # the container goes on meanwhile
                continue
            try:
                st = os.fstat(fd)
                own = 0 if _mark(fd, METACOPY) is not None else st.st_size
                if lower_path is not None and below.isfile(lower_path) and not below.islink(lower_path):
                    with below.open(lower_path, "rb") as lower:
                        copied.append(CopiedUp(path, own, _same(fd, lower.fileno()) if own else 0))
            finally:
                os.close(fd)
            size, files = size + own, files + 1
            for above in _above(path):
                weight = weights.get(above, (0, 0))
                weights[above] = weight[0] + own, weight[1] + 1
    copied.sort(key=lambda file: (-file.unchanged, file.path))
    return Explanation(size, files, tuple(copied), tuple(_advice(weights, size)))


def _files(directory: Path, path: str, lower_path: str | None) -> Iterator[tuple[str, str | None, Path]]:
    """Each file of an upper directory: its path, where the lowers have it (None: hidden), and where it lies."""
    with os.scandir(directory) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    for entry in found:
        inner = f"{path}/{entry.name}"
        lower = None if lower_path is None else f"{lower_path}/{entry.name}"
        if entry.is_dir(follow_symlinks=False):
            redirect = _mark(entry.path, REDIRECT)
            if redirect is not None:
                lower = redirect if redirect.startswith("/") else f"{lower_path or ''}/{redirect}"
            elif _mark(entry.path, OPAQUE) == "y":
                lower = None
            yield from _files(directory / entry.name, inner, lower)
        elif stat.S_ISREG(entry.stat(follow_symlinks=False).st_mode):
            yield inner, lower, directory / entry.name


def _mark(place: str | int, name: str) -> str | None:
    """An overlay's mark on a file or directory, whichever prefix it has."""
    for prefix in ("trusted.overlay.", "user.overlay."):
        try:
            return os.fsdecode(os.getxattr(place, prefix + name))
        except OSError:  # no mark, no xattrs, or none that we may see
            continue
    return None


def _has(place: StrPath, name: str) -> bool:
    try:
        os.getxattr(place, name)
    except OSError:
        return False
    return True


def _same(one: int, other: int) -> int:
    """Bytes in blocks that two files have in common at the same place."""
    same = at = 0
    while True:
        a, b = os.pread(one, 256 * BLOCK, at), os.pread(other, 256 * BLOCK, at)
        if not a or not b:
            return same
        if a == b:
            same += len(a)
        else:
            for start in range(0, min(len(a), len(b)), BLOCK):
                if a[start : start + BLOCK] == b[start : start + BLOCK]:
                    same += len(a[start : start + BLOCK])
        at += 256 * BLOCK


def _above(path: str) -> Iterator[str]:
    """The directories above a path, but not the root."""
    while path := path.rpartition("/")[0]:
        yield path


def _advice(weights: dict[str, tuple[int, int]], total: int) -> Iterator[Advice]:
    """The lowest directories that have at least SHARE and WORTH of the layer: no other one in them has most of it."""
    heavy = {path: weight for path, weight in weights.items() if weight[0] >= max(WORTH, SHARE * total)}
    for path, (size, files) in sorted(heavy.items(), key=lambda item: (-item[1][0], item[0])):
        kids = [other for other in heavy if other.startswith(f"{path}/")]
        if not any(heavy[kid][0] > size // 2 for kid in kids):
            yield Advice(path, size, files, "image" if path.split("/")[1] in SYSTEM else "volume")
