"""overlaykit tour: the main job on real files, step by step, each with what it cost and where to look."""

from __future__ import annotations

import os
import stat
import sys
import sysconfig
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

import click

from overlaykit.cli.output import open_store, shown, size
from overlaykit.errors import IntegrityError
from overlaykit.oci import open_image, validate
from overlaykit.store import Container, Store, StoredImage
from overlaykit.tree import Kind, Tree, merge

MOST = 24 << 20  # bytes of the standard library to take: enough to be real, little enough to take a second
LEFT_OUT = {"__pycache__", "site-packages", "dist-packages", "test", "tests", "idlelib", "ensurepip", "lib2to3"}
COPIED_UP = 1 << 20  # bytes that the file to be copied up has at most


@click.command("tour")
@click.option("--image", "image_file", metavar="FILE", type=click.Path(exists=True), help="An image file of your own.")
@click.option("--clean", is_flag=True, help="Remove everything at the end.")
@click.pass_context
def tour_command(ctx: click.Context, image_file: str | None, clean: bool) -> None:
    """Show the main job on real files: no network, no root, no arguments.

    A base image is made of this Python's standard library (or loaded from FILE); an image that inherits from it; two
    containers that share all layers; files are written, changed and deleted; then diff, commit, save, and a check that what
    was saved is what was there. All of it goes to a new folder, or to --root.

    \b
    overlaykit tour
    overlaykit --root ./tour tour --image debian.tar
    """
    root = Path(os.path.realpath(ctx.obj or tempfile.mkdtemp(prefix="overlaykit-tour-")))
    if (root / "store.db").exists():
        raise click.UsageError(f"{root} is a store already; the tour wants a folder of its own")
    tour = Tour(root)
    try:
        with open_store(str(root)) as store:
            tour.run(store, image_file)
    finally:
        if clean:
            from overlaykit.store.disk import remove_tree

            remove_tree(root)
    if clean:
        click.echo(f"\nDone, and {root} is removed again.")
    else:
        click.echo(f"\nAll of it is in {root}; when you have looked around: rm -r {root}")
        click.echo(f"  overlaykit --root {root} ps")
        click.echo(f"  overlaykit --root {root} diff one")
        click.echo(f"  overlaykit --root {root} history tour/app:2")


@dataclass
class Step:
    """What a step has to tell: filled in while it runs."""

    what: str = ""
    size: int = 0
    where: str = ""


@dataclass
class Tour:
    """The steps, in their order."""

    root: Path
    number: int = field(default=0)

    def run(self, store: Store, image_file: str | None) -> None:
        click.echo(f"in {self.root}:\n")
        click.echo(f"{'':>2} {'STEP':<10} {'BYTES':>7} {'MS':>5}   WHAT HAPPENED -> WHERE TO LOOK")
        base = self.load(store, image_file) if image_file else self.base(store)
        child = self.child(store, base)
        one, two = self.containers(store, child)
        victim, copied = choose(one.lower())
        self.write(store, one)
        if copied:
            self.copy_up(store, one, two, copied)
        if victim:
            self.delete(store, one, two, victim)
        self.diff(one)
        image = self.commit(store, one, child)
        self.verify(store, one, image, self.save(image))

    # --- images -------------------------------------------------------------------------------------------------------

    def base(self, store: Store) -> StoredImage:
        with self.step("base image") as step:
            archive, count, content = standard_library()
            image = store.import_rootfs(archive, "tour/python:1", message="the standard library")
            step.what = f"{count:,} files of Python's standard library ({size(content)}) are one layer"
            step.size, step.where = image.size, blob(image)
        return image

    def load(self, store: Store, path: str) -> StoredImage:
        with self.step("load") as step:
            image = store.load(path)[0]
            step.what = f"{image}: {len(image.layers)} layers, every digest verified, every entry parsed"
            step.size, step.where = image.size, blob(image)
        return image

    def child(self, store: Store, base: StoredImage) -> StoredImage:
        with self.step("inherit") as step:
            builder = store.create(base, name="builder")
            builder.fs.makedirs("/srv/app", exist_ok=True)
            with builder.fs.open("/srv/app/hello.py", "w") as file:
                file.write("print('hello from a layer')\n")
            image = builder.commit("tour/app:1", changes=["WORKDIR /srv/app", 'CMD ["python3", "hello.py"]'])
            builder.remove()
            shared = sum(layer.size for layer in base.layers)
            step.what = f"tour/app:1 adds one layer to {base}; {size(shared)} below it are shared, not copied"
            step.size, step.where = image.layers[-1].size, blob(image)
        return image

    def containers(self, store: Store, image: StoredImage) -> tuple[Container, Container]:
        with self.step("create") as step:
            one, two = store.create(image, name="one"), store.create(image, name="two")
            own = sum(store.snapshots.usage(container.id).size for container in (one, two))
            layers = len(store.snapshots.lowers(one.id))
            step.what = f"containers one and two: an empty writable layer each on the same {layers} directories"
            step.size, step.where = own, self.inside(store.snapshots.fs(one.id))
        return one, two

    # --- changes ------------------------------------------------------------------------------------------------------

    def write(self, store: Store, one: Container) -> None:
        with self.step("write") as step:
            data = b"written in process, without a mount\n"
            with one.fs.open("/srv/app/notes.txt", "wb") as file:
                file.write(data)
            step.what = "one: a new file, /srv/app/notes.txt, goes to its writable layer"
            step.size, step.where = len(data), self.inside(store.snapshots.fs(one.id) / "srv/app/notes.txt")

    def copy_up(self, store: Store, one: Container, two: Container, path: str) -> None:
        with self.step("copy-up") as step:
            with one.fs.open(path, "ab") as file:
                file.write(b"# one line more\n")
            grown = one.fs.stat(path).st_size - two.fs.stat(path).st_size
            check(grown == 16, f"{path} has {grown} bytes more in one than in two, not 16")
            step.what = f"one: a line added to {shorten(path, 30)}, which is copied up; two has it as it was"
            step.size, step.where = one.fs.stat(path).st_size, self.inside(Path(f"{store.snapshots.fs(one.id)}{path}"))

    def delete(self, store: Store, one: Container, two: Container, path: str) -> None:
        with self.step("delete") as step:
            one.fs.unlink(path)
            check(not one.fs.lexists(path) and two.fs.lexists(path), f"{path} is not gone from one only")
            whiteout = Path(f"{store.snapshots.fs(one.id)}{path}")
            kind = "a device 0:0" if stat.S_ISCHR(whiteout.lstat().st_mode) else "a marked file"
            step.what = f"one: {shorten(path, 36)} is hidden by a whiteout, {kind}; two has it"
            step.where = self.inside(whiteout)

    def diff(self, one: Container) -> None:
        with self.step("diff") as step:
            changes = one.diff()
            counts = {kind: sum(change.kind == kind for change in changes) for kind in "ACD"}
            step.what = (
                f"{counts['A']} added, {counts['C']} changed, {counts['D']} deleted, found in its writable layer alone"
            )
            step.size = sum(change.size_after for change in changes)
            step.where = "$ overlaykit diff one"

    # --- handing over -------------------------------------------------------------------------------------------------

    def commit(self, store: Store, one: Container, child: StoredImage) -> StoredImage:
        with self.step("commit") as step:
            image = one.commit("tour/app:2", message="the tour's changes")
            step.what = f"tour/app:2 has {len(image.layers)} layers, {len(child.layers)} of them those of tour/app:1"
            step.size, step.where = image.layers[-1].size, blob(image)
        return image

    def save(self, image: StoredImage) -> Path:
        target = self.root / "tour.tar"
        with self.step("save") as step:
            image.save(target)
            step.what = "a docker-archive of tour/app:2, for: docker load --input"
            step.size, step.where = target.stat().st_size, target.name
        return target

    def verify(self, store: Store, one: Container, image: StoredImage, archive: Path) -> None:
        with self.step("verify") as step:
            saved = open_image(archive)
            for problem in validate(saved):
                raise problem
            lower = one.lower()
            here = merge([lower, one.changeset(lower, one.upper())])
            there = merge([layer.tree() for layer in saved.layers])
            check(in_seconds(here) == in_seconds(there), "the saved image is not what container one shows")
            step.what = f"every digest in the archive is right; its {len(there):,} entries are those of container one"
            step.size, step.where = archive.stat().st_size, "$ overlaykit inspect tour/app:2"

    # --- telling ------------------------------------------------------------------------------------------------------

    @contextmanager
    def step(self, title: str) -> Iterator[Step]:
        """Time what happens inside, and print one line about it."""
        step = Step()
        start = time.perf_counter()
        yield step
        spent = (time.perf_counter() - start) * 1000
        self.number += 1
        told = shown(f"{step.what} -> {step.where}")
        click.echo(f"{self.number:>2} {title:<10} {size(step.size):>7} {spent:>5.0f}   {told}")
        sys.stdout.flush()

    def inside(self, path: Path) -> str:
        """`path` as it is called inside the tour's folder."""
        return str(path.relative_to(self.root))


def blob(image: StoredImage) -> str:
    """Where the image's topmost layer is kept."""
    digest = image.layers[-1].digest
    return f"blobs/{digest.algorithm}/{digest.encoded[:12]}..."


def check(holds: bool, otherwise: str) -> None:
    if not holds:
        raise IntegrityError(f"tour: {otherwise}")


def shorten(path: str, limit: int) -> str:
    return path if len(path) <= limit else "..." + path[3 - limit :]


def in_seconds(tree: Tree) -> Tree:
    """`tree` with times as a layer keeps them, and without what lies outside of what it says."""
    return tree.with_columns(mtime_ns=tree.mtime_ns // 10**9 * 10**9)


def choose(tree: Tree) -> tuple[str | None, str | None]:
    """A file to delete and another to copy up, if there are such: not too large, with one name, and text by its name."""
    files = [
        "/" + entry.path
        for entry in tree
        if entry.kind == Kind.FILE and 1000 < entry.size <= COPIED_UP and entry.hardlink < 0 and not entry.xattrs
    ]
    texts = [path for path in files if path.endswith((".py", ".conf", ".txt", ".sh"))] or files
    if len(texts) < 2:
        return None, texts[0] if texts else None
    return texts[-1], texts[len(texts) // 2]


def standard_library() -> tuple[BytesIO, int, int]:
    """A tar of this Python's standard library as a root filesystem, how many files are in it, and their bytes."""
    source = Path(sysconfig.get_path("stdlib"))
    inside = f"usr/lib/python{sys.version_info.major}.{sys.version_info.minor}"
    out, count, content = BytesIO(), 0, 0
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name in ("usr", "usr/lib", inside, "srv", "tmp"):
            tar.addfile(member(tarfile.TarInfo(name), tarfile.DIRTYPE, 0o1777 if name == "tmp" else 0o755))
        for folder, folders, files in os.walk(source):
            folders[:] = sorted(set(folders) - LEFT_OUT)
            place = f"{inside}/{os.path.relpath(folder, source)}".removesuffix("/.")
            for name in sorted(files):
                path = Path(folder, name)
                if name.endswith(".py") and path.is_file() and content + path.stat().st_size <= MOST:
                    info = tar.gettarinfo(str(path), f"{place}/{name}")
                    info.type, info.linkname = tarfile.REGTYPE, ""
                    info.size = path.stat().st_size
                    with path.open("rb") as file:
                        tar.addfile(member(info, tarfile.REGTYPE, 0o644), file)
                    count, content = count + 1, content + info.size
    out.seek(0)
    return out, count, content


def member(info: tarfile.TarInfo, kind: bytes, mode: int) -> tarfile.TarInfo:
    info.type, info.mode = kind, mode
    info.uid = info.gid = 0
    info.uname = info.gname = ""
    return info
