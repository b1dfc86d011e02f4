"""Volumes under many hands: processes that make, clone, rename, fill and remove them at once, one of which is killed now and
then. For OVERLAYKIT_STRESS_SECONDS; the bar for a release is 300."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import peers
import rootfs

from overlaykit import AlreadyExists, InUse, NotFound, Store, Unsupported

SECONDS = float(os.environ.get("OVERLAYKIT_STRESS_SECONDS", "6"))
SEED = int(os.environ.get("OVERLAYKIT_STRESS_SEED", "7"))
WORKERS = 4
NAMES = [f"volume-{letter}" for letter in "abcde"]
TMPFS = {"type": "tmpfs", "device": "tmpfs", "o": "size=1m"}
REFUSED = (AlreadyExists, InUse, NotFound)  # what others' work may bring about


def work(root: str, seed: int) -> None:
    """Random operations, until there is a file `stop`, or somebody kills this process."""
    dice = random.Random(seed)
    while not os.path.exists(f"{root}/../stop"):
        with Store(root) as store:
            for _ in range(10):
                one, other = dice.sample(NAMES, 2)
                try:
                    match dice.randrange(10):
                        case 0:
                            store.create_volume(one)
                        case 1:
                            store.create_volume(one, options=TMPFS)
                        case 2:
                            store.volume(one).clone(other)
                        case 3:
                            store.volume(one).rename(other)
                        case 4:
                            store.volume(one).remove()
                        case 5:
                            store.prune_volumes(all=True)
                        case 6:
                            store.volume(one).snapshot(other)
                        case _:
                            with store.create("base:1", mounts=[f"{one}:/etc", "/lib"]) as box:
                                assert box.fs.exists("/etc")
                                box.remove(volumes=True)
                except REFUSED:
                    continue
                except Unsupported:  # a clone of a tmpfs
                    continue


def test_many_processes_make_and_remove_volumes_and_are_killed() -> None:
    peers.need_root("mounts a tmpfs")
    with peers.overlay_place("stress") as place:
        rootfs.write(place / "rootfs.tar")
        root = place / "store"
        with Store(root) as store:
            store.import_rootfs(place / "rootfs.tar", "base:1")
            store.create("base:1", name="first").remove()
        code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_volume_stress as t; "
        code += "t.work(sys.argv[1], int(sys.argv[2]))"
        log = (place / "log").open("wb")

        def start(seed: int) -> subprocess.Popen[bytes]:
            return subprocess.Popen([sys.executable, "-c", code, root, str(seed)], stdout=log, stderr=log)

        dice = random.Random(SEED)
        workers = [start(dice.randrange(1 << 30)) for _ in range(WORKERS)]
        try:
            while not (root / "volumes" / ".lock").exists():  # until the first of them is at work, on a slow machine too
                assert all(worker.poll() is None for worker in workers), (place / "log").read_text()[-3000:]
                time.sleep(0.1)
            end = time.monotonic() + SECONDS
            while time.monotonic() < end:
                time.sleep(0.5)
                for number, worker in enumerate(workers):
                    assert worker.poll() is None, (place / "log").read_text()[-3000:]
                    if dice.random() < 0.3:
                        worker.send_signal(signal.SIGKILL)
                        worker.wait()
                        workers[number] = start(dice.randrange(1 << 30))
            (place / "stop").touch()
            for worker in workers:  # who waits for a lock for ever does not come to an end
                assert worker.wait(timeout=300) == 0, (place / "log").read_text()[-3000:]
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()
            log.close()
        with Store(root) as store:
            assert store.fsck() == []
            assert os.listdir(root / "leases") == ["lock"]
            names = {volume.name for volume in store.volumes()}
            assert {path.name for path in (root / "volumes").iterdir()} == {*names, ".lock"}
            for container in store.containers():
                with container:
                    assert container.fs.exists("/etc")
            store.prune(all=True, containers=True)
            store.prune_volumes(all=True)
            assert store.volumes() == []
        assert str(root) not in Path("/proc/self/mountinfo").read_text()
