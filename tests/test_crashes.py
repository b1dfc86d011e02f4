"""Killed at any step, out of room at any byte, many at once: the store opens, shows the state before or after, and keeps
nothing that a dead operation left."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import imagefiles as im
import peers
import pytest

from overlaykit import OverlaykitError, Store
from overlaykit.oci import validate

# What the interpreter reports of system calls that change something (audit events), and opening, which may create.
STEPS = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.chown", "os.utime", "os.setxattr", "os.truncate"}
STEPS |= {"open", "fcntl.flock", "sqlite3.connect", "shutil.rmtree", "os.scandir", "os.listdir"}


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A new folder, in memory where there is such: hundreds of stores are made here, each with its fsyncs."""
    parent = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=parent, prefix="overlaykit-test-") as folder:
        yield Path(folder)


def prepare(root: Path) -> None:
    """A store with one:1 (two layers, unpacked), and a container `box` that changed something."""
    with Store(root) as store:
        store.load(im.write(root.parent / "one.tar", im.docker_20(tag="one:1"), form="tar"))
        im.write(root.parent / "two.tar", im.oci([im.LAYERS[1], im.LAYERS[0]], tag="two:1"), form="tar")
        with store.create("one:1", name="box") as box:
            box.fs.unlink("/etc/motd")
            with box.fs.open("/etc/new", "wb") as file:
                file.write(im.NOISE)


def state(store: Store) -> tuple[frozenset[str], frozenset[str]]:
    """What a user sees: names of images, names of containers."""
    images = frozenset(tag for image in store.images() for tag in image.tags)
    return images, frozenset(container.name for container in store.containers())


def assert_whole(root: Path) -> tuple[frozenset[str], frozenset[str]]:
    """Open the store: all that is in it must be whole, and needed by something. What a user sees."""
    with Store(root) as store:
        assert store.fsck() == []
        assert os.listdir(root / "leases") == ["lock"]
        assert os.listdir(root / "ingest") == []
        assert {path.name for path in (root / "snapshots").iterdir()} == {s.id for s in store.snapshots.walk()}
        needed: set[str] = set()
        for image in [*store.images(), *(container.image for container in store.containers())]:
            assert validate(image) == []
            needed |= {image.digest, image.id, *(layer.digest for layer in image.layers)}
        assert set(store.layout.digests()) == needed
        for container in store.containers():
            container.diff()
            with container.view() as view:
                view.listdir("/etc")
        return state(store)


OPERATIONS: dict[str, Callable[[Store], object]] = {
    "load": lambda store: store.load(store.root.parent / "two.tar"),
    "import": lambda store: store.import_rootfs(store.root.parent / "one.tar", "imported:1"),
    "create": lambda store: store.create("one:1", name="second"),
    "unpack and create": lambda store: [store.load(store.root.parent / "two.tar"), store.create("two:1", name="second")],
    "commit": lambda store: store.container("box").commit("three:1"),
    "tag": lambda store: store.tag("one:1", "also:1"),
    "rm": lambda store: store.container("box").remove(),
    "rm and rmi": lambda store: [store.container("box").remove(), store.remove_image("one:1")],
    "gc": lambda store: store.gc(),
    "snapshot": lambda store: store.container("box").snapshot("named"),
    "rollback": lambda store: [store.container("box").snapshot("named"), store.container("box").rollback("named")],
    "fork": lambda store: store.container("box").fork("second"),
    "discard": lambda store: store.container("box").discard("/etc/new"),
    "prune": lambda store: store.prune(all=True, containers=True),
}


def run_killed(root: Path, operation: Callable[[Store], object], step: int) -> bool:
    """Run the operation in a child that is killed with SIGKILL as it takes step number `step`; whether it came that far."""
    pid = os.fork()
    if pid == 0:
        left = step

        def count(event: str, _: object) -> None:
            nonlocal left
            if event in STEPS:
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        try:
            store = Store(root)
            sys.addaudithook(count)
            operation(store)
            os._exit(0)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # the child does not touch what other threads hold
@pytest.mark.parametrize("name", OPERATIONS)
def test_killed_at_every_step(name: str, scratch: Path) -> None:
    operation = OPERATIONS[name]
    seen = set()
    step = 0
    stride = 1
    while True:
        top = scratch / str(step)
        top.mkdir()
        prepare(top / "store")
        with Store(top / "store") as store:
            before = state(store)
        was_killed = run_killed(top / "store", operation, step)
        seen.add(assert_whole(top / "store"))
        # What was begun can be done now.
        if not was_killed:
            break
        step += stride
        stride = 1 + step // 12  # each of the first steps, later every second, third, ...
    with Store(scratch / str(step) / "store") as store:
        after = state(store)
    if name not in ("unpack and create", "rm and rmi", "prune"):  # these are two changes
        assert seen <= {before, after}
    assert after in seen


# --- no room ----------------------------------------------------------------------------------------------------------


@contextmanager
def tiny(place: Path, size: int) -> Iterator[None]:
    """A file system of `size` bytes at `place`."""
    place.mkdir()
    peers.run("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place)
    try:
        yield
    finally:
        peers.run("umount", "--lazy", place)  # after a failure its traceback holds files open


@pytest.mark.parametrize("name", ["load", "import", "unpack and create", "commit"])
def test_no_room_is_said_once_and_leaves_no_trace(name: str, scratch: Path) -> None:
    """In steps of 96 KiB, from a file system that has no room for the operation to one that has."""
    peers.need_root("a small file system")
    for step in range(1, 60):
        place = scratch / str(step)
        with tiny(place, 64 << 20):
            prepare(place / "store")
            (place / "store/reserve").unlink()  # its use is tested below
            used = os.statvfs(place)
            room = (used.f_blocks - used.f_bfree) * used.f_frsize + (step * 96 << 10)
            peers.run("mount", "-o", f"remount,size={room}", place)
            with Store(place / "store") as store:
                before = state(store)
                try:
                    OPERATIONS[name](store)
                    break
                except OSError as e:
                    if e.errno != errno.ENOSPC:
                        raise
            peers.run("mount", "-o", f"remount,size={64 << 20}", place)
            if name != "unpack and create":  # these are two changes
                assert assert_whole(place / "store") == before
            with Store(place / "store") as store:
                OPERATIONS[name](store)
            assert assert_whole(place / "store") != before
    assert 1 < step < 59


def test_a_full_disk_can_be_emptied(scratch: Path) -> None:
    """SQLite needs room even to read: without ROOT/reserve nothing could be removed once there is none."""
    peers.need_root("a small file system")
    place = scratch / "tiny"
    with tiny(place, 8 << 20):
        prepare(place / "store")
        with suppress(OSError), (place / "filler").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        with Store(place / "store") as store:
            assert store.container("box").remove() > 0
            assert store.remove_image("one:1").freed.size > 0
        assert_whole(place / "store")
        (place / "filler").unlink()
        assert_whole(place / "store")
        assert (place / "store/reserve").stat().st_size > 0


# --- many at once -----------------------------------------------------------------------------------------------------

WORKER = """
import os, random, sys, time
import overlaykit
root, seed, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
chance = random.Random(seed)
top = os.path.dirname(root)
end = time.monotonic() + seconds
expected = (overlaykit.NotFound, overlaykit.InUse, overlaykit.AlreadyExists)
while time.monotonic() < end:
    with overlaykit.Store(root) as store:
        for _ in range(chance.randrange(1, 6)):
            try:
                images = [tag for image in store.images() for tag in image.tags]
                containers = store.containers()
                match chance.randrange(10):
                    case 0:
                        store.load(os.path.join(top, chance.choice(["one.tar", "two.tar"])))
                    case 1 | 2:
                        store.create(chance.choice(images), name=f"c{chance.randrange(12)}")
                    case 3:
                        with chance.choice(containers) as container:
                            with container.fs.open(f"/etc/file{chance.randrange(3)}", "wb") as file:
                                file.write(os.urandom(20000))
                            container.fs.unlink("/etc/noise")
                    case 4:
                        chance.choice(containers).commit(f"made:{chance.randrange(5)}")
                    case 5:
                        chance.choice(containers).remove()
                    case 7:
                        box = chance.choice(containers)
                        box.snapshot() if chance.random() < 0.5 or not box.snapshots() else box.rollback()
                    case 8:
                        chance.choice(containers).fork(f"c{chance.randrange(12)}")
                    case 9:
                        chance.choice(containers).discard(f"/etc/file{chance.randrange(3)}")
                    case 6:
                        store.remove_image(chance.choice(images)) if chance.random() < 0.8 else store.gc()
            except (*expected, IndexError):
                pass
            except FileNotFoundError as e:
                # The container went while its files were being looked at, or /etc/noise had gone before.
                if not (e.filename and ("/snapshots/" in str(e.filename) or e.filename == "/etc/noise")):
                    raise
"""
SECONDS = float(os.environ.get("OVERLAYKIT_STRESS_SECONDS", "6"))  # the bar for a release is 300


def test_many_processes_some_of_them_killed(scratch: Path) -> None:
    root = scratch / "store"
    prepare(root)
    chance = random.Random(1)
    end = time.monotonic() + SECONDS
    killed: set[int] = set()

    def start(seed: int) -> subprocess.Popen[str]:
        left = max(end - time.monotonic(), 0.1)
        argv = [sys.executable, "-W", "error", "-c", WORKER, root, str(seed), str(left)]
        return subprocess.Popen(argv, stderr=subprocess.PIPE, text=True)

    everyone = [start(seed) for seed in range(8)]
    workers = list(everyone)
    try:
        while time.monotonic() < end:
            time.sleep(0.7)
            victim = chance.randrange(len(workers))
            workers[victim].kill()
            killed.add(workers[victim].pid)
            workers[victim] = start(len(everyone))
            everyone.append(workers[victim])
        for worker in everyone:
            _, errors = worker.communicate(timeout=60)
            assert worker.pid in killed or worker.returncode == 0, errors
    finally:
        for worker in everyone:
            worker.kill()
            worker.communicate()
    assert_whole(root)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_dead_writers_lock_stops_nobody(scratch: Path) -> None:
    root = scratch / "store"
    prepare(root)
    pid = os.fork()
    if pid == 0:
        store = Store(root)
        with store.operation(), store.records.transaction():
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    began = time.monotonic()
    with Store(root) as store:
        store.create("one:1", name="next")
    assert time.monotonic() - began < 5


def test_a_damaged_database_is_one_error(scratch: Path) -> None:
    root = scratch / "store"
    prepare(root)
    (root / "store.db").write_bytes(b"this is no database\n" * 1000)
    with pytest.raises(OverlaykitError, match=r"store\.db"):
        Store(root)
