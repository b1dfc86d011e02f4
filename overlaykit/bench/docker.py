"""Docker's writable layer and volume, where a dockerd answers: the very mount and directory that its containers see.

What is made carries a label with the run's folder, so that a later run finds what a killed one left behind.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from overlaykit.bench.elsewhere import attach, root_of
from overlaykit.bench.files import Files, on_host
from overlaykit.bench.isolate import PREFIX
from overlaykit.errors import Unsupported
from overlaykit.overlay import unmount

if TYPE_CHECKING:
    from overlaykit.bench.targets import Scene

LABEL = "overlaykit.bench"
SLEEPER = "/busybox-of-overlaykit-bench"  # what the container runs, from the host; only a name that begins so is busybox


def docker(*args: str | Path, stdin: Path | None = None) -> str:
    """What `docker ARGS` prints. Unsupported with its words if it fails."""
    program = shutil.which("docker")
    if program is None:
        raise Unsupported("docker is not installed")
    with open(stdin or os.devnull, "rb") as source:
        run = subprocess.run([program, *args], stdin=source, capture_output=True, text=True, check=False)
    if run.returncode != 0:
        words = run.stderr.strip().splitlines() or [f"exit code {run.returncode}"]
        raise Unsupported(f"docker: {words[-1]}")
    return run.stdout.strip()


def image(scene: Scene) -> str:
    """An image of the scene's files and a program that waits, made once."""
    name = f"overlaykit-bench:{Path(run_of(scene)).name}-{scene.lower.parent.name}".lower()
    try:
        docker("image", "inspect", name)
    except Unsupported:
        docker("version", "--format", "{{.Server.Version}}")
        busybox = shutil.which("busybox")
        if busybox is None:
            raise Unsupported("a container needs a static program to run: apt install busybox-static") from None
        root = scene.place / "docker-root"
        shutil.copytree(scene.lower, root, symlinks=True)
        shutil.copy(busybox, root / SLEEPER[1:])
        tar = scene.place / "docker-root.tar"
        subprocess.run(["tar", "--create", "--file", tar, "--directory", root, "."], check=True)
        docker("import", "--change", f"LABEL {LABEL}={run_of(scene)}", "-", name, stdin=tar)
        shutil.rmtree(root)
        tar.unlink()
    return name


def run_of(scene: Scene) -> str:
    """The folder of the run that `scene` is part of."""
    return next((str(folder) for folder in scene.lower.parents if folder.name.startswith(PREFIX)), str(scene.lower.parent))


@contextmanager
def container(scene: Scene, *options: str) -> Iterator[str]:
    label = f"{LABEL}={run_of(scene)}"
    run = ("run", "--detach", "--network", "none", "--label", label, *options, image(scene), SLEEPER, "sleep", "100000")
    id = docker(*run)
    try:
        yield id
    finally:
        docker("rm", "--force", "--volumes", id)


@contextmanager
def docker_layer(scene: Scene) -> Iterator[Files]:
    with container(scene) as id, tempfile.TemporaryDirectory(dir=scene.place) as merged:
        facts = json.loads(docker("inspect", id))[0]
        pid, data = facts["State"]["Pid"], (facts.get("GraphDriver") or {}).get("Data") or {}
        if "UpperDir" not in data:
            raise Unsupported("this Docker does not say where a container's layer is: no GraphDriver.Data.UpperDir")
        upper = Path(data["UpperDir"])
        # A daemon of another machine has other processes, and we are about to write.
        if not upper.is_dir() or not Path(f"/proc/{pid}/root{SLEEPER}").exists():
            raise Unsupported(f"the files of Docker's containers are not to be reached from here: {upper}")
        attach(lambda: root_of(pid), Path(merged))  # dockerd's own mount is in no namespace but its own
        try:
            yield on_host(Path(merged), upper=upper)
        finally:
            unmount(merged)


@contextmanager
def docker_volume(scene: Scene) -> Iterator[Files]:
    with container(scene, "--volume", "/volume") as id:
        mounts = json.loads(docker("inspect", "--format", "{{json .Mounts}}", id))
        volume = Path(mounts[0]["Source"])
        shutil.copytree(scene.lower, volume, symlinks=True, dirs_exist_ok=True)
        yield on_host(volume)


def clear(run: Path) -> None:
    """Remove every container and image of the run in folder `run`; nothing where no dockerd answers."""
    try:
        if ids := docker("ps", "--all", "--quiet", "--filter", f"label={LABEL}={run}").split():
            docker("rm", "--force", "--volumes", *ids)
        if ids := docker("images", "--quiet", "--filter", f"label={LABEL}={run}").split():
            docker("rmi", "--force", *set(ids))
    except Unsupported:
        return
