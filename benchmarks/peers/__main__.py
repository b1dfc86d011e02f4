"""What overlaykit and the tools that are installed need for the same things with one image, in turn:

    python benchmarks/peers [OCI-DIRECTORY] [--only apply,commit] [--tools docker,tar] [--rounds 3]

Without an image one is made of Debian with compilers and of Python packages (image.py), and kept for the next time; for
create and ps alone a small one will do. `ps` starts the overlaykit that is installed, as it does docker and podman. All
of it is done in memory (/dev/shm), the image included, so that no disk is measured: 16 GB for all operations at once.
Prints seconds, medians of interleaved rounds, and overlaykit's ratio to each; what is not installed is said.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "tests"))  # the peers live there

import image
import tools
from peers import new_folder, skopeo_copy

from overlaykit import open_image

IN_MEMORY = Path("/dev/shm")
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "overlaykit"


def chosen(text: str, known: list[str]) -> list[str]:
    names = text.split(",") if text else known
    if unknown := [name for name in names if name not in known]:
        sys.exit(f"{', '.join(unknown)}: unknown; one of {', '.join(known)}")
    return names


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("image", type=Path, nargs="?", help="an OCI layout with one image; made if not given")
    parser.add_argument("--compression", default="gzip-6", help="of the image that is made: gzip-6, zstd, none")
    parser.add_argument("--only", default="", help=f"with commas: {', '.join(tools.OPERATIONS)}")
    parser.add_argument("--tools", default="", help=f"with commas: {', '.join(tool.name for tool in tools.TOOLS)}")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    operations = chosen(options.only, list(tools.OPERATIONS))
    names = chosen(options.tools, [tool.name for tool in tools.TOOLS])
    layout = options.image
    if layout is None and set(operations) - tools.ANY_IMAGE:
        layout = CACHE / f"benchmark-image-{options.compression}"
        if not layout.exists():
            image.make(layout, options.compression)
    parent = IN_MEMORY if os.access(IN_MEMORY, os.W_OK) else Path(tempfile.gettempdir())
    with new_folder(parent, "peers") as place, ExitStack() as stack:
        if layout is None:
            layout = place / "small"
            image.make_small(layout)
        measure(place, layout, operations, names, options.rounds, stack)


def measure(place: Path, source: Path, operations: list[str], names: list[str], rounds: int, stack: ExitStack) -> None:
    """Every operation of every tool, `rounds` times in turn."""
    layout, archive = place / "image", place / "archive.tar"
    given = open_image(source)
    given.save(layout, format="oci-dir", names=[image.NAME])
    whole = open_image(layout)
    if set(operations) - {"apply"}:
        plain_archive(layout, archive)
    count = len(whole.layers)
    print(f"{sum(len(layer.tree()) for layer in whole.layers):,} entries in {count} layer{'s' * (count > 1)},", end=" ")
    print(f"{whole.size:,} bytes of blobs, {whole.layers[0].media_type}, in {place.parent}")
    if "ps" in operations:
        print(f"ps of overlaykit is {' '.join(tools.COMMAND)}")
    ready: list[tools.Tool] = []
    changes = tools.Changes.of(whole) if tools.CHANGED & set(operations) else None
    for kind in tools.TOOLS:
        if kind.name not in names and kind is not tools.Overlaykit:
            continue
        if reason := tools.missing(kind):
            print(f"not run: {reason}")
            continue
        folder = place / kind.name
        folder.mkdir()
        ready.append(kind(layout, archive, whole, folder))
    prepared = False
    for operation in operations:
        if operation not in ("apply", "load") and not prepared:
            prepared = True
            for tool in ready:  # only now: what stands in memory takes it from those who unpack
                tool.prepare(changes, stack)
        able = [tool for tool in ready if hasattr(tool, operation)]
        seconds: dict[str, list[float]] = {tool.name: [] for tool in able}
        for number in range(rounds * tools.REPEATED.get(operation, 1)):
            for tool in able if number % 2 == 0 else reversed(able):
                seconds[tool.name].append(getattr(tool, operation)())
        table(operation, seconds)


def plain_archive(layout: Path, archive: Path) -> None:
    """The image as Docker before 25 saves and loads it: its layers as tars that are not compressed."""
    if shutil.which("skopeo") is None:
        open_image(layout).save(archive, names=[image.NAME])
        return
    target = f"docker-archive:{archive}:{image.NAME}"
    skopeo_copy(f"oci:{layout}", target)


def table(operation: str, seconds: dict[str, list[float]]) -> None:
    ours = statistics.median(seconds[tools.Overlaykit.name])
    for name, times in seconds.items():
        median = statistics.median(times)
        print(f"{operation:8}{name:12}{median:9.3f} s  ({min(times):.3f} to {max(times):.3f})", end="")
        print("" if name == tools.Overlaykit.name else f"   overlaykit {ours / median:.3f}x of it", flush=True)


if __name__ == "__main__":
    main()
