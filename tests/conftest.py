"""What many tests use: real peers (see peers.py), a small and a real root filesystem, a store, hypothesis profiles."""

from __future__ import annotations

import fcntl
import os
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import peers
import pytest
import rootfs
from hypothesis import HealthCheck, settings
from kernel_overlay import SCRATCH

if TYPE_CHECKING:
    import overlaykit

# No deadline: two cores are shared with other workers, and a slow example is no failure.
settings.register_profile("default", deadline=None, suppress_health_check=[HealthCheck.too_slow])
# CI repeats itself, so that a failure is of the change at hand; the other profiles look for new examples.
settings.register_profile("ci", settings.get_profile("default"), max_examples=300, print_blob=True, derandomize=True)
settings.register_profile("thorough", settings.get_profile("default"), max_examples=20_000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if peers.IN_CI else "default"))

# A shell that starts the tests in the background has them ignore Ctrl-C, and tests of it would wait for ever.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

A_DAY = 24 * 3600  # seconds that an unpacked Debian stays good


@pytest.fixture(scope="session")
def docker() -> Iterator[peers.Docker]:
    """A real dockerd for the whole session (with `-n 2`: one a worker). Tests use names that meet no other's."""
    with peers.docker_daemon() as daemon:
        yield daemon


@pytest.fixture(scope="module")
def own_docker() -> Iterator[peers.Docker]:
    """A dockerd for one file, whose tests look at all images, containers or volumes that there are."""
    with peers.docker_daemon() as daemon:
        yield daemon


@pytest.fixture(scope="session")
def podman() -> Iterator[peers.Podman]:
    """podman with a store for the whole session."""
    with peers.podman_store() as store:
        yield store


@pytest.fixture(scope="session")
def bookworm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tar of Debian bookworm's smallest root filesystem, made once a day with mmdebstrap (170 MB)."""
    cache = getattr(request.config, "cache", None)  # -p no:cacheprovider
    folder = cache.mkdir("bookworm") if cache else tmp_path_factory.mktemp("bookworm")
    tar = folder / "bookworm.tar"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two workers want the same one
        if not tar.exists() or time.time() - tar.stat().st_mtime > A_DAY:
            peers.debian_rootfs(tar)
    return tar


@pytest.fixture(scope="session")
def small_rootfs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tar of a root filesystem that a container runs in (a static busybox, 2 MB) with a name of every kind in it."""
    tar = tmp_path_factory.mktemp("rootfs") / "small.tar"
    rootfs.write(tar, busybox=Path(peers.peer("busybox")))
    return tar


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A new folder, in memory where there is such: what fsyncs hundreds of times would take minutes on a disk."""
    with tempfile.TemporaryDirectory(dir=SCRATCH, prefix="overlaykit-test-") as folder:
        yield Path(folder)


@pytest.fixture
def store(tmp_path: Path) -> overlaykit.Store:
    """An empty store."""
    import overlaykit

    return overlaykit.Store(tmp_path / "store")
