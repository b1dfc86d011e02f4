"""What each tool does with the image: one class a tool, one method an operation, which gives the seconds it took.

Every tool gets a folder of its own in memory. `prepare` leaves the image loaded and a container of it changed, for the
operations that need one. Docker and podman get theirs by the command line, as anyone uses them; overlaykit in process.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from image import NAME, run
from kernel_overlay import mounted
from peers import Docker, docker_daemon, podman_store, skopeo_copy

from overlaykit import Image, Kind, Store, merge

OPERATIONS = ("apply", "load", "save", "diff", "commit", "create", "ps")
ANY_IMAGE = {"create", "ps"}  # for which it does not matter what is in the image
CHANGED = {"diff", "commit"}  # which want a container with changes
CONTAINERS = 200  # that `create` makes each time
LISTED = 1_000  # containers that `ps` lists at least
REPEATED = {"ps": 7}  # what is over in no time, and so done more often in each round


@dataclass
class Clock:
    """The seconds between entering and leaving it."""

    seconds: float = 0.0
    _began: float = field(default=0.0, init=False)

    def __enter__(self) -> Clock:
        self._began = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._began


@dataclass(frozen=True)
class Changes:
    """6,000 changes to a container of the image: new files of 100 MB together, and lower ones edited, re-moded, removed."""

    edited: list[str]
    moded: list[str]
    removed: list[str]
    text: bytes
    new: int = 3_500

    @staticmethod
    def of(image: Image) -> Changes:
        """Chosen from the whole image, the same ones for every tool."""
        tree = merge([layer.tree() for layer in image.layers])
        small = [e.path for e in tree if e.kind is Kind.FILE and e.size < 64 << 10 and e.path.startswith("usr/")]
        chosen = small[:: max(1, len(small) // 2_500)][:2_500]
        text = b"".join(b"%d %s\n" % (n, path.encode(errors="surrogateescape")) for n, path in enumerate(small[:2_000]))
        return Changes(chosen[0::5], chosen[1::5], sorted(chosen[2::5] + chosen[3::5] + chosen[4::5]), text)

    def make(self, root: Path) -> None:
        for path in self.edited:
            with (root / path).open("ab") as file:
                file.write(b"# edited\n")
        for path in self.moded:
            (root / path).chmod(0o600)
        for path in self.removed:
            (root / path).unlink()
        for number in range(self.new):
            file = root / "srv/bench" / f"d{number % 70}" / f"f{number}"
            file.parent.mkdir(parents=True, exist_ok=True)
            start = number * 97 % (len(self.text) // 2)
            file.write_bytes((self.text[start:] + self.text)[:28_600])


@dataclass
class Tool:
    """The image as a layout and as a docker-archive, and a folder for the tool."""

    name: ClassVar[str]
    layout: Path
    archive: Path
    image: Image
    folder: Path

    @contextmanager
    def place(self) -> Iterator[Path]:
        """An empty folder for one round."""
        place = self.folder / "round"
        place.mkdir()
        try:
            yield place
        finally:
            run("rm", "-rf", place)

    def prepare(self, changes: Changes | None, stack: ExitStack) -> None:
        """The image loaded, and a container of it with the changes, if any; `stack` ends what runs for it."""


class Runner(Tool):
    """A tool that has containers. Subclasses say how it makes them, and what lists them."""

    made = 0

    def make(self, count: int) -> None:
        """Create so many containers."""
        raise NotImplementedError

    def list(self) -> None:
        """Print all of them."""
        raise NotImplementedError

    def create(self) -> float:
        with Clock() as clock:
            self.make(CONTAINERS)
        self.made += CONTAINERS
        return clock.seconds

    def ps(self) -> float:
        """The command, in a process of its own."""
        if self.made < LISTED:
            self.make(LISTED - self.made)
            self.made = LISTED
        with Clock() as clock:
            self.list()
        return clock.seconds


class Overlaykit(Runner):
    name = "overlaykit"

    def prepare(self, changes: Changes | None, stack: ExitStack) -> None:
        with Store(self.folder / "store") as store:
            store.load(self.layout)
            if changes is None:
                return
            container = store.create(NAME, name="changed")
            changes.make(container.mount())
            container.unmount()

    def apply(self) -> float:
        """Store.unpack of the loaded image: every layer from its blob into a directory, both digests verified."""
        with self.place() as place, Store(place / "store") as store:
            image = store.load(self.layout)[0]
            with Clock() as clock:
                store.unpack(image)
        return clock.seconds

    def load(self) -> float:
        with self.place() as place, Clock() as clock, Store(place / "store") as store:
            store.unpack(store.load(self.archive)[0])
        return clock.seconds

    def save(self) -> float:
        with self.place() as place, Clock() as clock, Store(self.folder / "store") as store:
            store.image(NAME).save(place / "archive.tar", names=[NAME])
        return clock.seconds

    def diff(self) -> float:
        with Clock() as clock, Store(self.folder / "store") as store:
            changes = store.container("changed").diff()
        assert len(changes) >= 6_000
        return clock.seconds

    def commit(self) -> float:
        with Store(self.folder / "store") as store:
            with Clock() as clock:
                store.container("changed").commit("committed:latest")
            store.remove_image("committed:latest")
        return clock.seconds

    def make(self, count: int) -> None:
        with Store(self.folder / "store") as store:
            for _ in range(count):
                store.create(NAME)

    def list(self) -> None:
        run(*COMMAND, "--root", self.folder / "store", "ps", "--all")


class Tar(Tool):
    name = "tar"

    def apply(self) -> float:
        """The layers one after another into directories of their own; nothing is verified."""
        with self.place() as place, Clock() as clock:
            for number, layer in enumerate(self.image.layers):
                target = place / str(number)
                target.mkdir()
                blob = self.layout / "blobs" / layer.digest.algorithm / layer.digest.encoded
                how = {"gzip": ["--gzip"], "zstd": ["--zstd"]}.get(layer.media_type.rpartition("+")[2], [])
                run("tar", "-xp", "--numeric-owner", *how, "--file", blob, "--directory", target)
        return clock.seconds


class DockerTool(Runner):
    name = "docker"
    docker: Docker
    container: str

    def prepare(self, changes: Changes | None, stack: ExitStack) -> None:
        self.docker = stack.enter_context(docker_daemon())
        self.docker("load", "--quiet", "--input", self.archive)
        if changes is None:
            return
        self.container = self.docker("create", NAME, "true").strip()
        data = json.loads(self.docker("inspect", "--format", "{{json .GraphDriver.Data}}", self.container))
        merged = self.folder / "merged"
        merged.mkdir()
        lowers = data["LowerDir"].split(":")[::-1]
        with mounted(lowers, data["UpperDir"], data["WorkDir"], merged):
            changes.make(merged)

    def load(self) -> float:
        self.docker("rmi", "--force", "committed", NAME, check=False)
        with docker_daemon() as docker, Clock() as clock:
            docker("load", "--quiet", "--input", self.archive)
        return clock.seconds

    def save(self) -> float:
        with self.place() as place, Clock() as clock:
            self.docker("save", "--output", place / "archive.tar", NAME)
        return clock.seconds

    def diff(self) -> float:
        with Clock() as clock:
            self.docker("diff", self.container)
        return clock.seconds

    def commit(self) -> float:
        """Into a layer directory; Docker makes no tar and compresses nothing here."""
        with Clock() as clock:
            self.docker("commit", self.container, "committed")
        self.docker("rmi", "committed")
        return clock.seconds

    def make(self, count: int) -> None:
        for _ in range(count):
            self.docker("create", NAME, "true")

    def list(self) -> None:
        self.docker("ps", "--all")


class PodmanTool(Runner):
    name = "podman"

    def prepare(self, changes: Changes | None, stack: ExitStack) -> None:
        self.podman = stack.enter_context(podman_store())
        self.podman("load", "--quiet", "--input", self.archive)
        if changes is None:
            return
        self.container = self.podman("create", NAME, "true").strip()
        changes.make(Path(self.podman("mount", self.container).strip()))
        self.podman("umount", self.container)

    def apply(self) -> float:
        """podman pull oci: into an empty store."""
        with podman_store() as podman, Clock() as clock:
            podman("pull", "--quiet", f"oci:{self.layout}")
        return clock.seconds

    def load(self) -> float:
        with podman_store() as podman, Clock() as clock:
            podman("load", "--quiet", "--input", self.archive)
        return clock.seconds

    def save(self) -> float:
        with self.place() as place, Clock() as clock:
            self.podman("save", "--quiet", "--output", place / "archive.tar", NAME)
        return clock.seconds

    def diff(self) -> float:
        with Clock() as clock:
            self.podman("diff", self.container)
        return clock.seconds

    def commit(self) -> float:
        with Clock() as clock:
            self.podman("commit", "--quiet", self.container, "committed")
        self.podman("rmi", "committed")
        return clock.seconds

    def make(self, count: int) -> None:
        for _ in range(count):
            self.podman("create", NAME, "true")

    def list(self) -> None:
        self.podman("ps", "--all")


class Umoci(Tool):
    name = "umoci"

    def prepare(self, changes: Changes | None, stack: ExitStack) -> None:
        if changes is None:
            return
        shutil.copytree(self.layout, self.folder / "image")
        run("umoci", "unpack", "--image", f"{self.folder}/image:latest", self.folder / "bundle")
        changes.make(self.folder / "bundle/rootfs")

    def apply(self) -> float:
        """umoci unpack: one merged tree."""
        with self.place() as place, Clock() as clock:
            run("umoci", "unpack", "--image", f"{self.layout}:latest", place / "bundle")
        return clock.seconds

    def commit(self) -> float:
        """umoci repack."""
        with Clock() as clock:
            run("umoci", "repack", "--image", f"{self.folder}/image:committed", self.folder / "bundle")
        run("umoci", "rm", "--image", f"{self.folder}/image:committed")
        run("umoci", "gc", "--layout", self.folder / "image")
        return clock.seconds


class Skopeo(Tool):
    name = "skopeo"

    def save(self) -> float:
        """skopeo copy of the layout into a docker-archive."""
        with self.place() as place, Clock() as clock:
            run(
                "skopeo", "--insecure-policy", "copy", "--quiet", f"oci:{self.layout}", f"docker-archive:{place}/archive.tar"
            )
        return clock.seconds

    def load(self) -> float:
        """skopeo copy of the archive into a layout: nothing is unpacked."""
        with self.place() as place, Clock() as clock:
            skopeo_copy(f"docker-archive:{self.archive}", f"oci:{place}/layout")
        return clock.seconds


# As it is installed, or from here.
COMMAND = [found] if (found := shutil.which("overlaykit")) else [sys.executable, "-m", "overlaykit"]
TOOLS: tuple[type[Tool], ...] = (Overlaykit, Tar, DockerTool, PodmanTool, Umoci, Skopeo)


def missing(tool: type[Tool]) -> str:
    """Why the tool cannot be measured here, or nothing."""
    if tool is Overlaykit:
        return ""
    program = {"docker": "dockerd"}.get(tool.name, tool.name)
    found = shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    return "" if found else f"{program} is not installed"
