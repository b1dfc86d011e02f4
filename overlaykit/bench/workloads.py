"""The workloads on files: writing, reading, names, and the first write to a file of the image."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

from overlaykit.bench.files import Files
from overlaykit.bench.programs import PROGRAMS
from overlaykit.bench.workload import Workload

BLOCK = random.Random(1).randbytes(1 << 20)  # nothing that a file system could leave out
SMALL = BLOCK[:4096]
LARGE = 64  # MiB that sequential workloads move
NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL
FILES, DIRECTORIES = 2000, 20
MIB = 1 << 20


# --- the image's files --------------------------------------------------------------------------------------------------


def sized(count: int, size: int) -> Callable[[Path], None]:
    """Writes files f0, f1 and so on of `size` bytes each."""

    def write(folder: Path) -> None:
        for i in range(count):
            with (folder / f"f{i}").open("wb") as out:
                for start in range(0, size, MIB):
                    out.write(BLOCK[: min(MIB, size - start)])

    return write


def wide(folder: Path) -> None:
    """DIRECTORIES directories of 100 small files."""
    for i in range(FILES):
        place = folder / f"d{i % DIRECTORIES}"
        place.mkdir(exist_ok=True)
        (place / f"f{i}").write_bytes(SMALL[:256])


def deep(folder: Path) -> None:
    """A chain of 30 directories, 20 files in each."""
    for level in range(30):
        folder = folder / f"level{level}"
        folder.mkdir()
        for i in range(20):
            (folder / f"f{i}").write_bytes(b"x")


def names() -> list[str]:
    return [f"/d{i % DIRECTORIES}/f{i}" for i in range(FILES)]


# --- loops --------------------------------------------------------------------------------------------------------------


def write_file(files: Files, path: str, data: bytes, flags: int = NEW) -> None:
    fd = files.open(files.root + path, flags, 0o644)
    os.write(fd, data)
    os.close(fd)


def sequential(files: Files, *, sync: bool = False) -> int:
    fd = files.open(files.root + "/big", NEW, 0o644)
    for _ in range(LARGE):
        os.write(fd, BLOCK)
    if sync:
        os.fsync(fd)
    os.close(fd)
    return LARGE * MIB


def read_all(files: Files) -> int:
    fd, done = files.open(files.root + "/f0", os.O_RDONLY), 0
    while got := os.read(fd, MIB):
        done += len(got)
    os.close(fd)
    return done


def own_big(files: Files) -> None:
    fd = files.open(files.root + "/big", NEW, 0o644)
    for _ in range(16):
        os.write(fd, BLOCK)
    os.close(fd)


def random_writes(files: Files) -> int:
    places = random.Random(2).choices(range(16 * MIB // 4096), k=8192)
    fd = files.open(files.root + "/big", os.O_WRONLY)
    for place in places:
        os.pwrite(fd, SMALL, place * 4096)
    os.close(fd)
    return len(places)


def append_synced(files: Files) -> int:
    for _ in range(500):
        fd = files.open(files.root + "/log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.write(fd, SMALL)
        os.fsync(fd)
        os.close(fd)
    return 500


def own_directories(files: Files) -> None:
    for i in range(DIRECTORIES):
        files.mkdir(f"{files.root}/d{i}")


def create(files: Files) -> int:
    opened, root = files.open, files.root
    for name in names():
        fd = opened(root + name, NEW, 0o644)
        os.write(fd, SMALL)
        os.close(fd)
    return FILES


def own_files(files: Files) -> None:
    own_directories(files)
    create(files)


def unlink(files: Files) -> int:
    remove, root = files.unlink, files.root
    for name in names():
        remove(root + name)
    return FILES


def stat(files: Files) -> int:
    look, root = files.stat, files.root
    for _ in range(4):
        for name in names():
            look(root + name)
    return 4 * FILES


def walk(files: Files, directory: str) -> int:
    count = 0
    with files.scandir(directory) as entries:
        found = [(entry.path, entry.is_dir(follow_symlinks=False)) for entry in entries]
    for path, is_dir in found:
        count += 1
        if is_dir:
            count += walk(files, path)
    return count


def listing(files: Files) -> int:
    return sum(walk(files, files.root or "/") for _ in range(10))


def rename(files: Files) -> int:
    for name in names():
        files.rename(files.root + name, files.root + name + "~")
    return FILES


def rename_directories(files: Files) -> int:
    for i in range(DIRECTORIES):
        files.rename(f"{files.root}/d{i}", f"{files.root}/e{i}")
    return DIRECTORIES


def first_write(count: int) -> Callable[[Files], int]:
    """One byte into each of the image's files."""

    def run(files: Files) -> int:
        for i in range(count):
            write_file(files, f"/f{i}", b"x", os.O_WRONLY)
        return count

    return run


def truncate(files: Files) -> int:
    for i in range(64):
        write_file(files, f"/f{i}", b"x", os.O_WRONLY | os.O_TRUNC)
    return 64


def chmod(files: Files) -> int:
    for name in names():
        files.chmod(files.root + name, 0o600)
    return FILES


def chown(files: Files) -> int:
    uid, gid = os.geteuid(), os.getegid()
    for name in names():
        files.chown(files.root + name, uid, gid)
    return FILES


def remove_tree(files: Files) -> int:
    for i in range(DIRECTORIES):
        files.rmtree(f"{files.root}/d{i}")
    return FILES


def copy_up(size: int, count: int, *, full: bool = False) -> Workload:
    label = f"{size >> 20} MiB" if size >= MIB else f"{size >> 10} KiB"
    return Workload(
        f"copy-up-{label.replace(' ', '')}", f"one byte into each of {count} image files of {label}", "copy-up",
        first_write(count), sized(count, size), full=full,
    )  # fmt: skip


BASIC = [
    Workload("seq-write", f"a new file of {LARGE} MiB, 1 MiB a write", "write", sequential, unit="bytes"),
    Workload("seq-write-fsync", "the same, then fsync", "write", lambda f: sequential(f, sync=True), unit="bytes"),
    Workload("random-write", "4 KiB at random places of an own file of 16 MiB", "write", random_writes, before=own_big),
    Workload("append-fsync", "open, append 4 KiB, fsync, close", "write", append_synced),
    Workload("create", f"{FILES} new files of 4 KiB", "write", create, before=own_directories),
    Workload("unlink", f"{FILES} own files removed", "write", unlink, before=own_files),
    Workload("rename-own", f"{FILES} own files renamed", "write", rename, before=own_files),
    Workload(
        "rename-own-dirs", f"{DIRECTORIES} own directories renamed", "write", rename_directories, before=own_files, full=True
    ),
    Workload("seq-read", f"an image file of {LARGE} MiB", "read", read_all, sized(1, LARGE * MIB), unit="bytes"),
    Workload("seq-read-cold", "the same, not in memory", "read", read_all, sized(1, LARGE * MIB), unit="bytes", full=True,
             cold=True),
    Workload("stat", f"{FILES} image files, four times", "read", stat, wide),
    Workload("list-wide", f"{DIRECTORIES} directories of 100 files, walked", "read", listing, wide),
    Workload("list-deep", "a chain of 30 directories, walked", "read", listing, deep),
    copy_up(4 << 10, 500),
    copy_up(64 << 10, 200),
    copy_up(1 << 20, 30),
    copy_up(16 << 20, 2),
    copy_up(64 << 20, 1),
    copy_up(256 << 20, 1, full=True),
    copy_up(1 << 30, 1, full=True),
    Workload("truncate", "64 image files of 1 MiB opened with O_TRUNC", "copy-up", truncate, sized(64, MIB)),
    Workload("chmod", f"{FILES} small image files", "copy-up", chmod, wide),
    Workload("chown", f"{FILES} small image files, to the same owner", "copy-up", chown, wide, full=True),
    Workload("rename-lower", f"{FILES} small image files renamed", "copy-up", rename, wide),
    Workload("rename-lower-dirs", "directories of the image renamed", "copy-up", rename_directories, wide, full=True),
    Workload("remove-lower", f"{DIRECTORIES} image directories of 100 files removed", "copy-up", remove_tree, wide),
]  # fmt: skip
WORKLOADS = [*BASIC, *PROGRAMS]
