"""The workloads on files: writing, reading, names, and the first write to a file of the image."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

from overlaykit.bench.files import Files
from overlaykit.bench.programs import PROGRAMS
from overlaykit.bench.workload import Workload, nothing

BLOCK = random.Random(1).randbytes(1 << 20)  # nothing that a file system could leave out
SMALL = BLOCK[:4096]
BUFFER = bytearray(1 << 20)  # for all reads: what memory costs that is new each time is not asked here
LARGE = 16  # MiB that sequential workloads write
READ = 64  # MiB that they read: less may lie in a processor's cache or not, and is read twice as fast if it does
NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL
FILES, DIRECTORIES = 500, 5
SYNCED = 100  # operations of those that wait for the disk each time, as copy-up does: some disks take 10 ms
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
    try:
        os.write(fd, data)
    finally:  # nothing that is open is unmounted
        os.close(fd)


def sequential(files: Files, *, sync: bool = False) -> int:
    fd = files.open(files.root + "/big", NEW, 0o644)
    try:
        for _ in range(LARGE):
            os.write(fd, BLOCK)
        if sync:
            os.fsync(fd)
    finally:
        os.close(fd)
    return LARGE * MIB


def remove_big(files: Files) -> None:
    files.unlink(files.root + "/big")


def read_all(files: Files) -> int:
    fd, done = files.open(files.root + "/f0", os.O_RDONLY), 0
    try:
        while got := os.readv(fd, [BUFFER]):
            done += got
    finally:
        os.close(fd)
    return done


def own_big(files: Files) -> None:
    sequential(files)


def random_writes(files: Files) -> int:
    places = random.Random(2).choices(range(LARGE * MIB // 4096), k=8192)
    fd = files.open(files.root + "/big", os.O_WRONLY)
    try:
        for place in places:
            os.pwrite(fd, SMALL, place * 4096)
    finally:
        os.close(fd)
    return len(places)


def append_synced(files: Files) -> int:
    for _ in range(SYNCED):
        fd = files.open(files.root + "/log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(fd, SMALL)
            os.fsync(fd)
        finally:
            os.close(fd)
    return SYNCED


def remove_log(files: Files) -> None:
    files.unlink(files.root + "/log")


def own_directories(files: Files) -> None:
    for i in range(DIRECTORIES):
        files.mkdir(f"{files.root}/d{i}")


def create(files: Files) -> int:
    opened, root = files.open, files.root
    for name in names():
        fd = opened(root + name, NEW, 0o644)
        try:
            os.write(fd, SMALL)
        finally:
            os.close(fd)
    return FILES


def own_files(files: Files) -> None:
    own_directories(files)
    create(files)


def create_again(files: Files) -> None:
    create(files)


def unlink(files: Files) -> int:
    remove, root = files.unlink, files.root
    for name in names():
        remove(root + name)
    return FILES


def remove_files(files: Files) -> None:
    unlink(files)


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


def rename(files: Files, count: int = FILES) -> int:
    for name in names()[:count]:
        files.rename(files.root + name, files.root + name + "~")
    return count


def rename_back(files: Files, count: int = FILES) -> None:
    for name in names()[:count]:
        files.rename(files.root + name + "~", files.root + name)


def rename_directories(files: Files) -> int:
    for i in range(DIRECTORIES):
        files.rename(f"{files.root}/d{i}", f"{files.root}/e{i}")
    return DIRECTORIES


def rename_directories_back(files: Files) -> None:
    for i in range(DIRECTORIES):
        files.rename(f"{files.root}/e{i}", f"{files.root}/d{i}")


def first_write(count: int) -> Callable[[Files], int]:
    """One byte into each of the image's files."""

    def run(files: Files) -> int:
        for i in range(count):
            write_file(files, f"/f{i}", b"x", os.O_WRONLY)
        return count

    return run


def truncate(files: Files) -> int:
    for i in range(16):
        write_file(files, f"/f{i}", b"x", os.O_WRONLY | os.O_TRUNC)
    return 16


def fill_again(files: Files) -> None:
    for i in range(16):
        write_file(files, f"/f{i}", BLOCK, os.O_WRONLY)


def chmod(files: Files) -> int:
    for name in names()[:SYNCED]:
        files.chmod(files.root + name, 0o600)
    return SYNCED


def chown(files: Files) -> int:
    uid, gid = os.geteuid(), os.getegid()
    for name in names()[:SYNCED]:
        files.chown(files.root + name, uid, gid)
    return SYNCED


def remove_tree(files: Files) -> int:
    for i in range(DIRECTORIES):
        files.rmtree(f"{files.root}/d{i}")
    return FILES


def wide_again(files: Files) -> None:
    assert files.path is not None
    wide(files.path)


def copy_up(size: int, count: int, *, full: bool = False) -> Workload:
    label = f"{size >> 20} MiB" if size >= MIB else f"{size >> 10} KiB"
    return Workload(
        f"copy-up-{label.replace(' ', '')}", f"one byte into each of {count} image files of {label}", "copy-up",
        first_write(count), sized(count, size), again=nothing, full=full,
    )  # fmt: skip


BASIC = [
    Workload("seq-write", f"a new file of {LARGE} MiB, 1 MiB a write", "write", sequential, again=remove_big, unit="bytes"),
    Workload("seq-write-fsync", "the same, then fsync", "write", lambda f: sequential(f, sync=True), again=remove_big,
             unit="bytes"),
    Workload("random-write", "4 KiB at random places of an own file of 16 MiB", "write", random_writes, before=own_big,
             again=nothing),
    Workload("append-fsync", "open, append 4 KiB, fsync, close", "write", append_synced, again=remove_log),
    Workload("create", f"{FILES} new files of 4 KiB", "write", create, before=own_directories, again=remove_files),
    Workload("unlink", f"{FILES} own files removed", "write", unlink, before=own_files, again=create_again),
    Workload("rename-own", f"{FILES} own files renamed", "write", rename, before=own_files, again=rename_back),
    Workload("rename-own-dirs", f"{DIRECTORIES} own directories renamed", "write", rename_directories, before=own_files,
             again=rename_directories_back, full=True),
    Workload("seq-read", f"an image file of {READ} MiB", "read", read_all, sized(1, READ * MIB), again=nothing,
             unit="bytes"),
    Workload("seq-read-cold", "the same, not in memory", "read", read_all, sized(1, READ * MIB), again=nothing,
             unit="bytes", full=True, cold=True),
    Workload("stat", f"{FILES} image files, four times", "read", stat, wide, again=nothing),
    Workload("list-wide", f"{DIRECTORIES} directories of 100 files, walked", "read", listing, wide, again=nothing),
    Workload("list-deep", "a chain of 30 directories, walked", "read", listing, deep, again=nothing),
    copy_up(4 << 10, SYNCED),
    copy_up(64 << 10, SYNCED),
    copy_up(1 << 20, 30),
    copy_up(16 << 20, 2),
    copy_up(64 << 20, 1),
    copy_up(256 << 20, 1, full=True),
    copy_up(1 << 30, 1, full=True),
    Workload("truncate", "16 image files of 1 MiB opened with O_TRUNC", "copy-up", truncate, sized(16, MIB),
             again=fill_again),
    Workload("chmod", f"{SYNCED} small image files", "copy-up", chmod, wide, again=nothing),
    Workload("chown", f"{SYNCED} small image files, to the same owner", "copy-up", chown, wide, again=nothing, full=True),
    Workload("rename-lower", f"{SYNCED} small image files renamed", "copy-up", lambda f: rename(f, SYNCED), wide,
             again=lambda f: rename_back(f, SYNCED)),
    Workload("rename-lower-dirs", "directories of the image renamed", "copy-up", rename_directories, wide,
             again=rename_directories_back, full=True),
    Workload("remove-lower", f"{DIRECTORIES} image directories of 100 files removed", "copy-up", remove_tree, wide,
             again=wide_again),
]  # fmt: skip
WORKLOADS = [*BASIC, *PROGRAMS]
