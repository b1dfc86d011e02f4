"""The benchmark's Docker targets, with a real dockerd: its own mount and volume are measured, and nothing of it stays."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import peers
import pytest

from overlaykit import bench
from overlaykit.bench.docker import clear, docker_layer, docker_volume
from overlaykit.bench.method import Result


@pytest.fixture
def place(docker: peers.Docker, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A new folder, from which the docker command finds the tests' own dockerd."""
    peers.peer("busybox")
    for name, value in docker.env.items():
        monkeypatch.setenv(name, value)
    with tempfile.TemporaryDirectory(dir=docker.place, prefix="bench-") as folder:
        yield Path(folder)


def made(docker: peers.Docker) -> list[str]:
    """Containers, images and volumes of benchmarks, and anonymous volumes."""
    label = ("--quiet", "--filter", "label=overlaykit.bench")
    return [*docker("ps", "--all", *label).split(), *docker("images", *label).split(), *docker("volume", "ls", "-q").split()]


def test_a_containers_layer_and_volume_are_measured_and_nothing_stays(docker: peers.Docker, place: Path) -> None:
    before = made(docker)
    targets = [target for target in bench.TARGETS if target.name in ("host", "docker-layer", "docker-volume")]
    workloads = [workload for workload in bench.WORKLOADS if workload.name in ("append-fsync", "copy-up-64KiB", "sqlite")]
    with bench.Bench(place) as suite:
        found = list(suite.run(workloads=workloads, targets=targets, seconds=0))
    assert {(one.workload, one.target) for one in found if isinstance(one, Result)} == {
        (workload.name, target.name) for workload in workloads for target in targets
    }
    copied = {one.target: one.copied for one in found if isinstance(one, Result) and one.kind == "copy-up"}
    assert copied["docker-layer"] >= 100 << 16
    assert copied["docker-volume"] is None
    assert made(docker) == before
    assert list(place.iterdir()) == []


def test_a_killed_runs_container_and_image_go_with_the_next(docker: peers.Docker, place: Path) -> None:
    """Nobody is left to remove them: they carry the name of the run's folder, which the next run finds unlocked."""
    before = made(docker)
    command = [sys.executable, "-m", "overlaykit", "bench", "--dir", str(place), "--seconds", "600"]
    running = subprocess.Popen(
        [*command, "--workload", "create", "--target", "docker-layer", "--target", "docker-volume"],
        stdout=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 300
    # Three images, two containers and a volume: it measures. Before that dockerd may just be making one for who is killed.
    while len(made(docker)) < len(before) + 6 and running.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    running.kill()
    running.wait()
    assert len(made(docker)) > len(before)
    while list(place.iterdir()) and time.monotonic() < deadline:
        with bench.Bench(place):  # its processes let go of the folder a moment after they are killed
            pass
    assert list(place.iterdir()) == []
    assert made(docker) == before


def test_what_is_written_is_in_the_container_and_its_upper(docker: peers.Docker, place: Path) -> None:
    scene = bench.Scene(place, place / "work" / "lower")
    scene.lower.mkdir(parents=True)
    (scene.lower / "file").write_text("image")
    try:
        with docker_layer(scene) as files:
            assert files.path is not None
            assert files.upper is not None
            assert (files.path / "file").read_text() == "image"
            (files.path / "file").write_text("layer")
            assert (files.upper / "file").read_text() == "layer"
            (box,) = docker("ps", "--quiet", "--filter", f"label=overlaykit.bench={place / 'work'}").split()
            docker("cp", f"{box}:/file", place / "copy")
            assert (place / "copy").read_text() == "layer"
        with docker_volume(scene) as files:
            assert files.path is not None
            assert (files.path / "file").read_text() == "image"
    finally:
        clear(place / "work")
    shutil.rmtree(place / "work")
    assert str(place) not in Path("/proc/self/mountinfo").read_text()
