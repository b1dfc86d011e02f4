"""ENOSPC and SIGKILL at every system call that changes something, while a store is changed. Afterwards it opens, shows the
state before or the one that was wanted, is sound, and keeps no byte that a run without fault would not.

A few places are tried, as OVERLAYKIT_STRESS_SEED says; OVERLAYKIT_FAULTS=all tries every one (some ten minutes).
"""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import imagefiles as im
import pytest
from faults import ALL, calls, dice, needs_strace, traced
from kernel_overlay import SCRATCH

from overlaykit import Store

pytestmark = needs_strace

SOME = 8  # places of an operation that are tried unless all are
FAULTS = ("error=ENOSPC", "signal=KILL")
# What of a directory's names, a file's content or attributes changes, and what puts that on disk.
CHANGING = {"write", "writev", "pwrite64", "pwritev", "copy_file_range", "sendfile", "splice", "fallocate", "ftruncate"}
CHANGING |= {"mkdir", "mkdirat", "mknod", "mknodat", "symlink", "symlinkat", "link", "linkat", "truncate", "rmdir"}
CHANGING |= {"rename", "renameat", "renameat2", "unlink", "unlinkat", "fsync", "fdatasync", "syncfs", "msync"}
CHANGING |= {"chmod", "fchmod", "fchmodat", "chown", "fchown", "lchown", "fchownat", "utimensat"}
CHANGING |= {"setxattr", "fsetxattr", "lsetxattr", "removexattr", "fremovexattr", "lremovexattr"}

CHANGES: dict[str, Callable[[Store], object]] = {
    "load": lambda store: store.load(store.root.parent / "two.tar"),
    "import": lambda store: store.import_rootfs(store.root.parent / "rootfs.tar", "imported:1"),
    "create": lambda store: store.create("one:1", name="second"),
    "create with a volume": lambda store: store.create("one:1", name="second", mounts=["data:/etc"]),
    "create and unpack": lambda store: store.create("three:1", name="second"),
    "commit": lambda store: store.container("box").commit("made:1"),
    "rm": lambda store: store.container("box").remove(),
    "rm with a volume": lambda store: store.container("bound").remove(volumes=True),
    "rmi": lambda store: store.remove_image("three:1"),
    "volume create": lambda store: store.create_volume("data"),
    "volume rm": lambda store: store.volume("spare").remove(),
    "volume prune": lambda store: store.prune_volumes(all=True),
    "gc": lambda store: store.gc(),
    "snapshot": lambda store: store.container("box").snapshot("named"),
    "fork": lambda store: store.container("box").fork("second"),
    "rollback": lambda store: store.container("shot").rollback("named"),
    "volume clone": lambda store: store.volume("spare").clone("data"),
    "volume rename": lambda store: store.volume("spare").rename("data"),
}
# Several changes one after the other: a layer, a volume, its files, a container; each of them is there or not, and whole.
SEVERAL = {"create with a volume", "create and unpack", "rm with a volume"}


@pytest.fixture
def scratch(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder in memory where there is such, and a time that documents of all runs have."""
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    folder = Path(SCRATCH or tmp_path_factory.getbasetemp()) / f"overlaykit-faults-{os.getpid()}"
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


def prepare(top: Path) -> None:
    """top/template: one:1 with containers `box`, which changed something, `bound`, with an anonymous volume, and `shot`,
    with a snapshot; three:1, of one layer, not unpacked; a volume `spare`; what nobody needs. And archives beside it."""
    im.write(top / "one.tar", im.docker_20(tag="one:1"), form="tar")
    im.write(top / "two.tar", im.oci([im.LAYERS[1], im.LAYERS[0]], tag="two:1"), form="tar")
    im.write(top / "three.tar", im.oci([im.LAYERS[0]], tag="three:1"), form="tar")
    (top / "rootfs.tar").write_bytes(im.LAYERS[0])
    with Store(top / "template") as store:
        store.load(top / "one.tar")
        with store.create("one:1", name="box") as box:
            box.fs.unlink("/etc/motd")
            box.fs.write_bytes("/etc/new", im.NOISE)
        store.create("one:1", name="bound", mounts=["/etc"])
        with store.create("one:1", name="shot") as shot:
            shot.fs.write_bytes("/etc/new", b"before")
            shot.snapshot("named")
            shot.fs.write_bytes("/etc/new", b"after")
        store.load(top / "three.tar")
        (store.create_volume("spare").mountpoint / "file").write_bytes(im.NOISE)
        raw = b"a blob that nobody needs"
        store.layout.path(im.digest(raw)).write_bytes(raw)  # type: ignore[arg-type]


def shown(store: Store) -> dict[str, Any]:
    """What a user sees of it."""
    return {
        "images": sorted((image.digest, tuple(image.tags)) for image in store.images()),
        "containers": {
            box.name: (sorted(map(str, box.diff())), [s.name for s in box.snapshots()], len(box.mounts))
            for box in store.containers()
        },
        "volumes": [volume.name for volume in store.volumes()],
    }


def files(store: Store) -> dict[str, int]:
    """Every path under the root and the bytes of each file, what has a random name under what it is.

    The database is there or not: SQLite does not give pages back.
    """
    names = {container.id: container.name for container in store.containers()}
    called = {f"snapshots/{s.id}": f"snapshots/{names.get(s.key, s.key)}" for s in store.snapshots.walk()}
    found: dict[str, int] = {}
    for folder, directories, plain in os.walk(store.root):
        below = os.path.relpath(folder, store.root)
        whole = called.get("/".join(below.split("/")[:2]), "/".join(below.split("/")[:2]))
        below = "/".join([whole, *below.split("/")[2:]])
        for name in [*directories, *plain]:
            st = os.lstat(os.path.join(folder, name))
            counts = stat.S_ISREG(st.st_mode) and not name.startswith("store.db")
            if not name.startswith(("store.db-", "snap")):
                found[called.get(f"{below}/{name}", f"{below}/{name}")] = st.st_size if counts else -1
    return found


class Place:
    """A store that is made again from its template for each run of `change`."""

    def __init__(self, top: Path, change: Callable[[Store], object]) -> None:
        self.top, self.change, self.root = top, change, top / "store"

    def again(self) -> None:
        shutil.rmtree(self.root, ignore_errors=True)
        subprocess.run(["cp", "-a", self.top / "template", self.root], check=True)  # with its trusted xattrs

    def run(self, *strace: str) -> tuple[str, str]:
        self.again()

        def prepared() -> Callable[[], object]:
            store = Store(self.root)

            def run() -> None:
                self.change(store)
                store.close()

            return run

        return traced(prepared, self.top / "log", "-f", *strace)

    def strike(self, call: str, when: int, fault: str) -> str:
        """What comes of the change with the fault at a call of it; "" if that was not made again. Which thread makes which
        call is not the same each time, and neither is when SQLite shortens a file: so it is tried some times."""
        for _ in range(10):
            answer, log = self.run("-e", f"trace={call}", "-e", f"inject={call}:{fault}:when={when}")
            if answer == "killed" or "(INJECTED)" in log:
                return answer
        return ""

    def found(self, where: str = "") -> tuple[dict[str, Any], dict[str, int]]:
        """What a user sees, and every file, once whoever opens the store next has cleared up; it is sound."""
        with Store(self.root) as store:
            assert store.fsck() == [], where
            before = shown(store)
            store.gc()
            assert store.fsck() == [], where
            assert shown(store) == before, where
            return before, files(store)


def changes_something(name: str, args: str) -> bool:
    if name == "openat":
        return any(flag in args for flag in ("O_CREAT", "O_TMPFILE", "O_TRUNC"))
    return name in CHANGING or (name == "ioctl" and "FICLONE" in args)


def each_is_one_of(found: Any, before: Any, after: Any) -> bool:
    """Whether each volume and layer is as before or after, with all its files, and each container, image and other file."""

    def parts(facts: tuple[dict[str, Any], dict[str, int]]) -> dict[str, Any]:
        seen, paths = facts
        out: dict[str, Any] = {f"{kind} {item}": True for kind, items in seen.items() for item in items}
        for path, size in paths.items():
            out.setdefault("/".join(path.split("/")[:2]), {})[path] = size
        return out

    old, new, now = parts(before), parts(after), parts(found)
    empty = {"volumes/data": -1, "volumes/data/_data": -1}
    return all(now.get(key) in (old.get(key), new.get(key), empty) for key in {*now, *old, *new})


@pytest.mark.parametrize("name", CHANGES)
def test_a_fault_at_any_system_call_leaves_the_store_before_or_after(name: str, scratch: Path) -> None:
    prepare(scratch)
    place = Place(scratch, CHANGES[name])
    place.again()
    before = place.found()
    answer, log = place.run()
    assert answer == "done"
    after = place.found()
    places = [(call, when, fault) for call, when in calls(log, changes_something) for fault in FAULTS]
    dice(name).shuffle(places)
    struck = 0
    for call, when, fault in places:
        if not (answer := place.strike(call, when, fault)):
            continue
        struck += 1
        where = f"{fault} at {call} {when}: {answer}"
        assert answer in ("done", "killed", "No space left on device", "Input/output error", "disk I/O error"), where
        assert (answer == "killed") == (fault == "signal=KILL"), where
        found = place.found(where)
        if name in SEVERAL and answer != "done":
            assert each_is_one_of(found, before, after), where
        else:
            assert found in ((after,) if answer == "done" else (before, after)), where
        if struck == SOME and not ALL:
            break
    assert struck >= SOME


def test_a_change_that_could_not_be_committed_does_not_come_back(scratch: Path) -> None:
    """A create failed, since the database's log could not be synced, and its directory was removed. But what it had written
    stood in the log, unseen, and the next process to open the store found it there: a container without a directory. And
    SQLite still was in the transaction that had failed, so that the next one in the same process failed as well."""
    prepare(scratch)

    def twice(store: Store) -> None:
        with pytest.raises(OSError, match=r"No space|I/O"):
            store.create("one:1", name="second")
        store.create("one:1", name="third").remove()

    once = Place(scratch, CHANGES["create"])
    _, log = once.run()
    for call, when in calls(log, lambda name, args: name == "fdatasync"):
        if once.run("-e", f"inject={call}:error=ENOSPC:when={when}")[0] == "done":
            continue  # it was at the end, for the log to be shortened
        assert once.found()[0]["containers"].keys() == {"box", "bound", "shot"}
        place = Place(scratch, twice)
        answer, _ = place.run("-e", f"inject={call}:error=ENOSPC:when={when}")
        assert answer == "done"
        assert place.found()[0]["containers"].keys() == {"box", "bound", "shot"}
