"""What a command loads before it does anything: most of the time of a short one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import ours
import pytest
import rootfs

import overlaykit

# What `ps` needs, and a script calls often. Their own modules are theirs to choose.
LIBRARIES = "import click, msgspec, sqlite3"
OWN = """
    overlaykit overlaykit.errors overlaykit.lazily overlaykit.sizes
    overlaykit.cli overlaykit.cli.filters overlaykit.cli.output overlaykit.cli.ps overlaykit.cli.selecting
    overlaykit.cli.templates
    overlaykit.oci overlaykit.oci.digest overlaykit.oci.documents overlaykit.oci.platforms
    overlaykit.store overlaykit.store.containerrecords overlaykit.store.labels overlaykit.store.records
    overlaykit.store.reserve overlaykit.store.roots
"""
LITTLE = {"atexit", "_locale", "locale"}  # of weakref and gettext
JSON = {"json", "json.decoder", "json.encoder", "json.scanner", "_json"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a container."""
    place = tmp_path_factory.mktemp("startup")
    rootfs.write(place / "rootfs.tar")
    ours.command(place / "store", "import", place / "rootfs.tar", "base:1", "-c", "LABEL stage=test")
    ours.command(place / "store", "create", "base:1", "--name", "box")
    return place / "store"


def loaded(code: str, *argv: str | Path) -> set[str]:
    """The modules that a new process has loaded after `code`."""
    whole = f"{code}\nimport sys\nprint(*sys.modules, file=sys.stderr)"
    # Without the site module, which loads what it likes to find an editable install.
    command = [sys.executable, "-S", "-c", whole, *map(os.fspath, argv)]
    path = os.pathsep.join([str(Path(overlaykit.__file__).parents[1]), *sys.path])
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": path})
    return set(done.stderr.split())


def loaded_by(*argv: str | Path) -> set[str]:
    """What `overlaykit ARGV` loads beyond click, msgspec and SQLite."""
    return loaded("from overlaykit.cli import main\nassert main() == 0", *argv) - loaded(LIBRARIES)


@pytest.mark.parametrize(
    ("options", "more"),
    [
        ("--all", set()),
        ("--quiet", set()),
        ("--no-trunc --format {{.Names}}:{{.Labels}}", set()),
        ("--filter name=box --filter label=stage=test", set()),
        ("--json", JSON),
        ("--format json", JSON),
    ],
)
def test_ps_loads_what_it_prints_and_no_more(root: Path, options: str, more: set[str]) -> None:
    """It had loaded hashes, random numbers, logging and paths: a third of the time of a list of 1,000 containers."""
    assert loaded_by("--root", root, "ps", *options.split()) - LITTLE == set(OWN.split()) | more


def test_a_version_loads_no_store() -> None:
    assert loaded_by("--version") - LITTLE == {"overlaykit", "overlaykit.cli", "overlaykit.errors", "overlaykit.lazily"}


def test_the_package_alone_loads_next_to_nothing() -> None:
    assert not {"numpy", "click", "sqlite3", "msgspec", "pathlib", "json", "logging"} & loaded("import overlaykit")


def test_a_command_ends_as_it_says_though_nothing_is_collected_at_its_end(root: Path) -> None:
    """The program tells the collector to leave all alone; exit codes and what was written are as without."""
    run = [sys.executable, "-m", "overlaykit", "--root", os.fspath(root)]
    for argv, code, out in (("ps --format {{.Names}}", 0, "box\n"), ("cat nobody /etc/motd", 1, ""), ("nosuch", 2, "")):
        done = subprocess.run([*run, *argv.split()], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (code, out)
        assert "Traceback" not in done.stderr
