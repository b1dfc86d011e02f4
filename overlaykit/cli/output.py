"""What commands have in common: the open store, tables, JSON, sizes and times as Docker writes them."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import update_wrapper
from typing import TYPE_CHECKING, Any, TypeVar

import click

from overlaykit.cli import complain
from overlaykit.cli.templates import Template
from overlaykit.errors import OverlaykitError
from overlaykit.sizes import size as size  # commands have all their words from here

if TYPE_CHECKING:
    from overlaykit.store import Store

FORMAT_HELP = "Print each by a template, as Docker does: '{{.ID}} {{json .Labels}}', 'table {{.ID}}\\t{{.Size}}', or json."
F = TypeVar("F", bound=Callable[..., Any])

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
quiet_option = click.option("-q", "--quiet", is_flag=True, help="Print ids only.")
format_option = click.option("--format", "form", metavar="TEMPLATE", help=FORMAT_HELP)
no_trunc_option = click.option("--no-trunc", is_flag=True, help="Do not shorten ids and texts.")


def open_store(root: str | None) -> Store:
    """The store in `root`. What it logs goes to stderr. Imported here: it takes a while, and not every command needs it."""
    import logging

    from overlaykit.store import Store

    logging.basicConfig(stream=sys.stderr, format="overlaykit: warning: %(message)s", level=logging.WARNING)
    return Store(root)


def with_store(function: F) -> F:
    """A command whose first argument is the open store; it is closed when the command ends."""

    def wrapped(*args: Any, **options: Any) -> Any:
        context = click.get_current_context()
        store = context.with_resource(open_store(context.find_object(str)))
        return context.invoke(function, store, *args, **options)

    return update_wrapper(wrapped, function)  # type: ignore[return-value]


def print_json(value: Any) -> None:
    import json

    click.echo(json.dumps(value, indent=2, default=str))


def print_lines(lines: Iterable[str]) -> None:
    """All of them at once, and nothing if there are none."""
    click.echo("".join([f"{shown(line)}\n" for line in lines]), nl=False)


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Columns as wide as they need, three blanks between them and ten characters at least, as Docker prints them."""
    table = [header, *rows]
    if sys.stdout.isatty():
        table = [[shown(cell) for cell in row] for row in table]
    widths = [max(7, *map(len, column)) + 3 for column in zip(*table, strict=True)]
    line = "".join(f"{{:{width}}}" for width in widths)
    click.echo("\n".join([line.format(*row).rstrip() for row in table]))


class Row(Mapping[str, Any]):
    """What a template may say of `value`, each field worked out when it is asked for. fields: how, by their names."""

    def __init__(self, value: Any, fields: Mapping[str, Callable[[Any], Any]]) -> None:
        self._value, self._fields = value, fields

    def __getitem__(self, name: str) -> Any:
        return self._fields[name](self._value)

    def __contains__(self, name: object) -> bool:
        return name in self._fields

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)


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
        print_table(template.header(titles).split("\t"), [template.render(row).split("\t") for row in rows])
        return
    template = Template(form)
    print_lines(template.render(row) for row in rows)


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


def moment(when: datetime | None) -> str:
    """A time as Docker's lists have it: 2026-11-25 08:17:54 +0000 UTC."""
    return "N/A" if when is None else f"{when.astimezone(UTC).isoformat(' ', 'seconds')[:19]} +0000 UTC"


HOUR, DAY = 3600, 24 * 3600
SPANS: tuple[tuple[float, int, str, str], ...] = (  # below so many seconds: the seconds of one, one of them, several
    (60, 1, "1 second", "seconds"),
    (46 * 60, 60, "About a minute", "minutes"),
    (2 * DAY, HOUR, "About an hour", "hours"),
    (14 * DAY, DAY, "", "days"),
    (60 * DAY, 7 * DAY, "", "weeks"),
    (730 * DAY, 30 * DAY, "", "months"),
    (math.inf, 365 * DAY, "", "years"),
)


def ago(when: datetime | None, now: datetime | None = None) -> str:
    """How long ago that was: "2 hours ago". Docker's words (go-units, HumanDuration)."""
    if when is None:
        return "N/A"
    seconds = ((now or datetime.now(UTC)) - (when if when.tzinfo else when.replace(tzinfo=UTC))).total_seconds()
    if seconds < 1:
        return "Less than a second ago"
    length, one, many = next(span[1:] for span in SPANS if seconds < span[0])
    count = int(seconds / length + (0.5 if length == HOUR else 0))  # Docker rounds hours and cuts all others off
    return f"{one if count == 1 else f'{count} {many}'} ago"


def shortened(text: str, limit: int, *, no_trunc: bool = False) -> str:
    return text if no_trunc or len(text) <= limit else text[: limit - 1] + "…"
