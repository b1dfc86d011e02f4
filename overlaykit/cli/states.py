"""Commands about the states of a container: snapshot, snapshots, rollback, fork, discard, keep, apply-to, export."""

from __future__ import annotations

import sys

import click

from overlaykit.cli.output import ago, json_option, print_json, print_table, shown, with_store
from overlaykit.store import Store


@click.command("snapshot")
@click.argument("container")
@click.argument("name", required=False)
@click.option("--rm", "remove", is_flag=True, help="Forget the snapshot NAME.")
@with_store
def snapshot_command(store: Store, container: str, name: str | None, remove: bool) -> None:
    """Keep what a container shows now, to come back to with `rollback`. No data is copied.

    Prints the snapshot's name: NAME, or the next number.

    \b
    overlaykit snapshot box before-upgrade
    overlaykit rollback box before-upgrade
    """
    found = store.container(container)
    if not remove:
        click.echo(found.snapshot(name).name)
    elif name is None:
        raise click.UsageError("--rm needs the NAME of a snapshot")
    else:
        found.remove_snapshot(name)
        click.echo(name)


@click.command("snapshots")
@click.argument("container")
@json_option
@with_store
def snapshots_command(store: Store, container: str, as_json: bool) -> None:
    """List the snapshots of a container, the oldest first.

    \b
    overlaykit snapshots box
    """
    found = store.container(container).snapshots()
    if as_json:
        print_json([{"name": each.name, "created": each.created.isoformat()} for each in found])
    else:
        print_table(["NAME", "CREATED"], [[each.name, ago(each.created)] for each in found])


@click.command("rollback")
@click.argument("container")
@click.argument("name", required=False)
@with_store
def rollback_command(store: Store, container: str, name: str | None) -> None:
    """Let a container show again what it showed when the snapshot NAME was taken (the newest if none is named).

    What was changed since is gone. Prints the snapshot's name.

    \b
    overlaykit rollback box
    """
    click.echo(store.container(container).rollback(name).name)


@click.command("fork")
@click.argument("container")
@click.argument("name", required=False)
@with_store
def fork_command(store: Store, container: str, name: str | None) -> None:
    """Make another container that shows what this one shows now. No data is copied.

    Prints the new container's id.

    \b
    overlaykit fork box experiment
    """
    click.echo(store.container(container).fork(name).id)


@click.command("discard")
@click.argument("container")
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
@with_store
def discard_command(store: Store, container: str, paths: tuple[str, ...]) -> None:
    """Undo what a container changed at PATH and under it: the image's files are back there.

    \b
    overlaykit diff box
    overlaykit discard box /var/cache /etc/motd
    """
    store.container(container).discard(*paths)


@click.command("keep")
@click.argument("container")
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
@with_store
def keep_command(store: Store, container: str, paths: tuple[str, ...]) -> None:
    """Undo all that a container changed but at PATH and under it. Prints what was undone.

    \b
    overlaykit keep box /srv/app /etc/app.conf
    """
    for path in store.container(container).keep(*paths):
        click.echo(shown(f"/{path}"))


@click.command("apply-to")
@click.argument("container")
@click.argument("other")
@click.argument("paths", nargs=-1, metavar="[PATH]...")
@with_store
def apply_to_command(store: Store, container: str, other: str, paths: tuple[str, ...]) -> None:
    """Make a container's changes, or those at PATH, in the container OTHER too, in one step.

    \b
    overlaykit apply-to box other /etc
    """
    store.container(container).apply_to(store.container(other), *paths)


@click.command("export")
@click.argument("container")
@click.option("-o", "--output", type=click.Path(), help="Write to this file, not to standard output.")
@with_store
def export_command(store: Store, container: str, output: str | None) -> None:
    """Write what a container shows as a tar, as `docker export` does.

    \b
    overlaykit export box | tar -tv
    overlaykit export -o box.tar box
    """
    if output is None and sys.stdout.isatty():
        raise click.UsageError("a tar on a terminal helps nobody: use -o FILE, or a pipe")
    store.container(container).export(output or sys.stdout.buffer)
