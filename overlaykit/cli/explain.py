"""overlaykit explain: where a writable layer's bytes come from, and what would be better in a volume."""

from __future__ import annotations

from dataclasses import asdict

import click

from overlaykit.bench.explain import Explanation, explain, find_lowers
from overlaykit.cli.output import json_option, open_store, print_json, print_table, shown, size

MOST = 20  # files that are listed; --json has all


@click.command("explain")
@click.argument("container", metavar="CONTAINER|UPPERDIR")
@click.option(
    "--lower", "lowers", multiple=True, type=click.Path(exists=True, file_okay=False), help="A lower; bottom first."
)
@json_option
@click.pass_context
def explain_command(ctx: click.Context, container: str, lowers: tuple[str, ...], as_json: bool) -> None:
    """Say which files a container copied up, how much of them it never changed, and which directories deserve a volume.

    UPPERDIR, a path with a slash in it, is the upper directory of a container of Docker's or podman's, as their inspect
    shows it. Of any other overlay name the lowers too.

    \b
    overlaykit explain box
    overlaykit explain $(docker inspect -f '{{.GraphDriver.Data.UpperDir}}' box)
    overlaykit explain ./upper --lower ./base --lower ./app
    """
    if "/" in container:
        found = explain(container, lowers or find_lowers(container))
    elif lowers:
        raise click.UsageError("--lower goes with an upper directory; a container knows its own")
    else:
        with open_store(ctx.obj) as store, store.leases.hold() as lease:
            box = store.container(container)
            box.hold(lease)
            found = explain(store.snapshots.fs(box.id), store.snapshots.lowers(box.id))
    print_json({**asdict(found), "unchanged": found.unchanged}) if as_json else print_explanation(found)


def print_explanation(found: Explanation) -> None:
    click.echo(
        f"{found.files} files, {size(found.size)}; {len(found.copied_up)} of them are the image's too, "
        f"and {size(found.unchanged)} in them were copied up and never changed"
    )
    if found.copied_up:
        click.echo()
        rows = [[file.path, size(file.size), size(file.unchanged)] for file in found.copied_up[:MOST]]
        print_table(["COPIED UP", "SIZE", "NEVER CHANGED"], rows)
        if len(found.copied_up) > MOST:
            click.echo(f"and {len(found.copied_up) - MOST} more: --json lists them")
    if found.advice:
        click.echo()
    for advice in found.advice:
        what = "deserves a volume" if advice.where == "volume" else "belongs in the image: commit it, or build it in"
        click.echo(f"{shown(advice.path)} ({advice.files} files, {size(advice.size)}) {what}")
