"""Commands about containers: create, ps, rename, rm, diff, commit, mount, umount."""

from __future__ import annotations

import os

import click

from overlaykit.cli import completion
from overlaykit.cli.force import forgiven
from overlaykit.cli.image import change_option, compression_option, facts
from overlaykit.cli.output import (
    each,
    json_option,
    print_json,
    with_store,
)
from overlaykit.cli.ps import facts as record_facts
from overlaykit.cli.volume import pairs
from overlaykit.store import Store
from overlaykit.store.mountspec import parse_mount, parse_tmpfs, parse_volume


def variables(texts: tuple[str, ...]) -> dict[str, str | None]:
    """KEY=VALUE texts as a dict; a KEY alone has the value that it has in our environment, None if it has none there."""
    return {key: value if equals else os.environ.get(key) for key, equals, value in (text.partition("=") for text in texts)}


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
@click.option("--tmpfs", multiple=True, metavar="DST[:OPTS]", help="Mount an empty directory in memory.")
@click.option("--volumes-from", multiple=True, metavar="CONTAINER[:ro]", help="Mount what that container has.")
@click.option("-l", "--label", "labels", multiple=True, metavar="KEY[=VALUE]", help="Say something about it.")
@click.option("-e", "--env", multiple=True, metavar="KEY[=VALUE]", help="Set an environment variable; KEY alone: as here.")
@click.option("-w", "--workdir", help="Where its program starts.")
@click.option("-u", "--user", help="Who its program runs as.")
@click.option("--hostname", help="What it calls itself.")
@click.option("--entrypoint", help="Its program, instead of the image's.")
@click.option("-i", "--interactive", is_flag=True, hidden=True)  # that is for who runs something in it to say
@click.option("-t", "--tty", is_flag=True, hidden=True)
@click.option("--read-only", is_flag=True, help="Refuse changes of its root, but not of mounts in it.")
@click.option("--storage-opt", multiple=True, metavar="size=10G|entries=N", help="Limit its writable layer.")
@json_option
@with_store
def create_command(
    store: Store,
    image: str,
    command: tuple[str, ...],
    name: str | None,
    volumes: tuple[str, ...],
    mounts: tuple[str, ...],
    tmpfs: tuple[str, ...],
    volumes_from: tuple[str, ...],
    labels: tuple[str, ...],
    env: tuple[str, ...],
    workdir: str | None,
    user: str | None,
    hostname: str | None,
    entrypoint: str | None,
    interactive: bool,
    tty: bool,
    read_only: bool,
    storage_opt: tuple[str, ...],
    as_json: bool,
) -> None:
    """Create a container: an empty writable layer on top of the image's layers, of which nothing is copied.

    Options come before COMMAND. Prints the container's id.

    \b
    overlaykit create --name box debian:bookworm
    overlaykit create -v data:/var/lib/data -v /srv/www:/www:ro debian:bookworm
    overlaykit create --storage-opt size=10G debian:bookworm
    overlaykit create --read-only --tmpfs /run -v data:/var/lib/data debian:bookworm
    """
    container = store.create(
        image,
        name=name,
        mounts=[*map(parse_volume, volumes), *map(parse_mount, mounts), *map(parse_tmpfs, tmpfs)],
        volumes_from=volumes_from,
        labels=pairs(labels),
        env=variables(env),
        command=command,
        entrypoint=None if entrypoint is None else [entrypoint] if entrypoint else [],
        workdir=workdir,
        user=user,
        hostname=hostname,
        read_only=read_only,
        storage_opt=pairs(storage_opt),
    )
    print_json(record_facts(container.record)) if as_json else click.echo(container.id)


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
@click.option(
    "-f", "--force", is_flag=True, help="Unmount it first, and do not ask who has it open; and no error if it is not there."
)
@click.option("-v", "--volumes", is_flag=True, help="Remove its anonymous volumes too.")
@with_store
def rm_command(store: Store, containers: tuple[str, ...], force: bool, volumes: bool) -> None:
    """Remove containers with their writable layers. Their images stay.

    \b
    overlaykit rm box
    """

    def remove(name: str) -> None:
        with forgiven(when=force):
            store.container(name).remove(force=force, volumes=volumes)
            click.echo(name)

    each(containers, remove)


class DockersPause(click.Command):
    """Docker's flags take a value too: --pause=false."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        words = {"--pause=true": "--pause", "--pause=false": "--no-pause", "-p=true": "--pause", "-p=false": "--no-pause"}
        return super().parse_args(ctx, [words.get(word, word) for word in args])


@click.command("commit", cls=DockersPause)
@click.argument("container", shell_complete=completion.containers)
@click.argument("name", required=False)
@click.option("-a", "--author", help='Who made it, such as "Name <name@example.org>".')
@click.option("-m", "--message", help="What the history says about it.")
@click.option("-p", "--pause/--no-pause", default=True, help="Let what runs in it stand still meanwhile.  [default: pause]")
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
    pause: bool,
    changes: tuple[str, ...],
    compression: str,
    as_json: bool,
) -> None:
    """Make an image of a container: its image's layers, and its writable layer as one more.

    Prints the image's id. Without NAME the image has none.

    \b
    overlaykit commit box mine:1 --message "a new motd" --change 'ENV LANG=C.UTF-8'
    overlaykit commit --no-pause box mine:2
    """
    image = store.container(container).commit(
        name, author=author, message=message, changes=changes, compression=compression, pause=pause
    )
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
