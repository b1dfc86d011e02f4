"""Commands about images: load, import, images, history, tag, rmi, save."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from overlaykit.cli.output import (
    ago,
    json_option,
    no_trunc_option,
    print_json,
    print_table,
    quiet_option,
    shortened,
    size,
    with_store,
)
from overlaykit.cli.progress import progress_bar
from overlaykit.oci import Reference
from overlaykit.oci.saving import FORMATS
from overlaykit.store import Store, StoredImage

platform_option = click.option("--platform", metavar="OS/ARCH", help="Choose this platform, such as linux/arm64.")
compression_option = click.option(
    "--compression", default="gzip", show_default=True, metavar="HOW", help="none, gzip, zstd, or with a level: zstd-19."
)
change_option = click.option(
    "-c", "--change", "changes", multiple=True, metavar="LINE", help="A Dockerfile instruction, such as 'CMD [\"sh\"]'."
)


@click.command("load")
@click.argument("file", type=click.Path())
@platform_option
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
@json_option
@with_store
def load_command(store: Store, file: str, platform: str | None, quiet: bool, as_json: bool) -> None:
    """Load images from a file or directory.

    FILE is what `docker save` or `podman save` wrote, an OCI archive, or an OCI layout directory; compressed or not. Every
    digest is verified. All of it is loaded, or nothing.

    \b
    docker save debian:bookworm -o debian.tar
    overlaykit load debian.tar
    """
    with progress_bar(quiet=quiet) as progress:
        images = store.load(file, platform=platform, progress=progress)
    if as_json:
        print_json([facts(image) for image in images])
        return
    for image in images:
        for tag in image.tags:
            click.echo(f"Loaded image: {tag}")
        if not image.names:
            click.echo(f"Loaded image ID: {image.id}")


@click.command("import")
@click.argument("source", type=click.Path(allow_dash=True))
@click.argument("name")
@change_option
@click.option("-m", "--message", help="What the history says about it.")
@platform_option
@compression_option
@json_option
@with_store
def import_command(
    store: Store,
    source: str,
    name: str,
    changes: tuple[str, ...],
    message: str | None,
    platform: str | None,
    compression: str,
    as_json: bool,
) -> None:
    """Make a base image of a root filesystem.

    SOURCE is a tar, plain or compressed, a directory, or - for a tar on standard input. Prints the image's id.

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
@click.option("--digests", is_flag=True, help="Show digests too.")
@quiet_option
@no_trunc_option
@json_option
@with_store
def images_command(store: Store, name: str | None, digests: bool, quiet: bool, no_trunc: bool, as_json: bool) -> None:
    """List images, the newest first; with NAME those of that repository or tag.

    SIZE is what the image's blobs take, compressed as they are kept.

    \b
    overlaykit images
    overlaykit images --quiet debian
    """
    rows = [(image, tag) for image in store.images() for tag in image.tags or [""] if _matches(tag, name)]
    if as_json:
        print_json([facts(image) for image in dict.fromkeys(image for image, _ in rows)])
    elif quiet:
        for id in dict.fromkeys(_id(image, no_trunc) for image, _ in rows):
            click.echo(id)
    else:
        header = ["REPOSITORY", "TAG", *(["DIGEST"] if digests else []), "IMAGE ID", "CREATED", "SIZE"]
        print_table(header, [_image_row(image, tag, digests, no_trunc) for image, tag in rows])


def _matches(tag: str, name: str | None) -> bool:
    if name is None or not tag:
        return name is None
    wanted = Reference.parse(name)
    found = Reference.parse(tag)
    return found.name == wanted.name and wanted.tag in (None, found.tag)


def _image_row(image: StoredImage, tag: str, digests: bool, no_trunc: bool) -> list[str]:
    repository, _, label = (tag or "<none>:<none>").rpartition(":")
    digest = [image.digest] if digests else []
    return [repository, label, *digest, _id(image, no_trunc), ago(image.created), size(image.size)]


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
@click.argument("image")
@quiet_option
@no_trunc_option
@json_option
@with_store
def history_command(store: Store, image: str, quiet: bool, no_trunc: bool, as_json: bool) -> None:
    """Show how an image came to be, the newest step first, with the layer that each step made.

    \b
    overlaykit history debian:bookworm
    """
    found = store.image(image)
    layers = iter(found.layers)
    steps = [(entry, None if entry.empty_layer else next(layers, None)) for entry in found.history]
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
                }
                for entry, layer in steps
            ]
        )
    elif quiet:
        for digest in (layer.digest for _, layer in steps if layer):
            click.echo(digest if no_trunc else digest.short)
    else:
        header = ["LAYER", "CREATED", "CREATED BY", "SIZE", "COMMENT"]
        rows = []
        for entry, layer in steps:
            made = ("" if layer is None else layer.digest if no_trunc else layer.digest.short) or "<none>"
            by = shortened(" ".join((entry.created_by or "").split()), 45, no_trunc=no_trunc)
            rows.append([made, _when(entry.created), by, size(layer.size if layer else 0), entry.comment or ""])
        print_table(header, rows)


def _when(created: str | None) -> str:
    from datetime import datetime

    try:
        return ago(datetime.fromisoformat(created or ""))
    except ValueError:
        return "N/A"


@click.command("tag")
@click.argument("image")
@click.argument("name")
@with_store
def tag_command(store: Store, image: str, name: str) -> None:
    """Give IMAGE one more NAME[:TAG]. An image that had the name loses it.

    \b
    overlaykit tag debian:bookworm localhost:5000/debian:12
    """
    store.tag(image, name)


@click.command("rmi")
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...")
@click.option("-f", "--force", is_flag=True, help="Also if containers need it, or an id has several names.")
@json_option
@with_store
def rmi_command(store: Store, images: tuple[str, ...], force: bool, as_json: bool) -> None:
    """Remove images by name or id.

    The last name takes the image with it, and all blobs and layers that no other image and no container needs. What came
    free is said last.

    \b
    overlaykit rmi debian:bookworm
    """
    removed = [store.remove_image(image, force=force) for image in images]
    freed = sum(each.freed.size for each in removed)
    if as_json:
        gone = [{"untagged": r.untagged, "deleted": r.image, "blobs": r.freed.blobs} for r in removed]
        print_json({"images": gone, "freed": freed})
        return
    for each in removed:
        for tag in each.untagged:
            click.echo(f"Untagged: {tag}")
        if each.image:
            click.echo(f"Deleted: {each.image}")
        for chain_id in each.freed.snapshots:
            click.echo(f"Deleted: {chain_id}")
    click.echo(f"Total reclaimed space: {size(freed)}")


@click.command("save")
@click.argument("image")
@click.argument("file", type=click.Path(allow_dash=True))
@click.option(
    "--format",
    "form",
    type=click.Choice(FORMATS),
    help="How to write it.  [default: oci-dir into a directory that exists, else docker-archive]",
)
@with_store
def save_command(store: Store, image: str, file: str, form: str | None) -> None:
    """Write an image to a file or directory, for Docker, podman, skopeo and others.

    FILE is - for standard output. A docker-archive is what `docker load` and `podman load` take.

    \b
    overlaykit save mine:1 mine.tar && docker load -i mine.tar
    overlaykit save --format oci-dir mine:1 layout && skopeo copy oci:layout docker://host/mine
    """
    found = store.image(image)
    # Under the name that was asked for; by id, under all.
    names = [name for name, tag in zip(found.names, found.tags, strict=True) if image in (name, tag)]
    if file == "-":
        found.save(sys.stdout.buffer, format=form or FORMATS[0], names=names)
    else:
        found.save(file, format=form or ("oci-dir" if Path(file).is_dir() else FORMATS[0]), names=names)
