"""Commands about images: load, import, images, history, tag, rmi, save."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import click

from overlaykit.cli import completion
from overlaykit.cli.force import forgiven
from overlaykit.cli.listing import FILTERS, listed
from overlaykit.cli.output import (
    ago,
    columns,
    each,
    format_option,
    json_option,
    moment,
    no_trunc_option,
    print_json,
    print_rows,
    quiet_option,
    shortened,
    size,
    with_store,
)
from overlaykit.cli.progress import progress_bar
from overlaykit.errors import OverlaykitError
from overlaykit.oci.digest import copy_stream
from overlaykit.oci.saving import FORMATS
from overlaykit.store import Removed, Store, StoredImage
from overlaykit.store.apparent import layer_sizes

platform_option = click.option("--platform", metavar="OS/ARCH", help="Choose this platform, such as linux/arm64.")
compression_option = click.option(
    "--compression", default="gzip", show_default=True, metavar="HOW", help="none, gzip, zstd, or with a level: zstd-19."
)
change_option = click.option(
    "-c", "--change", "changes", multiple=True, metavar="LINE", help="A Dockerfile instruction, such as 'CMD [\"sh\"]'."
)


@click.command("load")
@click.argument("file", type=click.Path(allow_dash=True), required=False)
@click.option("-i", "--input", "named", type=click.Path(), metavar="FILE", help="The same, as Docker wants it.")
@platform_option
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
@json_option
@with_store
def load_command(
    store: Store, file: str | None, named: str | None, platform: str | None, quiet: bool, as_json: bool
) -> None:
    """Load images from a file, a directory or standard input.

    FILE is what `docker save` or `podman save` wrote, an OCI archive, or an OCI layout directory; compressed or not. Every
    digest is verified. All of it is loaded, or nothing.

    \b
    docker save debian:bookworm -o debian.tar
    overlaykit load -i debian.tar
    docker save debian:bookworm | overlaykit load
    """
    if file and named:
        raise click.UsageError("FILE and --input FILE: say one of them")
    source = file or named or "-"
    with progress_bar(quiet=quiet) as progress, _seekable(store, source) as path:
        images = store.load(path, platform=platform, progress=progress)
    if as_json:
        print_json([facts(image) for image in images])
        return
    for image in images:
        for tag in image.tags:
            click.echo(f"Loaded image: {tag}")
        if not image.names:
            click.echo(f"Loaded image ID: {image.id}")


@contextmanager
def _seekable(store: Store, source: str) -> Iterator[str]:
    """A path under which `source` can be read in any order: standard input, for one, is kept in the store meanwhile."""
    if source != "-":
        yield source
        return
    if sys.stdin.isatty():
        raise click.UsageError("what to load? Give a FILE, or standard input that is no terminal")
    with tempfile.TemporaryFile(dir=store.root / "ingest") as kept:
        copy_stream(sys.stdin.buffer, kept)
        kept.flush()
        path = f"/proc/self/fd/{kept.fileno()}"
        try:
            yield path
        except OverlaykitError as e:
            e.args = (str(e).replace(path, "standard input"), *e.args[1:])
            raise


@click.command("import")
@click.argument("source", type=click.Path(allow_dash=True))
@click.argument("name", required=False)
@change_option
@click.option("-m", "--message", help="What the history says about it.")
@platform_option
@compression_option
@json_option
@with_store
def import_command(
    store: Store,
    source: str,
    name: str | None,
    changes: tuple[str, ...],
    message: str | None,
    platform: str | None,
    compression: str,
    as_json: bool,
) -> None:
    """Make a base image of a root filesystem.

    SOURCE is a tar, plain or compressed, a directory, or - for a tar on standard input. Prints the image's id.
    Without NAME the image has none.

    \b
    mmdebstrap --variant=minbase bookworm rootfs.tar
    overlaykit import rootfs.tar debian:bookworm --change 'CMD ["bash"]'
    """
    with progress_bar() as progress:
        image = store.import_rootfs(
            sys.stdin.buffer if source == "-" else source,
            name,
            changes=changes,
            message=message,
            platform=platform,
            compression=compression,
            progress=progress,
        )
    print_json(facts(image)) if as_json else click.echo(image.id)


@click.command("images")
@click.argument("name", required=False)
@click.option("-a", "--all", is_flag=True, hidden=True)  # Docker hides images in between, which are not kept here
@click.option("-f", "--filter", "filters", multiple=True, metavar="KEY=VALUE", help=f"Only some: {', '.join(FILTERS)}.")
@click.option("--digests", is_flag=True, help="Show digests too.")
@quiet_option
@no_trunc_option
@format_option
@json_option
@with_store
def images_command(
    store: Store,
    name: str | None,
    all: bool,
    filters: tuple[str, ...],
    digests: bool,
    quiet: bool,
    no_trunc: bool,
    form: str | None,
    as_json: bool,
) -> None:
    """List images, the newest first; with NAME those of that repository or tag, or that pattern.

    SIZE is what the files of all layers hold, as Docker counts it; `df` says what the blobs and layers take on disk.

    \b
    overlaykit images
    overlaykit images --quiet debian
    overlaykit rmi $(overlaykit images --quiet --filter dangling=true)
    overlaykit images 'registry.example/*/*'
    overlaykit images --format '{{.Repository}}:{{.Tag}} {{.Size}}'
    """
    rows = listed(store, name, filters)
    if as_json:
        images = dict.fromkeys(image for image, _ in rows)
        print_json([facts(image) | {"unpacked_size": store.image_size(image)} for image in images])
    elif quiet:
        for id in dict.fromkeys(_id(image, no_trunc) for image, _ in rows):
            click.echo(id)
    else:
        usual = ["Repository", "Tag", *(["Digest"] if digests else []), "ID", "CreatedSince", "Size"]
        sizes = {image.digest: store.image_size(image) for image, _ in rows}
        fields = [_image_fields(image, tag, sizes[image.digest], digests, no_trunc) for image, tag in rows]
        print_rows(form or "table", fields, IMAGE_TITLES, columns(*usual))


IMAGE_TITLES = {"ID": "IMAGE ID", "Repository": "REPOSITORY", "Tag": "TAG", "Digest": "DIGEST", "Size": "SIZE"}
IMAGE_TITLES |= {"CreatedSince": "CREATED", "CreatedAt": "CREATED AT"}


def _image_fields(image: StoredImage, tag: str, held: int | None, digests: bool, no_trunc: bool) -> dict[str, str]:
    """What a template may say of one image under one name; Docker's names."""
    repository, _, label = (tag or "<none>:<none>").rpartition(":")
    return {
        "CreatedAt": moment(image.created),
        "CreatedSince": ago(image.created),
        "Digest": image.digest if digests else "<none>",
        "ID": _id(image, no_trunc),
        "Repository": repository,
        "Size": "N/A" if held is None else size(held),
        "Tag": label,
    }


def _id(image: StoredImage, no_trunc: bool) -> str:
    return image.id if no_trunc else image.id.short


def facts(image: StoredImage) -> dict[str, Any]:
    """What programs get to know of an image."""
    return {
        "id": image.id,
        "digest": image.digest,
        "names": image.tags,
        "created": image.config.created,
        "size": image.size,
        "platform": str(image.platform),
        "layers": [layer.digest for layer in image.layers],
        "diff_ids": list(image.diff_ids),
    }


@click.command("history")
@click.argument("image", shell_complete=completion.images)
@quiet_option
@no_trunc_option
@format_option
@json_option
@with_store
def history_command(store: Store, image: str, quiet: bool, no_trunc: bool, form: str | None, as_json: bool) -> None:
    """Show how an image came to be, the newest step first, with the layer that each step made.

    \b
    overlaykit history debian:bookworm
    overlaykit history debian:bookworm --format '{{.Size}} {{.CreatedBy}}' --no-trunc
    """
    found = store.image(image)
    layers = iter(zip(found.layers, layer_sizes(store, found), strict=True))
    steps = [(entry, *((None, 0) if entry.empty_layer else next(layers, (None, 0)))) for entry in found.history]
    steps.reverse()
    if as_json:
        print_json(
            [
                {
                    "created": entry.created,
                    "created_by": entry.created_by,
                    "author": entry.author,
                    "comment": entry.comment,
                    "layer": layer.digest if layer else None,
                    "diff_id": layer.diff_id if layer else None,
                    "size": layer.size if layer else 0,
                    "unpacked_size": held,
                }
                for entry, layer, held in steps
            ]
        )
    elif quiet:
        for digest in (layer.digest for _, layer, _ in steps if layer):
            click.echo(digest if no_trunc else digest.short)
    else:
        rows = [
            {
                "Comment": entry.comment or "",
                "CreatedAt": entry.created or "",
                "CreatedBy": shortened(" ".join((entry.created_by or "").split()), 45, no_trunc=no_trunc),
                "CreatedSince": ago(_moment(entry.created)),
                # Docker's ids of the images in between are gone; the first is the image's.
                "ID": _id(found, no_trunc) if number == 0 else "<missing>",
                "Layer": "<none>" if layer is None else layer.digest if no_trunc else layer.digest.short,
                "Size": size(held),
            }
            for number, (entry, layer, held) in enumerate(steps)
        ]
        print_rows(form or "table", rows, HISTORY_TITLES, columns("Layer", "CreatedSince", "CreatedBy", "Size", "Comment"))


HISTORY_TITLES = {"ID": "IMAGE", "Layer": "LAYER", "CreatedSince": "CREATED", "CreatedAt": "CREATED AT"}
HISTORY_TITLES |= {"CreatedBy": "CREATED BY", "Size": "SIZE", "Comment": "COMMENT"}


def _moment(created: str | None) -> datetime | None:
    try:
        return datetime.fromisoformat(created or "")
    except ValueError:
        return None


@click.command("tag")
@click.argument("image", shell_complete=completion.images)
@click.argument("name")
@with_store
def tag_command(store: Store, image: str, name: str) -> None:
    """Give IMAGE one more NAME[:TAG]. An image that had the name loses it.

    \b
    overlaykit tag debian:bookworm localhost:5000/debian:12
    """
    store.tag(image, name)


@click.command("rmi")
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...", shell_complete=completion.images)
@click.option(
    "-f",
    "--force",
    is_flag=True,
    help="Also if containers need it, or an id has several names; and no error if it is not there.",
)
@json_option
@with_store
def rmi_command(store: Store, images: tuple[str, ...], force: bool, as_json: bool) -> None:
    """Remove images by name or id.

    The last name takes the image with it, and all blobs and layers that no other image and no container needs. What came
    free is said last.

    \b
    overlaykit rmi debian:bookworm
    """
    removed: list[Removed] = []

    def remove(image: str) -> None:
        with forgiven(when=force):
            removed.append(store.remove_image(image, force=force))

    try:
        each(images, remove)
    finally:
        freed = sum(r.freed.size for r in removed)
        if as_json:
            gone = [{"untagged": r.untagged, "deleted": r.image, "blobs": r.freed.blobs} for r in removed]
            print_json({"images": gone, "freed": freed})
        elif removed:
            _print_removed(removed)
            click.echo(f"Total reclaimed space: {size(freed)}")


def _print_removed(removed: list[Removed]) -> None:
    for one in removed:
        for tag in one.untagged:
            click.echo(f"Untagged: {tag}")
        if one.image:
            click.echo(f"Deleted: {one.image}")
        for chain_id in one.freed.snapshots:
            click.echo(f"Deleted: {chain_id}")


@click.command("save")
@click.argument("image", shell_complete=completion.images)
@click.argument("file", type=click.Path(allow_dash=True), required=False)
@click.option("-o", "--output", "named", type=click.Path(), metavar="FILE", help="The same, as Docker wants it.")
@click.option(
    "--format",
    "form",
    type=click.Choice(FORMATS),
    help="How to write it.  [default: oci-dir into a directory that exists, else docker-archive]",
)
@with_store
def save_command(store: Store, image: str, file: str | None, named: str | None, form: str | None) -> None:
    """Write an image to a file or directory, for Docker, podman, skopeo and others.

    Without FILE, or with -, to standard output. A docker-archive is what `docker load` and `podman load` take.

    \b
    overlaykit save mine:1 -o mine.tar && docker load -i mine.tar
    overlaykit save mine:1 | docker load
    overlaykit save --format oci-dir mine:1 layout && skopeo copy oci:layout docker://host/mine
    """
    if file and named:
        raise click.UsageError("FILE and --output FILE: say one of them")
    found = store.image(image)
    # Under the name that was asked for; by id, under all.
    names = [name for name, tag in zip(found.names, found.tags, strict=True) if image in (name, tag)]
    target = file or named or "-"
    if target == "-":
        if sys.stdout.isatty():
            raise click.UsageError("an image is nothing for a terminal: give a FILE, or a pipe")
        found.save(sys.stdout.buffer, format=form or FORMATS[0], names=names)
    else:
        found.save(target, format=form or ("oci-dir" if Path(target).is_dir() else FORMATS[0]), names=names)
