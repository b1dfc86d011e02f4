"""Commands that run a program in a container's files: exec, shell."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from overlaykit.cli import complain
from overlaykit.cli.container import variables
from overlaykit.cli.output import with_store
from overlaykit.store import Container, Store
from overlaykit.store.instructions import environment

if TYPE_CHECKING:
    from overlaykit.overlay.identity import Identity

AS_THEY_ARE = {"allow_interspersed_args": False}  # what comes after CONTAINER belongs to the program
NOT_FOUND, NOT_STARTED = 127, 126  # exit codes, as shells and Docker have them

user_option = click.option(
    "-u", "--user", metavar="USER[:GROUP]", help="Who it runs as, by name or id.  [default: the image's, else root]"
)


def _environment(container: Container, user: Identity, more: tuple[str, ...]) -> dict[str, str]:
    """What programs always get, then what the image's configuration says, then `more`."""
    from overlaykit.overlay.inside import default_environment

    said = {**default_environment(user), **environment(container.config), **variables(more)}
    return {name: value for name, value in said.items() if value is not None}


@click.command("exec", context_settings=AS_THEY_ARE)
@click.option("-e", "--env", multiple=True, metavar="KEY[=VALUE]", help="One more variable; KEY alone: as here.")
@click.option("-i", "--interactive", is_flag=True, hidden=True)  # it has our streams and our terminal in any case
@click.option("-t", "--tty", is_flag=True, hidden=True)
@user_option
@click.option("-w", "--workdir", help="The directory it starts in.  [default: the image's, else /]")
@click.argument("container")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@with_store
def exec_command(
    store: Store,
    env: tuple[str, ...],
    interactive: bool,
    tty: bool,
    user: str | None,
    workdir: str | None,
    container: str,
    command: tuple[str, ...],
) -> int:
    """Run a program with the container's files as its root, in a mount namespace of its own.

    What it writes goes to the container's writable layer. As root, or as anyone who may make a user namespace; it is no
    sandbox: network, processes and devices are the host's. Exits as the program does; 127 if there is none of that name,
    126 if it cannot be started.

    \b
    overlaykit exec box -- sh -c 'echo hello > /etc/motd'
    """
    if command[0] == "--":
        command = command[1:]
    if not command or not command[0]:
        raise click.UsageError("no program to run")
    box = store.container(container)
    return _run(box, command, user, env, workdir)


def _run(
    box: Container, command: Sequence[str], user: str | None, env: tuple[str, ...] = (), workdir: str | None = None
) -> int:
    directory = workdir or box.config.working_dir or "/"
    who = box.identity(user)
    try:
        return box.run(command, env=_environment(box, who, env), directory=directory, user=who)
    except OSError as e:
        if e.filename not in (command[0], directory):
            raise  # nothing came so far that a program could be started
        return complain(
            f"{e.filename}: {e.strerror}",
            code=NOT_FOUND if e.errno == errno.ENOENT and e.filename == command[0] else NOT_STARTED,
        )


@click.command("shell")
@user_option
@click.argument("container")
@with_store
def shell_command(store: Store, user: str | None, container: str) -> int:
    """Open a shell in the container's files, as exec would run it.

    \b
    overlaykit shell box
    """
    box = store.container(container)
    shell = next((path for path in ("/bin/bash", "/bin/sh") if box.fs.exists(path)), "/bin/sh")
    return _run(box, [shell], user)
