"""One image onto disk with overlaykit and with the tools that are installed, in turn:

    python benchmarks/peers.py OCI-DIRECTORY

Everything is done in memory (/dev/shm), the image included, so that no disk is measured. GNU tar unpacks the layers one
after another and verifies nothing; podman pulls them into an overlay store of its own; umoci unpacks one merged tree.
Prints seconds and the ratio to each, medians of the rounds; what is not installed is said.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from overlaykit import Image, Store, open_image

IN_MEMORY = "/dev/shm"


def run(*command: str | Path) -> None:
    """Run a tool; what it says is shown only if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{command[0]}: {done.stderr.strip()}")


class Round:
    """What each tool does with the image in `layout`, below an empty folder."""

    def __init__(self, layout: Path, image: Image, folder: Path) -> None:
        self.layout, self.image, self.folder = layout, image, folder

    def overlaykit(self) -> float:
        """Seconds of Store.unpack: every layer from its blob into a directory of its own, both digests verified."""
        with Store(self.folder / "store") as store:
            image = store.load(self.layout)[0]
            began = time.perf_counter()
            store.unpack(image)
            return time.perf_counter() - began

    def overlaykit_load(self) -> float:
        """The same with the load before it, which copies the blobs into the store and verifies them."""
        with Store(self.folder / "store") as store:
            began = time.perf_counter()
            store.unpack(store.load(self.layout)[0])
            return time.perf_counter() - began

    def tar(self) -> float:
        began = time.perf_counter()
        for number, layer in enumerate(self.image.layers):
            target = self.folder / str(number)
            target.mkdir()
            blob = self.layout / "blobs" / layer.digest.algorithm / layer.digest.encoded
            how = {"gzip": ["--gzip"], "zstd": ["--zstd"]}.get(layer.media_type.rpartition("+")[2], [])
            run("tar", "-xp", "--numeric-owner", *how, "--file", blob, "--directory", target)
        return time.perf_counter() - began

    def podman(self) -> float:
        root = self.folder / "root"
        began = time.perf_counter()
        run("podman", "--root", root, "--runroot", self.folder / "run", "pull", f"oci:{self.layout}")
        seconds = time.perf_counter() - began
        subprocess.run(["umount", "--lazy", root / "overlay"], capture_output=True, check=False)
        return seconds

    def umoci(self) -> float:
        began = time.perf_counter()
        run("umoci", "unpack", "--image", f"{self.layout}:latest", self.folder / "bundle")
        return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("image", type=Path, help="an OCI layout with one image, called latest")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    tools: dict[str, Callable[[Round], float]] = {
        "overlaykit": Round.overlaykit,
        "overlaykit load + unpack": Round.overlaykit_load,
    }
    for name, work in {"tar": Round.tar, "podman": Round.podman, "umoci": Round.umoci}.items():
        if shutil.which(name):
            tools[name] = work
        else:
            print(f"not run: {name} is not installed")
    times: dict[str, list[float]] = {name: [] for name in tools}
    with tempfile.TemporaryDirectory(dir=IN_MEMORY if os.access(IN_MEMORY, os.W_OK) else None) as place:
        layout = Path(place) / "image"
        shutil.copytree(options.image, layout)
        image = open_image(layout)
        entries = sum(len(layer.tree()) for layer in image.layers)
        print(f"{entries:,} entries in {len(image.layers)} layers, {image.size:,} bytes of blobs")
        for number in range(options.rounds):
            for name, work in tools.items() if number % 2 == 0 else reversed(tools.items()):
                folder = Path(place) / "round"
                folder.mkdir()
                times[name].append(work(Round(layout, image, folder)))
                run("rm", "-rf", folder)
    ours = statistics.median(times["overlaykit"])
    for name, seconds in times.items():
        median = statistics.median(seconds)
        spread = f"{min(seconds):.2f} to {max(seconds):.2f}"
        print(f"{name:26}{median:8.2f} s ({spread}), overlaykit {ours / median:.3f}x of it")


if __name__ == "__main__":
    main()
