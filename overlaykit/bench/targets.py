"""Where workloads run: each target makes a new writable layer over the image's files, and takes it away again."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from overlaykit.bench.docker import docker_layer, docker_volume
from overlaykit.bench.elsewhere import as_user, attach
from overlaykit.bench.files import Files, in_process, on_host
from overlaykit.bench.isolate import die_with_parent
from overlaykit.errors import Unsupported
from overlaykit.overlay import Overlay, bind_mount, mount, overlay_mount, unmount
from overlaykit.tree import Tree, scan

HOST = "host"  # the target that all others are compared with
STARTING = 10  # seconds that a FUSE server has


@dataclass
class Scene:
    """A folder to work in, and `lower`, the image's files in one directory.

    rootless   in a user namespace of our own
    read_only  nobody writes to these files, so that directories of the host have them as hard links
    """

    place: Path
    lower: Path
    rootless: bool = False
    read_only: bool = False
    _lowers: dict[int, list[Path]] = field(default_factory=dict)
    _trees: dict[int, list[Tree]] = field(default_factory=dict)

    def lowers(self, count: int) -> list[Path]:
        """The image's files dealt out to `count` directories, bottom first, every directory in each."""
        if count == 1:
            return [self.lower]
        if count not in self._lowers:
            layers = [self.place / f"lowers-{count}" / str(i) for i in range(count)]
            number = 0
            for directory, _, names in os.walk(self.lower):
                inside = os.path.relpath(directory, self.lower)
                for layer in layers:
                    (layer / inside).mkdir(parents=True, exist_ok=True)
                for name in sorted(names):
                    os.link(os.path.join(directory, name), layers[number % count] / inside / name, follow_symlinks=False)
                    number += 1
            self._lowers[count] = layers
        return self._lowers[count]

    def trees(self, count: int) -> list[Tree]:
        """What `lowers` say, as a store keeps it."""
        if count not in self._trees:
            self._trees[count] = [scan(lower) for lower in self.lowers(count)]
        return self._trees[count]


@dataclass(frozen=True, slots=True)
class Target:
    """fresh(scene): a context manager that gives Files over the image's files, in which nothing was written yet.

    plain: a directory that has them itself, so that nothing is ever copied up.
    OSError, Unsupported: it cannot run here; the message says why.
    """

    name: str
    what: str
    fresh: Callable[[Scene], AbstractContextManager[Files]]
    plain: bool = False


@contextmanager
def folder(scene: Scene, *names: str) -> Iterator[tuple[Path, ...]]:
    """New directories of these names in a new one, which is removed at the end."""
    base = Path(tempfile.mkdtemp(dir=scene.place))
    try:
        for name in names:
            (base / name).mkdir()
        yield tuple(base / name for name in names)
    finally:
        shutil.rmtree(base)


def fill(volume: Path, scene: Scene) -> None:
    """Put the image's files into a directory of the host."""
    # Copies are read 10 % faster or slower than what they are copies of, by where in memory they happen to lie.
    copy = os.link if scene.read_only else shutil.copy2
    shutil.copytree(scene.lower, volume, symlinks=True, copy_function=copy, dirs_exist_ok=True)


@contextmanager
def host(scene: Scene) -> Iterator[Files]:
    with folder(scene, "volume") as (volume,):
        fill(volume, scene)
        yield on_host(volume)


@contextmanager
def bind(scene: Scene) -> Iterator[Files]:
    with folder(scene, "volume", "target") as (volume, target):
        fill(volume, scene)
        mount(bind_mount(volume, target))
        try:
            yield on_host(target)
        finally:
            unmount(target)


@contextmanager
def kernel(scene: Scene, *, lowers: int = 1, **options: bool) -> Iterator[Files]:
    if scene.rootless:
        raise Unsupported("only root mounts an overlay with trusted.overlay.* marks: see kernel-rootless")
    with folder(scene, "upper", "work", "merged") as (upper, work, merged):
        mount(overlay_mount(scene.lowers(lowers), upper, work, merged, **options))  # type: ignore[arg-type]
        try:
            yield on_host(merged, upper=upper)
        finally:
            unmount(merged)


@contextmanager
def rootless(scene: Scene) -> Iterator[Files]:
    """In the user namespace that we are in; for root, in one that is made for it."""
    with folder(scene, "upper", "work", "merged") as (upper, work, merged):
        what = overlay_mount(scene.lowers(1), upper, work, merged, userxattr=True)
        if scene.rootless:
            mount(what)
        else:
            attach(lambda: as_user(what), merged)
        try:
            yield on_host(merged, upper=upper)
        finally:
            unmount(merged)


@contextmanager
def fuse(scene: Scene) -> Iterator[Files]:
    program = shutil.which("fuse-overlayfs")
    if program is None:
        raise Unsupported("fuse-overlayfs is not installed")
    with folder(scene, "upper", "work", "merged") as (upper, work, merged):
        options = f"lowerdir={scene.lower},upperdir={upper},workdir={work}"
        # In the foreground, so that it ends with us whatever ends us.
        server = subprocess.Popen(
            [program, "-f", "-o", options, merged], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE, preexec_fn=die_with_parent,
        )  # fmt: skip
        try:
            deadline = time.monotonic() + STARTING
            while not os.path.ismount(merged):
                if server.poll() is not None or time.monotonic() > deadline:
                    server.kill()
                    words = os.fsdecode(server.communicate()[1]).strip()
                    raise Unsupported(f"fuse-overlayfs does not start: {words or server.returncode}")
                time.sleep(0.002)
            yield on_host(merged, upper=upper)
        finally:
            with contextlib.suppress(OSError):  # it never came to mount
                unmount(merged, lazy=True)
            server.terminate()
            server.communicate()


@contextmanager
def overlaykit(scene: Scene, *, lowers: int = 1) -> Iterator[Files]:
    with (
        folder(scene, "upper", "work") as (upper, work),
        Overlay(scene.lowers(lowers), upper, work, trees=scene.trees(lowers)) as fs,
    ):
        yield in_process(fs, upper=upper)


def counted(make: Callable[..., AbstractContextManager[Files]], counts: Sequence[int], name: str, what: str) -> list[Target]:
    return [Target(f"{name}-{n}", f"{what}, {n} lower{'s' * (n > 1)}", partial(make, lowers=n)) for n in counts]


TARGETS = [
    Target(HOST, "a directory of the host: what a volume is", host, plain=True),
    Target("bind", "a bind mount of one", bind, plain=True),
    Target("overlaykit", "overlaykit in process, 1 lower", overlaykit),
    *counted(kernel, (1, 8, 64), "kernel", "the kernel's overlay"),
    Target("kernel-volatile", "the same with 1 lower, volatile", partial(kernel, volatile=True)),
    Target("kernel-metacopy", "with metacopy and redirect_dir", partial(kernel, metacopy=True, redirect_dir=True)),
    Target("kernel-rootless", "with userxattr, in a user namespace", rootless),
    Target("fuse-overlayfs", "fuse-overlayfs, 1 lower", fuse),
    Target("docker-layer", "the writable layer of a Docker container", docker_layer),
    Target("docker-volume", "a volume of a Docker container", docker_volume, plain=True),
]
