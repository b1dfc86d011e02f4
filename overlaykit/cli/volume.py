"""Commands about volumes: volume create, ls, inspect, rm, prune."""

from __future__ import annotations

import click

from overlaykit.cli.output import json_option, print_json, print_table, quiet_option, size, with_store
from overlaykit.errors import InvalidReference
from overlaykit.store import Store
from overlaykit.store.volumes import Volume, has_labels

FILTERS = ("dangling", "driver", "label", "name")


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
@click.option("-l", "--label", "labels", multiple=True, metavar="KEY[=VALUE]", help="Say something about it.")
@with_store
def create(store: Store, name: str | None, labels: tuple[str, ...]) -> None:
    """Create a volume, and print its name. One without a NAME is anonymous.

    \b
    overlaykit volume create data --label stage=test
    """
    click.echo(store.create_volume(name, labels=pairs(labels)).name)


@volume_command.command("ls")
@click.option("-f", "--filter", "filters", multiple=True, metavar="KEY=VALUE", help=f"Only some: {', '.join(FILTERS)}.")
@quiet_option
@json_option
@with_store
def ls(store: Store, filters: tuple[str, ...], quiet: bool, as_json: bool) -> None:
    """List volumes.

    \b
    overlaykit volume ls --filter dangling=true
    """
    used = store.volume_store.used()
    volumes = [volume for volume in store.volumes() if matches(volume, filters, used)]
    if as_json:
        print_json([volume.inspect() for volume in volumes])
    elif quiet:
        for volume in volumes:
            click.echo(volume.name)
    else:
        print_table(["DRIVER", "VOLUME NAME"], [[volume.driver, volume.name] for volume in volumes])


def matches(volume: Volume, filters: tuple[str, ...], used: set[str]) -> bool:
    """Whether the volume passes: one of each key's filters, and all of those for labels. InvalidReference."""
    wanted: dict[str, list[str]] = {}
    for text in filters:
        key, equals, value = text.partition("=")
        if not equals or key not in FILTERS or (key == "dangling" and value not in ("true", "false", "1", "0")):
            raise InvalidReference(f"--filter {text}: not understood", hint=f"there are {', '.join(FILTERS)}; dangling=true")
        wanted.setdefault(key, []).append(value)
    return (
        has_labels(volume.labels, wanted.get("label", ()))
        and all((value in ("true", "1")) == (volume.name not in used) for value in wanted.get("dangling", ()))
        and ("driver" not in wanted or volume.driver in wanted["driver"])
        and ("name" not in wanted or any(value in volume.name for value in wanted["name"]))
    )


@volume_command.command("inspect")
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@with_store
def inspect(store: Store, names: tuple[str, ...]) -> None:
    """Print all there is to know about volumes, as JSON with Docker's field names.

    \b
    overlaykit volume inspect data | jq -r '.[0].Mountpoint'
    """
    print_json([store.volume(name).inspect() for name in names])


@volume_command.command("rm")
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@click.option("-f", "--force", is_flag=True, help="No error for one that is not there.")
@with_store
def rm(store: Store, names: tuple[str, ...], force: bool) -> None:
    """Remove volumes with their files. One that a container has is refused.

    \b
    overlaykit volume rm data
    """
    known = {volume.name for volume in store.volumes()}
    for name in names:
        if name in known or not force:
            store.volume(name).remove()
        click.echo(name)


@volume_command.command("prune")
@click.option("-a", "--all", "everything", is_flag=True, help="Those with names too.")
@click.option("--filter", "filters", multiple=True, metavar="label=KEY[=VALUE]", help="Only those with the label.")
@click.option("-f", "--force", is_flag=True, help="Do not ask.")
@with_store
def prune(store: Store, everything: bool, filters: tuple[str, ...], force: bool) -> None:
    """Remove the anonymous volumes that no container has.

    \b
    overlaykit volume prune --force
    """
    labels = [text.removeprefix("label=") for text in filters]
    if any(not text.startswith("label=") for text in filters):
        raise InvalidReference("--filter of prune takes label=KEY[=VALUE] only")
    if not force:
        click.confirm("This removes the files of volumes that no container has. Go on?", abort=True, err=True)
    names, freed = store.prune_volumes(all=everything, labels=labels)
    for name in names:
        click.echo(name)
    click.echo(f"Total reclaimed space: {size(freed)}")
