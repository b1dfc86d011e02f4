"""The containers as a list. It is in their records, so all that takes long to load is left alone unless it is asked for."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import closing
from typing import TYPE_CHECKING, Any

import click

from overlaykit.cli.output import (
    Row,
    ago,
    columns,
    format_option,
    json_option,
    moment,
    no_trunc_option,
    open_store,
    print_json,
    print_lines,
    print_rows,
    quiet_option,
    shortened,
    size,
)
from overlaykit.cli.selecting import FILTERS, selected
from overlaykit.store.containerrecords import Record, everything
from overlaykit.store.records import Records
from overlaykit.store.roots import default_folder

if TYPE_CHECKING:
    from overlaykit.store import Store


@click.command("ps")
@click.option("-a", "--all", is_flag=True, hidden=True)  # what Docker needs to list those that do not run
@click.option("-f", "--filter", "filters", multiple=True, metavar="KEY=VALUE", help=f"Only some: {', '.join(FILTERS)}.")
@click.option("-n", "--last", type=int, default=-1, metavar="N", help="Only the N newest of them.")
@click.option("-l", "--latest", is_flag=True, help="Only the newest.")
@click.option("-s", "--size", "sized", is_flag=True, help="How much they hold too: their own layer, and with the image's.")
@quiet_option
@no_trunc_option
@format_option
@json_option
@click.pass_context
def ps_command(
    context: click.Context,
    all: bool,
    filters: tuple[str, ...],
    last: int,
    latest: bool,
    sized: bool,
    quiet: bool,
    no_trunc: bool,
    form: str | None,
    as_json: bool,
) -> None:
    """List containers, the newest first.

    \b
    overlaykit ps
    overlaykit rm $(overlaykit ps --quiet)
    overlaykit ps --format 'table {{.Names}}\\t{{.Image}}'
    overlaykit ps --filter ancestor=debian:bookworm --filter label=stage=test
    overlaykit ps --size
    """
    opened: list[Store] = []

    def store() -> Store:
        if not opened:
            opened.append(context.with_resource(open_store(context.find_object(str))))
        return opened[0]

    path = os.path.join(context.find_object(str) or default_folder(), "store.db")
    if not os.path.exists(path):
        store()
    with closing(Records(path)) as records:
        found = selected(everything(records), filters, store)
    if latest and last == -1:
        last = 1
    if last > 0:
        found = found[:last]
    if as_json:
        print_json([facts(record) | (_sizes(record, store) if sized else {}) for record in found])
    elif quiet:
        print_lines(record.id if no_trunc else record.id[:12] for record in found)
    else:
        sized = sized or ".Size" in (form or "")  # as Docker
        fields = _fields(no_trunc, lambda record: _sizes(record, store) if sized else {})
        usual = ["ID", "Image", "Command", "RunningFor", "Names", *(["Size"] if sized else [])]
        print_rows(form or "table", (Row(record, fields) for record in found), TITLES, columns(*usual))


TITLES = {"ID": "CONTAINER ID", "Image": "IMAGE", "Command": "COMMAND", "RunningFor": "CREATED", "CreatedAt": "CREATED AT"}
TITLES |= {"Names": "NAMES", "Size": "SIZE", "State": "STATE", "Status": "STATUS", "Labels": "LABELS"}


def _fields(no_trunc: bool, sizes: Callable[[Record], dict[str, int]]) -> dict[str, Callable[[Record], Any]]:
    """What a template may say of a container, and how that is worked out; Docker's names."""

    def command(record: Record) -> str:
        words = " ".join([*(record.config.entrypoint or ()), *(record.config.cmd or ())])
        return f'"{shortened(words, 20, no_trunc=no_trunc)}"'

    def both_sizes(record: Record) -> str:
        found = sizes(record)
        return f"{size(found.get('size_rw', 0))} (virtual {size(found.get('size_root_fs', 0))})"

    def labels(record: Record) -> dict[str, str]:
        return record.config.labels or {}

    return {
        "Command": command,
        "CreatedAt": lambda record: moment(record.created),
        "ID": lambda record: record.id if no_trunc else record.id[:12],
        "Image": lambda record: record.image_name,
        "Label": lambda record: lambda name: labels(record).get(name, ""),
        "Labels": lambda record: ",".join(f"{key}={value}" for key, value in sorted(labels(record).items())),
        "Names": lambda record: record.name,
        "RunningFor": lambda record: ago(record.created),
        "Size": both_sizes,
        "State": lambda record: "created",
        "Status": lambda record: "Created",
    }


def _sizes(record: Record, store: Callable[[], Store]) -> dict[str, int]:
    """They take a look at its files."""
    return dict(zip(("size_rw", "size_root_fs"), store().container(record.id).sizes(), strict=True))


def facts(record: Record) -> dict[str, Any]:
    """What --json says of a container."""
    return {
        "id": record.id,
        "name": record.name,
        "image": record.image_name,
        "image_digest": record.image,
        "created": record.created.isoformat(),
    }
