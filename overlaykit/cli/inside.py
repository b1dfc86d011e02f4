"""Commands that run a program in a container's files: exec, shell."""

from __future__ import annotations

import click

from overlaykit.cli.output import with_store
from overlaykit.store import Container, Store

AS_THEY_ARE = {"ignore_unknown_options": True, "allow_interspersed_args": False}


def _environment(container: Container, more: tuple[str, ...]) -> dict[str, str] | None:
    """What the image's configuration says, and then `more`; None if nobody says anything."""
    pairs = [*(container.config.env or ()), *more]
    if not pairs:
        return None
    from overlaykit.overlay.inside import default_environment

    return default_environment() | {name: value for name, _, value in (pair.partition("=") for pair in pairs)}


@click.command("exec", context_settings=AS_THEY_ARE)
@click.option("-e", "--env", multiple=True, metavar="NAME=VALUE", help="One more variable of its environment.")
@click.option("-w", "--workdir", help="The directory it starts in.  [default: the image's, else /]")
@click.argument("container")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@with_store
def exec_command(store: Store, env: tuple[str, ...], workdir: str | None, container: str, command: tuple[str, ...]) -> int:
    """Run a program with the container's files as its root, in a mount namespace of its own.

    What it writes goes to the container's writable layer. As root, or as anyone who may make a user namespace; it is no
    sandbox: network, processes and devices are the host's. Exits as the program does.

    \b
    overlaykit exec box -- sh -c 'echo hello > /etc/motd'
    """
    if command[0] == "--":
        command = command[1:]
    box = store.container(container)
    return box.run(command, env=_environment(box, env), directory=workdir or box.config.working_dir or "/")


@click.command("shell")
@click.argument("container")
@with_store
def shell_command(store: Store, container: str) -> int:
    """Open a shell in the container's files, as exec would run it.

    \b
    overlaykit shell box
    """
    box = store.container(container)
    shell = next((path for path in ("/bin/bash", "/bin/sh") if box.fs.exists(path)), "/bin/sh")
    return box.run([shell], env=_environment(box, ()), directory=box.config.working_dir or "/")
