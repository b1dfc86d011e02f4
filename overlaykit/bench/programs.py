"""The workloads that are real programs: sqlite3, a wheel, git, a C compiler, pip, fio."""

from __future__ import annotations

import io
import os
import random
import sqlite3
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from overlaykit.bench.files import Files
from overlaykit.bench.workload import Workload
from overlaykit.errors import Unsupported

WHEEL = "demo-1.0-py3-none-any.whl"


def program(files: Files, *command: str, directory: str = "") -> None:
    """Run it in the tree. Unsupported with its last words if it fails."""
    assert files.path is not None
    env = {**os.environ, "LC_ALL": "C", "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
    run = subprocess.run(
        command, cwd=files.path / directory, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if run.returncode != 0:
        words = (run.stderr or run.stdout).strip().splitlines() or [f"exit code {run.returncode}"]
        raise Unsupported(f"{command[0]}: {words[-1]}")


# --- sqlite3 ------------------------------------------------------------------------------------------------------------


@contextmanager
def opened(path: Path) -> Iterator[sqlite3.Connection]:
    """A database. Unsupported for what sqlite3 says, a full disk among it."""
    db = sqlite3.connect(path)
    try:
        yield db
    except sqlite3.Error as e:
        raise Unsupported(f"sqlite3: {e}") from None
    finally:
        db.close()


def database(folder: Path) -> None:
    with opened(folder / "data.db") as db, db:
        db.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, value TEXT)")
        db.executemany("INSERT INTO t (value) VALUES (?)", ((f"value {i}" * 8,) for i in range(20_000)))


def transactions(files: Files) -> int:
    assert files.path is not None
    with opened(files.path / "data.db") as db:
        for i in range(100):
            with db:
                db.execute("UPDATE t SET value = ? WHERE id = ?", (f"new {i}", i * 97 + 1))
    return 100


# --- a wheel ------------------------------------------------------------------------------------------------------------


@cache
def wheel() -> bytes:
    """A wheel of 100 modules, always the same."""
    source, out = random.Random(3), io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        record = []
        for i in range(100):
            name = f"demo/part{i % 10}/module{i}.py"
            lines = (f"value_{i}_{j} = {source.random()}" for j in range(source.randrange(10, 300)))
            archive.writestr(name, "\n".join(lines))
            record.append(f"{name},,")
        info = "demo-1.0.dist-info"
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: demo\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "\n".join([*record, f"{info}/METADATA,,", f"{info}/WHEEL,,", f"{info}/RECORD,,"]))
    return out.getvalue()


def unpack_wheel(files: Files) -> int:
    made: set[str] = set()
    count = 0
    with zipfile.ZipFile(io.BytesIO(wheel())) as archive:
        for entry in archive.infolist():
            parts = entry.filename.split("/")[:-1]
            for depth in range(1, len(parts) + 1):
                directory = "/" + "/".join(parts[:depth])
                if directory not in made:
                    files.mkdir(files.root + directory)
                    made.add(directory)
            fd = files.open(f"{files.root}/{entry.filename}", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            os.write(fd, archive.read(entry))
            os.close(fd)
            count += 1
    return count


def remove_wheel(files: Files) -> None:
    files.rmtree(files.root + "/demo")
    files.rmtree(files.root + "/demo-1.0.dist-info")


def wheel_file(folder: Path) -> None:
    (folder / WHEEL).write_bytes(wheel())


def pip_install(files: Files) -> int:
    options = ("--quiet", "--no-index", "--no-deps", "--no-cache-dir", "--disable-pip-version-check", "--no-compile")
    program(files, sys.executable, "-m", "pip", "install", *options, "--target", "site", WHEEL)
    return 1


# --- git, cc, fio -------------------------------------------------------------------------------------------------------


def repository(folder: Path) -> None:
    """A work tree of 500 files with two branches that differ in half of them."""
    from overlaykit.bench.files import on_host

    here = on_host(folder)
    git = ("git", "-c", "user.name=bench", "-c", "user.email=bench@localhost", "-c", "gc.auto=0")
    program(here, *git, "init", "--quiet", "--initial-branch=one")
    for branch in ("one", "two"):
        if branch == "two":
            program(here, *git, "checkout", "--quiet", "-b", "two")
        for i in range(500):
            if branch == "one" or i % 2:
                place = folder / f"d{i % 10}" / f"f{i}"
                place.parent.mkdir(exist_ok=True)
                place.write_text(f"{branch} {i}\n" * (i % 50 * 10 + 1))
        program(here, *git, "add", ".")
        program(here, *git, "commit", "--quiet", "-m", branch)


def checkout(files: Files) -> int:
    safe = ("git", "-c", "safe.directory=*", "-c", "gc.auto=0")
    program(files, *safe, "checkout", "--quiet", "one")
    program(files, *safe, "status", "--porcelain")
    return 1


def c_tree(folder: Path) -> None:
    for i in range(10):
        body = "\n".join(f"int f{i}_{j}(int x) {{ return x * {j} + {i}; }}" for j in range(100))
        (folder / f"file{i}.c").write_text(body)
    (folder / "main.c").write_text("int main(void) { return 0; }\n")


def compile_tree(files: Files) -> int:
    sources = [*(f"file{i}.c" for i in range(10)), "main.c"]
    for source in sources:
        program(files, "cc", "-c", source)
    program(files, "cc", "-o", "main", *(source.replace(".c", ".o") for source in sources))
    return len(sources)


def fio(files: Files) -> int:
    job = ("--name=job", "--rw=randwrite", "--bs=4k", "--size=32m", "--ioengine=psync", "--randseed=1", "--fallocate=none")
    program(files, "fio", *job, "--output-format=terse")
    return 32 << 20


PATH_ONLY = "it is a program, and opens its files by path"
PROGRAMS = [
    Workload("sqlite", "100 transactions on the image's database of 2 MB", "program", transactions, database,
             by_path="sqlite3 opens the database and its journal by path"),
    Workload("wheel", "a wheel of 100 modules unpacked", "program", unpack_wheel, again=remove_wheel),
    Workload("git", "checkout of a branch (250 of 500 files differ), status", "program", checkout, repository,
             programs=("git",), by_path=PATH_ONLY),
    Workload("cc", "11 C files compiled and linked", "program", compile_tree, c_tree, programs=("cc",), by_path=PATH_ONLY,
             full=True),
    Workload("pip", "pip install --no-index of a wheel of 100 modules", "program", pip_install, wheel_file,
             by_path=PATH_ONLY, full=True),
    Workload("fio", "fio randwrite, 4 KiB, 32 MiB", "program", fio, unit="bytes", programs=("fio",), by_path=PATH_ONLY,
             full=True),
]  # fmt: skip
