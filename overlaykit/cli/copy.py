"""The command cp."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from overlaykit.cli import completion
from overlaykit.cli.output import json_option, print_json, with_store
from overlaykit.cli.progress import progress_bar
from overlaykit.store import Store
from overlaykit.store.copying import copy
from overlaykit.store.places import split


@click.command("cp")
@click.argument("sources", nargs=-1, required=True, metavar="SRC...", shell_complete=completion.places)
@click.argument("target", metavar="DST", shell_complete=completion.places)
@click.option("-L", "--follow-link", is_flag=True, help="If SRC is a symlink, copy what it leads to.")
@click.option("-a", "--archive", is_flag=True, help="Into a container: --owner=container, as Docker's -a does.")
@click.option(
    "--owner",
    metavar="WHOSE",
    help="Whose the copies become: source, container (who its programs run as), keep (whoever owned what was there), "
    "caller, or UID:GID.  [default: source in a container, caller on the host]",
)
@click.option("--exclude", multiple=True, metavar="PATTERN", help="Leave out what has this name or path below SRC.")
@click.option(
    "--exclude-from",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Leave out the patterns in FILE, one a line; # begins a comment.",
)
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
@json_option
@with_store
def cp_command(
    store: Store,
    sources: tuple[str, ...],
    target: str,
    follow_link: bool,
    archive: bool,
    owner: str | None,
    exclude: tuple[str, ...],
    exclude_from: Path | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Copy files between the host, containers, volumes and images.

    SRC and DST are CONTAINER:PATH, volume:NAME:/PATH, image:NAME:/PATH (to read only), a path on the host, or - for a tar
    stream. The rules are those of `docker cp`; SRC may also be a pattern, and there may be several.

    \b
    overlaykit cp site.conf box:/etc/
    overlaykit cp box:/var/log/. ./logs
    overlaykit cp 'box:/etc/*.conf' ./conf --exclude 'ld*'
    overlaykit cp image:debian:bookworm:/etc/os-release - | tar -xO
    tar -c src | overlaykit cp - box:/usr/ --owner=0:0
    """
    if archive and owner is not None:
        raise click.UsageError("--archive is --owner=container: say one of them")
    patterns = [*exclude, *_patterns(exclude_from)]
    with progress_bar(quiet=quiet) as progress:
        copied = copy(
            store,
            [sys.stdin.buffer if source == "-" else source for source in sources],
            sys.stdout.buffer if target == "-" else target,
            follow=follow_link,
            owner="container" if archive and split(target)[0] == "container" else owner,
            exclude=patterns,
            progress=progress,
        )
    if as_json:
        losses = [{"path": f"/{loss.path}", "what": loss.what} for loss in copied.losses]
        print_json({"entries": copied.entries, "size": copied.size, "losses": losses})


def _patterns(file: Path | None) -> list[str]:
    lines = [] if file is None else [line.strip() for line in file.read_text(errors="surrogateescape").splitlines()]
    return [line for line in lines if line and not line.startswith("#")]
