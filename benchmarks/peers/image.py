"""The image that the tools work on, made of real files: Debian with compilers, Python packages from wheels, a layer that
deletes and renames, and a layer of small files of an application. About 127,000 entries and 2.4 GB in four layers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import rootfs

from overlaykit import Store

NAME = "benchmark:latest"
TOOLCHAINS = "build-essential,cmake,golang,git,python3"
# Chosen for many files: together about 75,000.
WHEELS = (
    *("ansible", "oci", "google-ads", "django", "botocore", "boto3", "kubernetes", "plotly", "sympy", "pandas", "scipy"),
    *("scikit-learn", "babel", "numpy", "twisted", "sphinx", "networkx", "matplotlib", "pygments", "sqlalchemy"),
    *("docutils", "azure-mgmt-network", "azure-mgmt-compute"),
)
PACKAGES = "usr/local/lib/python3/dist-packages"


def make(directory: Path, compression: str) -> None:
    """An OCI layout of the image at `directory`, which must not exist. Takes minutes, root and 8 GB; fetches packages."""
    if os.geteuid():
        sys.exit("making the image takes root: mmdebstrap keeps owners. Name an image of yours instead.")
    if missing := [tool for tool in ("mmdebstrap", "pip") if shutil.which(tool) is None]:
        sys.exit(f"making the image takes {' and '.join(missing)}. Name an image of yours instead.")
    work = directory.with_name(f"{directory.name}.part")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    debian = work / "debian.tar"
    say("Debian with compilers (mmdebstrap)")
    run("mmdebstrap", "--quiet", "--variant=minbase", f"--include={TOOLCHAINS}", "bookworm", debian)
    with Store(work / "store") as store:
        store.import_rootfs(debian, NAME, compression=compression, message="Debian with compilers")
        debian.unlink()
        for change in (wheels, renames, application):
            say(change.__doc__ or "")
            container = store.create(NAME, name="next")
            try:
                change(container.mount())
            finally:
                container.unmount()
            container.commit(NAME, message=change.__doc__, compression=compression)
            container.remove()
        say("saving")
        store.image(NAME).save(work / "layout", format="oci-dir", names=[NAME])
    (work / "layout").rename(directory)
    shutil.rmtree(work)


def make_small(directory: Path) -> None:
    """An OCI layout of a few small files at `directory`, for what does not depend on the image."""
    with tempfile.TemporaryDirectory() as work, Store(Path(work, "store")) as store:
        rootfs.write(Path(work, "rootfs.tar"))
        store.import_rootfs(Path(work, "rootfs.tar"), NAME).save(directory, format="oci-dir", names=[NAME])


def wheels(root: Path) -> None:
    """Python packages from wheels"""
    chosen = ("--no-deps", "--no-compile", "--only-binary=:all:", "--target", root / PACKAGES)
    run(sys.executable, "-m", "pip", "install", "--quiet", "--root-user-action=ignore", *chosen, *WHEELS)


def renames(root: Path) -> None:
    """a compiler that moves to another place, and documents that go"""
    for directory in sorted((root / "usr/share").glob("go-*")):
        shutil.copytree(directory, root / "opt" / directory.name, symlinks=True)
        shutil.rmtree(directory)
    for directory in sorted((root / "usr/share/doc").iterdir())[::3]:
        if directory.is_dir() and not directory.is_symlink():
            shutil.rmtree(directory)


def application(root: Path) -> None:
    """an application of small files"""
    for number in range(2_000):
        file = root / "srv/app" / f"module{number % 50}" / f"part{number}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"# part {number}\n" * (number % 40 + 1))


def say(what: str) -> None:
    if sys.stderr.isatty():
        print(f"making the image: {what}", file=sys.stderr)


def run(*command: str | Path) -> None:
    """Run a tool; what it says is shown only if it fails."""
    # Python keeps what it compiled, as it does for everyone who did not forbid it.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    if done.returncode:
        sys.exit(f"{command[0]}: {done.stderr.strip()}")
