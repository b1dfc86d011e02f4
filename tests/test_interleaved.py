"""A change of a store, and another one by another process between any two steps of it: what comes of both is what would come
of them one after the other; or one is refused, and only the other has happened.

A few others at a step each are tried, as OVERLAYKIT_STRESS_SEED says; OVERLAYKIT_FAULTS=all tries all at a hundred steps,
which takes hours.
"""

from __future__ import annotations

import io
import os
import random
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import imagefiles as im
import pytest
from faults import ALL, Change, dice, run_beside
from kernel_overlay import SCRATCH

from overlaykit import AlreadyExists, Container, InUse, MountSpec, NotFound, Store

SOME = int(os.environ.get("OVERLAYKIT_STRESS_OTHERS", "1"))  # that are tried with each change, each at one step, unless all
MOST = 300  # steps; few changes take so many
Outcome = tuple[str, str, dict[str, Any]]  # what came of the one and of the other: "done" or how it was refused; the state


def box(store: Store) -> Container:
    return store.container("box")


def write(store: Store) -> None:
    with box(store) as container:
        container.fs.write_bytes("/etc/other", b"written")


def mount(store: Store) -> None:
    container = box(store)
    (container.mount() / "etc/other").write_bytes(b"written")
    container.unmount()


CONTAINERS: dict[str, Change] = {
    "create": lambda store: store.create("one:1", name="second"),
    "rm": lambda store: box(store).remove(),
    "rename": lambda store: box(store).rename("crate"),
    "write": write,
    "mount and unmount": mount,
    "diff": lambda store: box(store).diff(),
    "export": lambda store: box(store).export(io.BytesIO()),
    "commit": lambda store: box(store).commit("made:1"),
    "snapshot": lambda store: box(store).snapshot(),
    "rollback": lambda store: box(store).rollback("first"),
    "forget": lambda store: box(store).remove_snapshot("first"),
    "fork": lambda store: box(store).fork("second"),
    "discard": lambda store: box(store).discard("/etc/new"),
    "apply-to": lambda store: box(store).apply_to(store.container("bound")),
    "cp": lambda store: store.cp("box:/etc/new", "bound:/etc/copy"),
    "gc": lambda store: store.gc(),
}
IMAGES: dict[str, Change] = {
    "create": lambda store: store.create("two:1", name="second"),
    "load": lambda store: store.load(store.root.parent / "two.tar"),
    "load another of that name": lambda store: store.load(store.root.parent / "three.tar"),
    "tag": lambda store: store.tag("two:1", "also:1"),
    "tag another": lambda store: store.tag("one:1", "two:1"),
    "rmi": lambda store: store.remove_image("two:1"),
    "rmi -f ID": lambda store: store.remove_image(store.image("two:1").id, force=True),
    "prune": lambda store: store.prune(all=True),
    "commit": lambda store: box(store).commit("two:1"),
    "gc": lambda store: store.gc(),
}
VOLUMES: dict[str, Change] = {
    "create": lambda store: store.create_volume("new", labels={"made": "so"}),
    "create with it": lambda store: store.create("one:1", name="second", mounts=["new:/etc"]),
    "create with another": lambda store: store.create("one:1", name="second", mounts=["spare:/etc"]),
    "create with it and one that cannot be": lambda store: store.create(
        "one:1", name="second", mounts=["new:/etc", MountSpec(source="other", target="/x", driver="missing")]
    ),
    "volumes from": lambda store: store.create("one:1", name="second", volumes_from=["bound"]),
    "rm": lambda store: store.container("bound").remove(volumes=True),
    "volume rm": lambda store: store.volume("spare").remove(),
    "volume prune": lambda store: store.prune_volumes(all=True),
    "clone": lambda store: store.volume("spare").clone("new"),
    "clone what a container has": lambda store: store.volume("data").clone("new"),
    "snapshot": lambda store: store.volume("spare").snapshot(),
    "rename": lambda store: store.volume("spare").rename("new"),
    "rename what a container has": lambda store: store.volume("data").rename("new"),
    "export": lambda store: store.volume("data").export(io.BytesIO()),
    "import": lambda store: store.import_volume("new", store.root.parent / "data.tar"),
    "reseed": lambda store: store.reseed_volume("data", "two:1"),
    "size": lambda store: store.volume("data").size(),
    "read": lambda store: store.container("bound").fs.listdir("/etc"),
    "cp": lambda store: store.cp("volume:data:/motd", "volume:spare:/copy"),
    "gc": lambda store: store.gc(),
}
PASSING = (IMAGES["prune"], VOLUMES["volume prune"])
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="whiteouts and trusted.overlay xattrs need root")
forks = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # the child does not touch what other threads hold
GROUPS = {"container": CONTAINERS, "image": IMAGES, "volume": VOLUMES}


@pytest.fixture(scope="module")
def top() -> Iterator[Path]:
    """A folder with a store to begin with, in memory where there is such, and archives."""
    with (
        pytest.MonkeyPatch.context() as patch,
        tempfile.TemporaryDirectory(dir=SCRATCH, prefix="overlaykit-test-") as folder,
    ):
        patch.setenv("SOURCE_DATE_EPOCH", "1700000000")
        top = Path(folder)
        im.write(top / "one.tar", im.docker_20(tag="one:1"), form="tar")
        im.write(top / "two.tar", im.oci([im.LAYERS[1], im.LAYERS[0]], tag="two:1"), form="tar")
        im.write(top / "three.tar", im.oci([im.LAYERS[0]], tag="two:1"), form="tar")
        with Store(top / "template") as store:
            store.load(top / "one.tar")
            store.load(top / "two.tar")
            store.unpack(store.image("two:1"))
            with store.create("one:1", name="box") as container:
                container.snapshot("first")
                container.fs.write_bytes("/etc/new", b"new")
                container.snapshot("last")
                container.fs.unlink("/etc/motd")
            store.create("one:1", name="bound", mounts=["data:/etc", "/anonymous"])
            store.volume("data").export(top / "data.tar")
            (store.create_volume("spare").mountpoint / "file").write_text("spare")
        yield top


def again(top: Path) -> Path:
    """The root of a store as it was in the beginning."""
    shutil.rmtree(top / "store", ignore_errors=True)
    subprocess.run(["cp", "-a", top / "template", top / "store"], check=True)  # with its trusted xattrs
    return top / "store"


def state(store: Store) -> dict[str, Any]:
    """All that a user sees."""
    found: dict[str, Any] = {f"image {name}": image.digest for image in store.images() for name in image.tags or ["none"]}
    for container in store.containers():
        with container.view() as view:
            texts = {name: view.read_bytes(f"/etc/{name}") for name in view.listdir("/etc")}
        changes = [str(change) for change in container.diff()]
        volumes = [mount.volume for mount in container.mounts if not mount.is_anonymous]
        found[f"container {container.name}"] = (changes, texts, [s.name for s in container.snapshots()], volumes)
    for volume in store.volumes():
        if not volume.is_anonymous:
            texts = {p.name: p.read_bytes() for p in volume.mountpoint.iterdir() if p.is_file()}
            found[f"volume {volume.name}"] = (volume.labels, texts)
    return found


def assert_sound(root: Path) -> dict[str, Any]:
    """What a user sees of a store in which nothing is wrong, and nothing too much."""
    with Store(root) as store:
        found = state(store)
        assert store.fsck() == []
        assert os.listdir(root / "leases") == ["lock"]
        assert os.listdir(root / "ingest") == []
        assert {path.name for path in (root / "volumes").iterdir()} == {*(v.name for v in store.volumes()), ".lock"}
        assert store.gc().size == 0
        assert state(store) == found
    return found


def one_by_one(top: Path, changes: list[Change]) -> tuple[list[str], dict[str, Any]]:
    """What comes of changes one after the other."""
    answers = []
    root = again(top)
    for change in changes:
        with Store(root) as store:
            try:
                change(store)
                answers.append("done")
            except (InUse, NotFound, AlreadyExists) as e:
                answers.append(type(e).__name__)
    return answers, assert_sound(root)


def expected(top: Path, change: Change, other: Change) -> list[Outcome]:
    """What may come of two changes at once."""
    (first, second), both = one_by_one(top, [change, other])
    (early, late), turned = one_by_one(top, [other, change])
    (alone,), by_change = one_by_one(top, [change])
    (lonely,), by_other = one_by_one(top, [other])
    _, before = one_by_one(top, [])
    found: list[Outcome] = [(first, second, both), (late, early, turned)]
    for refused in ("InUse", "NotFound", "AlreadyExists"):
        found += [(alone, refused, by_change), (refused, lonely, by_other), (refused, "InUse", before)]
        found += [("InUse", refused, before)]
    if other in PASSING:  # what is just being used is passed over
        found.append((alone, "done", by_change))
    return found


def comes_between(top: Path, change: Change, other: Change, step: int, wanted: list[Outcome]) -> bool:
    """Let `other` come before step number `step` of `change`, and see that what comes of it is wanted. False if there is no
    such step."""
    answers = run_beside(again(top), change, other, step)
    if answers is None:
        return False
    one, two = (answer.partition(":")[0].rpartition(".")[2] for answer in answers)
    assert (one, two, assert_sound(top / "store")) in wanted, f"at step {step}: {answers}"
    return True


@needs_root
@forks
@pytest.mark.parametrize(("group", "name"), [(group, name) for group, changes in GROUPS.items() for name in changes])
def test_what_comes_of_two_changes_at_once_would_come_of_them_one_by_one(group: str, name: str, top: Path) -> None:
    changes = GROUPS[group]
    chance = dice(f"{group} {name}")
    for another in changes if ALL else chance.sample(sorted(changes), SOME):
        wanted = expected(top, changes[name], changes[another])
        for step in steps(chance):
            if comes_between(top, changes[name], changes[another], step, wanted) and not ALL:
                break


@needs_root
@forks
@pytest.mark.parametrize("other", ["write", "mount and unmount"])
def test_what_is_written_beside_a_discard_is_refused_or_stays(other: str, top: Path) -> None:
    """The container was frozen, which gave it a new upper; then a layer was put on that, with one more upper. What was
    written to the first, which nobody had locked, went with it."""
    discard, another = CONTAINERS["discard"], CONTAINERS[other]
    wanted = expected(top, discard, another)
    step = 0
    while comes_between(top, discard, another, step, wanted):
        step += 5


def steps(chance: random.Random) -> list[int]:
    """Steps to try one after the other, until there is such a one."""
    if ALL:
        return [step for step in range(MOST) if step < 12 or chance.randrange(step) < 12]
    return [chance.randrange(1 << size) for size in range(8, 0, -1)] + [0]
