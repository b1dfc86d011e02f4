"""Commands about volumes: volume create, ls, inspect, rm, prune, clone, snapshot, rename, export, import, reseed."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Any

import click

from overlaykit.cli import completion
from overlaykit.cli.filters import TRUTH, parsed
from overlaykit.cli.force import confirmed
from overlaykit.cli.output import (
    columns,
    each,
    format_option,
    json_option,
    print_inspected,
    print_json,
    print_rows,
    quiet_option,
    shown,
    size,
    with_store,
)
from overlaykit.errors import InvalidReference
from overlaykit.store import Store
from overlaykit.store.labels import has_labels
from overlaykit.store.volume import Volume

FILTERS = ("dangling", "driver", "label", "name")
TITLES = {"Name": "VOLUME NAME", "Driver": "DRIVER", "Scope": "SCOPE", "Mountpoint": "MOUNTPOINT", "Labels": "LABELS"}
TITLES |= {"Links": "LINKS", "Size": "SIZE"}

live_option = click.option("--live", is_flag=True, help="Also while it is being used, and files may be half written.")
driver_option = click.option("-d", "--driver", default="", help="Who keeps it: local, encrypted, remote.  [default: local]")
options_option = click.option("-o", "--opt", "options", multiple=True, metavar="KEY=VALUE", help="An option of its driver.")
labels_option = click.option("-l", "--label", "labels", multiple=True, metavar="KEY[=VALUE]", help="Say something about it.")


@click.group("volume")
def volume_command() -> None:
    """Manage volumes: directories that outlast containers and are shared by them.

    \b
    overlaykit volume create data
    overlaykit create debian:bookworm --name box -v data:/var/lib/data
    overlaykit volume ls
    """


def pairs(texts: tuple[str, ...]) -> dict[str, str]:
    """KEY=VALUE texts as a dict; a KEY alone has an empty value."""
    return {key: value for key, _, value in (text.partition("=") for text in texts)}


@volume_command.command("create")
@click.argument("name", required=False)
@driver_option
@options_option
@labels_option
@with_store
def create(store: Store, name: str | None, driver: str, options: tuple[str, ...], labels: tuple[str, ...]) -> None:
    """Create a volume, and print its name. One without a NAME is anonymous.

    \b
    overlaykit volume create data --label stage=test
    overlaykit volume create scratch --opt type=tmpfs --opt device=tmpfs --opt o=size=64m
    overlaykit volume create secret --driver encrypted --opt passfile=/etc/keys/secret
    overlaykit volume create far --driver remote --opt url=sftp://backup@host/srv
    """
    click.echo(store.create_volume(name, driver=driver, options=pairs(options), labels=pairs(labels)).name)


@volume_command.command("ls")
@click.option("-f", "--filter", "filters", multiple=True, metavar="KEY=VALUE", help=f"Only some: {', '.join(FILTERS)}.")
@quiet_option
@format_option
@json_option
@with_store
def ls(store: Store, filters: tuple[str, ...], quiet: bool, form: str | None, as_json: bool) -> None:
    """List volumes.

    \b
    overlaykit volume ls --filter dangling=true
    overlaykit volume ls --format '{{.Name}} {{.Mountpoint}}'
    """
    used = store.volume_store.used()
    volumes = [volume for volume in store.volumes() if matches(volume, filters, used)]
    if as_json:
        print_json([volume.inspect() for volume in volumes])
    elif quiet:
        for volume in volumes:
            click.echo(volume.name)
    else:
        print_rows(form or "table", map(_fields, volumes), TITLES, columns("Driver", "Name"))


def _fields(volume: Volume) -> dict[str, Any]:
    """What a template may say of a volume in a list; Docker's names, and its N/A for what costs too much to find out."""
    facts = volume.inspect()
    return {
        "Availability": "N/A",
        "Driver": volume.driver,
        "Group": "N/A",
        "Label": lambda name: volume.labels.get(name, ""),
        "Labels": ",".join(f"{key}={value}" for key, value in sorted(volume.labels.items())),
        "Links": "N/A",
        "Mountpoint": facts["Mountpoint"],
        "Name": volume.name,
        "Scope": facts["Scope"],
        "Size": "N/A",
        "Status": "N/A",
    }


def matches(volume: Volume, filters: tuple[str, ...], used: set[str]) -> bool:
    """Whether the volume passes: one of each key's filters, and all of those for labels. InvalidReference."""
    wanted = parsed(filters, FILTERS, {"dangling": TRUTH})
    return (
        has_labels(volume.labels, wanted.get("label", ()))
        and all(TRUTH[value] == (volume.name not in used) for value in wanted.get("dangling", ()))
        and ("driver" not in wanted or volume.driver in wanted["driver"])
        and ("name" not in wanted or any(value in volume.name for value in wanted["name"]))
    )


@volume_command.command("inspect")
@click.argument("names", nargs=-1, required=True, metavar="NAME...", shell_complete=completion.volumes)
@click.option("-f", "--format", "form", metavar="TEMPLATE", help="Print each by a template, as Docker does, or json.")
@with_store
def inspect(store: Store, names: tuple[str, ...], form: str | None) -> None:
    """Print all there is to know about volumes, as JSON with Docker's field names.

    \b
    overlaykit volume inspect data | jq -r '.[0].Mountpoint'
    overlaykit volume inspect data --format '{{.Mountpoint}}'
    """
    print_inspected(names, lambda name: store.volume(name).inspect(), form)


@volume_command.command("rm")
@click.argument("names", nargs=-1, required=True, metavar="NAME...", shell_complete=completion.volumes)
@click.option("-f", "--force", is_flag=True, help="No error for one that is not there.")
@with_store
def rm(store: Store, names: tuple[str, ...], force: bool) -> None:
    """Remove volumes with their files. One that a container or a running command has is refused.

    \b
    overlaykit volume rm data
    """

    def remove(name: str) -> None:
        if not force or store.volume_store.has(name):
            store.volume(name).remove()
        click.echo(name)

    each(names, remove)


@volume_command.command("prune")
@click.option("-a", "--all", "everything", is_flag=True, help="Those with names too.")
@click.option("--filter", "filters", multiple=True, metavar="label=KEY[=VALUE]", help="Only those with the label.")
@click.option("-f", "--force", is_flag=True, help="Do not ask.")
@with_store
def prune(store: Store, everything: bool, filters: tuple[str, ...], force: bool) -> None:
    """Remove the anonymous volumes that no container and no running command has.

    \b
    overlaykit volume prune --force
    """
    labels = [text.removeprefix("label=") for text in filters]
    if any(not text.startswith("label=") for text in filters):
        raise InvalidReference("--filter of prune takes label=KEY[=VALUE] only")
    if not force and not confirmed("This removes the files of volumes that no container has. Go on?"):
        return
    names, freed = store.prune_volumes(all=everything, labels=labels)
    if names:
        click.echo("Deleted Volumes:")
    for name in names:
        click.echo(name)
    click.echo(("\n" if names else "") + f"Total reclaimed space: {size(freed)}")


@volume_command.command("clone")
@click.argument("name", shell_complete=completion.volumes)
@click.argument("new")
@live_option
@with_store
def clone(store: Store, name: str, new: str, live: bool) -> None:
    """Make volume NEW with the files, driver and labels of NAME, and print its name.

    By reflink where the file system can, so that nothing is copied before one of them is written to.

    \b
    overlaykit volume clone data trial
    """
    click.echo(store.volume(name).clone(new, live=live).name)


@volume_command.command("snapshot")
@click.argument("name", shell_complete=completion.volumes)
@click.argument("snapshot", required=False)
@live_option
@with_store
def snapshot(store: Store, name: str, snapshot: str | None, live: bool) -> None:
    """Keep what volume NAME has now as a volume that nobody writes to, and print its name: NAME-1, NAME-2, ...

    \b
    overlaykit volume snapshot data
    overlaykit volume ls --filter label=overlaykit.snapshot-of=data
    overlaykit volume clone data-1 restored
    """
    click.echo(store.volume(name).snapshot(snapshot, live=live).name)


@volume_command.command("rename")
@click.argument("name", shell_complete=completion.volumes)
@click.argument("new")
@with_store
def rename(store: Store, name: str, new: str) -> None:
    """Give a volume another name, in the containers that have it too.

    \b
    overlaykit volume rename data archive
    """
    store.volume(name).rename(new)


@volume_command.command("export")
@click.argument("name", shell_complete=completion.volumes)
@click.option("-o", "--output", type=click.Path(dir_okay=False), help="Write to a file, not to standard output.")
@live_option
@with_store
def export(store: Store, name: str, output: str | None, live: bool) -> None:
    """Write a volume's files as a tar.

    \b
    overlaykit volume export data --output data.tar
    overlaykit volume export data | ssh host overlaykit volume import data -
    """
    if output is None and sys.stdout.isatty():
        raise InvalidReference("a tar is nothing for a terminal", hint="say --output FILE, or redirect it")
    for loss in store.volume(name).export(output or sys.stdout.buffer, live=live):
        click.echo(f"overlaykit: warning: {shown(loss.path)}: {loss.what}", err=True)


@volume_command.command("import")
@click.argument("name")
@click.argument("file", type=click.Path(dir_okay=False, allow_dash=True))
@driver_option
@options_option
@labels_option
@with_store
def import_(store: Store, name: str, file: str, driver: str, options: tuple[str, ...], labels: tuple[str, ...]) -> None:
    """Make a volume with what is in a tar, which may be compressed, and print its name. FILE may be - for standard input.

    \b
    overlaykit volume import data data.tar.gz
    """
    source = sys.stdin.buffer if file == "-" else file
    made = store.import_volume(name, source, driver=driver or "local", options=pairs(options), labels=pairs(labels))
    click.echo(made.name)


@volume_command.command("reseed")
@click.argument("name", shell_complete=completion.volumes)
@click.argument("image", shell_complete=completion.images)
@click.option("--path", help="The directory in the image.  [default: the one that the volume was filled from]")
@click.option("-n", "--dry-run", is_flag=True, help="Only say what would be done.")
@json_option
@with_store
def reseed(store: Store, name: str, image: str, path: str | None, dry_run: bool, as_json: bool) -> None:
    """Give a volume that was filled from an image what IMAGE has there now.

    What was changed in the volume stays. Where the image changed the same name otherwise, that is a conflict: the volume's
    stays, it is listed, and the exit code is 1. Prints A, C, D for added, changed and deleted names, U for a conflict.

    \b
    overlaykit volume reseed data app:2 --dry-run
    """
    done = store.reseed_volume(name, image, path, dry_run=dry_run)
    if as_json:
        print_json(asdict(done))
    else:
        for sign, paths in zip("ACDU", (done.added, done.updated, done.removed, done.conflicts), strict=True):
            for each_path in paths:
                click.echo(f"{sign} /{shown(each_path)}")
    if done.conflicts:
        raise click.exceptions.Exit(1)
