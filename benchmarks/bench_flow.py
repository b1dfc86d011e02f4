"""The main job, end to end: an image imported, a container made, its files changed, the diff, a commit, an archive saved.
GNU tar, which only unpacks, stands beside the import."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from measuring import measure, need, run
from synthetic import Files

from overlaykit import Container, Store

pytestmark = pytest.mark.at_most(100_000)
CHANGES = 100
numbers = count()


@pytest.fixture(scope="session")
def rootfs(files: Files, size: int, scratch: Path) -> Iterator[Path]:
    """A root filesystem of these files as a tar."""
    tar = scratch / f"rootfs-{size}.tar"
    run(need("tar"), "--create", "--sort=name", "--file", tar, "--directory", files.directory, ".")
    yield tar
    tar.unlink()


@pytest.fixture
def store(scratch: Path) -> Iterator[Store]:
    root = scratch / f"store-{next(numbers)}"
    with Store(root) as store:
        yield store
    shutil.rmtree(root)


def change(container: Container, names: list[str]) -> None:
    """Rewrite some files, remove as many, add as many."""
    fs = container.fs
    for number, name in enumerate(names):
        with fs.open(name, "a") as file:
            file.write("changed\n")
        with fs.open(f"new-{number}", "w") as file:
            file.write("new\n")
    for name in names[: len(names) // 2]:
        fs.unlink(name)


@pytest.fixture
def container(store: Store, rootfs: Path, files: Files) -> Container:
    """A container with changes."""
    store.import_rootfs(rootfs, "base:1")
    container = store.create("base:1", name="changed")
    change(container, files.names[::7][:CHANGES])
    return container


def test_import(benchmark: Any, store: Store, rootfs: Path, files: Files, size: int) -> None:
    work = lambda: store.import_rootfs(rootfs, f"base:{next(numbers)}")  # noqa: E731
    measure(benchmark, work, name="import", entries=size, size=files.size, compared_with="tar --extract", slow=True)


def test_import_tar(benchmark: Any, rootfs: Path, files: Files, size: int, scratch: Path) -> None:
    target = scratch / "unpacked"

    def clear() -> None:
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()

    work = lambda: run(need("tar"), "--extract", "--preserve-permissions", "--file", rootfs, "--directory", target)  # noqa: E731
    measure(
        benchmark, work, name="import", entries=size, size=files.size, compared_with="tar --extract", slow=True, setup=clear
    )  # fmt: skip
    shutil.rmtree(target)


def test_create(benchmark: Any, store: Store, rootfs: Path, size: int) -> None:
    store.import_rootfs(rootfs, "base:1")
    work = lambda: store.create("base:1")  # noqa: E731
    measure(benchmark, work, name="create a container", entries=size, compared_with="nothing")


def test_change(benchmark: Any, store: Store, rootfs: Path, files: Files, size: int) -> None:
    store.import_rootfs(rootfs, "base:1")
    names = files.names[::7][:CHANGES]
    work = lambda container: change(container, names)  # noqa: E731
    measure(
        benchmark, work, name=f"{2.5 * CHANGES:.0f} changes", entries=size, compared_with="nothing",
        setup=lambda: ((store.create("base:1"),), {}),
    )  # fmt: skip


def test_diff(benchmark: Any, container: Container, size: int) -> None:
    found = measure(benchmark, lambda: list(container.diff()), name="container diff", entries=size, compared_with="nothing")
    assert isinstance(found, list)
    assert len(found) >= CHANGES


def test_commit(benchmark: Any, container: Container, size: int) -> None:
    work = lambda: container.commit(f"changed:{next(numbers)}")  # noqa: E731
    measure(benchmark, work, name="commit", entries=size, compared_with="nothing")


def test_save(benchmark: Any, container: Container, files: Files, size: int, scratch: Path) -> None:
    image = container.commit("changed:1")
    path = scratch / "saved.tar"
    measure(
        benchmark, lambda: image.save(path), name="save", entries=size, size=files.size, compared_with="nothing", slow=True,
        setup=lambda: path.unlink(missing_ok=True),
    )  # fmt: skip
    path.unlink()
