"""What commands have in common: the open store, tables, JSON, sizes and times as Docker writes them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from functools import update_wrapper
from typing import Any, TypeVar

import click

from overlaykit.cli import complain
from overlaykit.cli.templates import Template
from overlaykit.errors import OverlaykitError
from overlaykit.store import Store

FORMAT_HELP = "Print each by a template, as Docker does: '{{.ID}} {{json .Labels}}', 'table {{.ID}}\\t{{.Size}}', or json."
F = TypeVar("F", bound=Callable[..., Any])

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
quiet_option = click.option("-q", "--quiet", is_flag=True, help="Print ids only.")
format_option = click.option("--format", "form", metavar="TEMPLATE", help=FORMAT_HELP)
no_trunc_option = click.option("--no-trunc", is_flag=True, help="Do not shorten ids and texts.")


def with_store(function: F) -> F:
    """A command whose first argument is the open store; it is closed when the command ends."""

    def wrapped(*args: Any, **options: Any) -> Any:
        context = click.get_current_context()
        store = context.with_resource(Store(context.find_object(str)))
        return context.invoke(function, store, *args, **options)

    return update_wrapper(wrapped, function)  # type: ignore[return-value]


def print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2, default=str))


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Columns as wide as they need, three blanks between them and ten characters at least, as Docker prints them."""
    table = [list(header), *([shown(cell) for cell in row] for row in rows)]
    widths = [max(7, *map(len, column)) + 3 for column in zip(*table, strict=True)]
    for row in table:
        click.echo("".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def columns(*fields: str) -> str:
    """The template of a table with these fields."""
    return "\t".join(f"{{{{.{name}}}}}" for name in fields)


def print_rows(form: str, rows: Iterable[Mapping[str, Any]], titles: Mapping[str, str], usual: str) -> None:
    """Rows of fields as a --format says: a template for each, `table TEMPLATE`, `table` (the `usual` one), or `json`.

    titles: what a table has above each field.
    """
    # Shells leave these as they are in single quotes.
    form = form.replace(r"\t", "\t").replace(r"\n", "\n")
    word, _, rest = form.partition(" ")
    if form == "json":
        form = "{{json .}}"
    elif word == "table":
        template = Template(rest.strip() or usual)
        lines = [template.header(titles), *(template.render(row) for row in rows)]
        first, *others = (line.split("\t") for line in lines)
        print_table(first, others)
        return
    template = Template(form)
    for row in rows:
        click.echo(shown(template.render(row)))


def each(names: Iterable[str], work: Callable[[str], object]) -> None:
    """Do `work` with every name, also when one fails: that is said at once, and the exit code is then 1."""
    failed = False
    for name in names:
        try:
            work(name)
        except OverlaykitError as e:
            sys.stdout.flush()
            complain(f"{e} ({e.hint})" if e.hint else str(e))
            failed = True
    if failed:
        raise click.exceptions.Exit(1)


def print_inspected(names: Sequence[str], ask: Callable[[str], Mapping[str, Any]], form: str | None) -> None:
    """What `ask` knows of each name, as one JSON array or by a template each; what is not there is said, exit code 1."""
    template = None if form is None else Template("{{json .}}" if form == "json" else form)
    found: list[Mapping[str, Any]] = []
    try:
        each(names, lambda name: found.append(ask(name)) if template is None else click.echo(template.render(ask(name))))
    finally:
        if template is None:
            print_json(found)


def shown(text: str) -> str:
    """`text` as it may go to a terminal, which would obey control characters in it; as it is to a pipe."""
    if text.isprintable() or not sys.stdout.isatty():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogateescape").decode() for c in text)


def size(count: int) -> str:
    """Bytes in powers of 1000 with three digits: 74.8MB."""
    value, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):  # noqa: B007
        if value < 999.5:
            break
        value /= 1000
    return f"{value:.3g}{unit}"


def moment(when: datetime | None) -> str:
    """A time as Docker's lists have it: 2026-11-25 08:17:54 +0000 UTC."""
    return "N/A" if when is None else when.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S +0000 UTC")


def ago(when: datetime | None) -> str:
    """How long ago that was: "2 hours ago". Docker's words (go-units, HumanDuration)."""
    if when is None:
        return "N/A"
    seconds = (datetime.now(UTC) - (when if when.tzinfo else when.replace(tzinfo=UTC))).total_seconds()
    if seconds < 1:
        return "Less than a second ago"
    hours = seconds / 3600
    for limit, text in (
        (60, f"{_counted(int(seconds), 'second')}"),
        (120, "About a minute"),
        (46 * 60, f"{int(seconds / 60)} minutes"),
        (90 * 60, "About an hour"),
        (48 * 3600, f"{round(hours)} hours"),
        (14 * 86400, f"{int(hours / 24)} days"),
        (60 * 86400, f"{int(hours / 24 / 7)} weeks"),
        (730 * 86400, f"{int(hours / 24 / 30)} months"),
    ):
        if seconds < limit:
            return f"{text} ago"
    return f"{int(hours / 24 / 365)} years ago"


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def shortened(text: str, limit: int, *, no_trunc: bool = False) -> str:
    return text if no_trunc or len(text) <= limit else text[: limit - 1] + "…"
