"""The project as a newcomer finds it: the README's example, the public names, stubs, one version everywhere."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import ours
import pytest
import rootfs

import overlaykit

TOP = Path(__file__).parent.parent
FOLDERS = sorted(p.parent.name for p in TOP.glob("overlaykit/[a-z]*/__init__.py"))
KERNELS = sorted(p.stem for p in TOP.glob("ext/*.pyx"))
VERSION = tomllib.loads((TOP / "pyproject.toml").read_text())["project"]["version"]
# The user's top level, what goes with it, and what building leaves behind.
TOP_LEVEL = {"pyproject.toml", "setup.py", "overlaykit", "ext", "benchmarks", "tests", "README.md"}
TOP_LEVEL |= {"LICENSE", "CHANGELOG.md", "docs", "build", "dist", "overlaykit.egg-info"}


def fenced(markdown: str) -> list[tuple[str, str]]:
    """(language, content) of every fenced block, in order."""
    return re.findall(r"^```(\w*)[^\n]*\n(.*?)^```", markdown, re.MULTILINE | re.DOTALL)


def test_the_readme_example_runs_as_printed(tmp_path: Path) -> None:
    """The README's first Python block, with a root filesystem named rootfs.tar beside it.

    A `text` block that follows at once is what it prints.
    """
    blocks = fenced((TOP / "README.md").read_text())
    at = next(i for i, (language, _) in enumerate(blocks) if language == "python")
    rootfs.write(tmp_path / "rootfs.tar")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", blocks[at][1]],
        cwd=tmp_path,
        env={**os.environ, "OVERLAYKIT_ROOT": str(tmp_path / "root"), "HOME": str(tmp_path)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    if blocks[at + 1 :] and blocks[at + 1][0] == "text":
        assert done.stdout == blocks[at + 1][1]


def test_the_readme_gives_the_two_commands() -> None:
    readme = (TOP / "README.md").read_text()
    assert "pip install . && overlaykit tour" in readme
    assert "pip install -e '.[dev]' && pytest" in readme


def test_nothing_new_at_the_top() -> None:
    assert {path.name for path in TOP.iterdir() if not path.name.startswith(".")} <= TOP_LEVEL


@pytest.mark.parametrize("folder", ["", *FOLDERS])
def test_public_names_are_there_and_say_what_they_are(folder: str) -> None:
    module = importlib.import_module(f"overlaykit.{folder}".rstrip("."))
    silent = []
    for name in getattr(module, "__all__", []):
        value = getattr(module, name)
        if (inspect.isfunction(value) or inspect.isclass(value)) and not inspect.getdoc(value):
            silent.append(name)
    assert silent == []


def test_the_package_names_what_is_public() -> None:
    names = overlaykit.__all__
    assert {"Store", "Container", "Overlay", "View", "Tree", "Image", "OverlaykitError"} <= set(names)
    assert len(names) == len(set(names))


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_kernel_has_a_stub_and_every_door_says_what_it_does(kernel: str) -> None:
    assert (TOP / f"overlaykit/_ext/{kernel}.pyi").is_file()
    module = importlib.import_module(f"overlaykit._ext.{kernel}")
    doors = {name: value for name, value in vars(module).items() if callable(value) and not name.startswith("_")}
    # embedsignature puts the signature on the first line, so a docstring is what follows.
    silent = [n for n, door in doors.items() if inspect.isbuiltin(door) and "\n" not in (door.__doc__ or "")]
    assert doors
    assert silent == []


def test_no_stub_without_a_kernel() -> None:
    assert sorted(p.stem for p in TOP.glob("overlaykit/_ext/*.pyi") if p.stem != "__init__") == KERNELS


def test_one_version_everywhere() -> None:
    assert importlib.metadata.version("overlaykit") == VERSION
    assert overlaykit.__version__ == VERSION
    done = subprocess.run([sys.executable, "-c", ours.MAIN, "--version"], capture_output=True, text=True, check=True)
    assert VERSION in done.stdout
    changelog = (TOP / "CHANGELOG.md").read_text()
    assert "## [Unreleased]" in changelog or f"## [{VERSION}]" in changelog
