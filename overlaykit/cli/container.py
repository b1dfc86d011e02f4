"""Commands about containers: create, ps, rename, rm, diff, commit, mount, umount."""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import Any

import click

from overlaykit.cli import completion
from overlaykit.cli.image import change_option, compression_option, facts
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
    shown,
    with_store,
)
from overlaykit.cli.volume import pairs
from overlaykit.store import Container, Store
from overlaykit.store.mountspec import parse_mount, parse_volume


class ImageThenCommand(click.Command):
    """Options may stand on both sides of IMAGE; what comes after the first word of COMMAND belongs to that."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.allow_interspersed_args = False
        rest = self._words(ctx, args)
        if len(rest) > 1 and rest[1].startswith("-"):
            command = self._words(ctx, rest[1:])
            options = rest[1 : len(rest) - len(command)]
            args = [*args[: len(args) - len(rest)], *options, rest[0], *command]
        return super().parse_args(ctx, args)

    def _words(self, ctx: click.Context, args: list[str]) -> list[str]:
        """What is left of `args` after the options at its beginning."""
        found, _, _ = self.make_parser(ctx).parse_args(list(args))
        image, command = found.get("image"), found.get("command")
        return [*([image] if isinstance(image, str) else []), *(command if isinstance(command, tuple) else ())]


@click.command("create", cls=ImageThenCommand)
@click.argument("image", shell_complete=completion.images)
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
@click.option("--name", help="What to call it; two words if nothing is said.")
@click.option("-v", "--volume", "volumes", multiple=True, metavar="[SRC:]DST[:OPTS]", help="Mount a volume or a host path.")
@click.option("--mount", "mounts", multiple=True, metavar="type=...,src=...,dst=...", help="The same, spelled out.")
@click.option("--volumes-from", multiple=True, metavar="CONTAINER[:ro]", help="Mount what that container has.")
@click.option("-l", "--label", "labels", multiple=True, metavar="KEY[=VALUE]", help="Say something about it.")
@click.option("-e", "--env", multiple=True, metavar="KEY=VALUE", help="Set an environment variable.")
@click.option("-w", "--workdir", help="Where its program starts.")
@click.option("-u", "--user", help="Who its program runs as.")
@click.option("--hostname", help="What it calls itself.")
@click.option("--entrypoint", help="Its program, instead of the image's.")
@click.option("--read-only", is_flag=True, help="Record that its root is not to be written to.")
@json_option
@with_store
def create_command(
    store: Store,
    image: str,
    command: tuple[str, ...],
    name: str | None,
    volumes: tuple[str, ...],
    mounts: tuple[str, ...],
    volumes_from: tuple[str, ...],
    labels: tuple[str, ...],
    env: tuple[str, ...],
    workdir: str | None,
    user: str | None,
    hostname: str | None,
    entrypoint: str | None,
    read_only: bool,
    as_json: bool,
) -> None:
    """Create a container: an empty writable layer on top of the image's layers, of which nothing is copied.

    Options come before COMMAND. Prints the container's id.

    \b
    overlaykit create --name box debian:bookworm
    overlaykit create -v data:/var/lib/data -v /srv/www:/www:ro debian:bookworm
    """
    container = store.create(
        image,
        name=name,
        mounts=[*map(parse_volume, volumes), *map(parse_mount, mounts)],
        volumes_from=volumes_from,
        labels=pairs(labels),
        env={key: value if equals else os.environ.get(key, "") for key, equals, value in (e.partition("=") for e in env)},
        command=command,
        entrypoint=None if entrypoint is None else [entrypoint] if entrypoint else [],
        workdir=workdir,
        user=user,
        hostname=hostname,
        read_only=read_only,
    )
    print_json(_facts(container)) if as_json else click.echo(container.id)


@click.command("ps")
@click.option("-a", "--all", is_flag=True, hidden=True)  # what Docker needs to list those that do not run
@quiet_option
@no_trunc_option
@format_option
@json_option
@with_store
def ps_command(store: Store, all: bool, quiet: bool, no_trunc: bool, form: str | None, as_json: bool) -> None:
    """List containers, the newest first.

    \b
    overlaykit ps
    overlaykit rm $(overlaykit ps --quiet)
    overlaykit ps --format 'table {{.Names}}\\t{{.Image}}'
    """
    containers = store.containers()
    if as_json:
        print_json([_facts(container) for container in containers])
    elif quiet:
        for container in containers:
            click.echo(container.id if no_trunc else container.id[:12])
    else:
        rows = [_fields(container, no_trunc) for container in containers]
        print_rows(form or "table", rows, TITLES, columns("ID", "Image", "Command", "RunningFor", "Names"))


TITLES = {"ID": "CONTAINER ID", "Image": "IMAGE", "Command": "COMMAND", "RunningFor": "CREATED", "CreatedAt": "CREATED AT"}
TITLES |= {"Names": "NAMES", "State": "STATE", "Status": "STATUS", "Labels": "LABELS"}


def _fields(container: Container, no_trunc: bool) -> dict[str, Any]:
    """What a template may say of a container; Docker's names."""
    config = container.config
    labels = dict(config.labels or {})
    command = shortened(" ".join([*(config.entrypoint or ()), *(config.cmd or ())]), 20, no_trunc=no_trunc)
    return {
        "Command": f'"{command}"',
        "CreatedAt": moment(container.created),
        "ID": container.id if no_trunc else container.id[:12],
        "Image": container.record.image_name,
        "Label": lambda name: labels.get(name, ""),
        "Labels": ",".join(f"{key}={value}" for key, value in sorted(labels.items())),
        "Names": container.name,
        "RunningFor": ago(container.created),
        "State": "created",
        "Status": "Created",
    }


def _facts(container: Container) -> dict[str, Any]:
    record = container.record
    return {
        "id": container.id,
        "name": container.name,
        "image": record.image_name,
        "image_digest": record.image,
        "created": container.created.isoformat(),
    }


@click.command("rename")
@click.argument("container")
@click.argument("name")
@with_store
def rename_command(store: Store, container: str, name: str) -> None:
    """Give a container another name.

    \b
    overlaykit rename quiet_harbor box
    """
    store.container(container).rename(name)


@click.command("rm")
@click.argument("containers", nargs=-1, required=True, metavar="CONTAINER...", shell_complete=completion.containers)
@click.option("-f", "--force", is_flag=True, help="Unmount it first, and do not ask who has it open.")
@click.option("-v", "--volumes", is_flag=True, help="Remove its anonymous volumes too.")
@with_store
def rm_command(store: Store, containers: tuple[str, ...], force: bool, volumes: bool) -> None:
    """Remove containers with their writable layers. Their images stay.

    \b
    overlaykit rm box
    """

    def remove(name: str) -> None:
        store.container(name).remove(force=force, volumes=volumes)
        click.echo(name)

    each(containers, remove)


@click.command("diff")
@click.argument("container", shell_complete=completion.containers)
@json_option
@with_store
def diff_command(store: Store, container: str, as_json: bool) -> None:
    """List what a container changed against its image: A added, C changed, D deleted.

    With --json also why, and how many bytes before and after.

    \b
    overlaykit diff box
    overlaykit diff --json box | jq '[.[].size_after] | add'
    """
    changes = store.container(container).diff()
    if as_json:
        print_json([asdict(change) for change in changes])
    else:
        for change in changes:
            click.echo(f"{change.kind} {shown(change.path)}")


@click.command("commit")
@click.argument("container", shell_complete=completion.containers)
@click.argument("name", required=False)
@click.option("-a", "--author", help='Who made it, such as "Name <name@example.org>".')
@click.option("-m", "--message", help="What the history says about it.")
@change_option
@compression_option
@json_option
@with_store
def commit_command(
    store: Store,
    container: str,
    name: str | None,
    author: str | None,
    message: str | None,
    changes: tuple[str, ...],
    compression: str,
    as_json: bool,
) -> None:
    """Make an image of a container: its image's layers, and its writable layer as one more.

    Prints the image's id. Without NAME the image has none.

    \b
    overlaykit commit box mine:1 --message "a new motd" --change 'ENV LANG=C.UTF-8'
    """
    image = store.container(container).commit(name, author=author, message=message, changes=changes, compression=compression)
    print_json(facts(image)) if as_json else click.echo(image.id)


@click.command("mount")
@click.argument("container", shell_complete=completion.containers)
@click.argument("directory", required=False, type=click.Path(exists=True, file_okay=False))
@with_store
def mount_command(store: Store, container: str, directory: str | None) -> None:
    """Let the kernel show a container's files, and print where. Root only.

    Without DIRECTORY that is a place in the store, the MergedDir of `inspect`.

    \b
    ls $(overlaykit mount box)
    overlaykit umount box
    """
    click.echo(str(store.container(container).mount(directory)))


@click.command("umount")
@click.argument("containers", nargs=-1, required=True, metavar="CONTAINER...", shell_complete=completion.containers)
@click.option("-l", "--lazy", is_flag=True, help="Out of sight now, gone when the last user is.")
@with_store
def umount_command(store: Store, containers: tuple[str, ...], lazy: bool) -> None:
    """Take away every mount of the containers.

    \b
    overlaykit umount box
    """

    def unmount(name: str) -> None:
        store.container(name).unmount(lazy=lazy)
        click.echo(name)

    each(containers, unmount)
