"""overlaykit bench: what the writable layer costs next to a volume, on this machine."""

from __future__ import annotations

from contextlib import closing
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import click

from overlaykit import bench
from overlaykit.bench.machine import machine, summary
from overlaykit.bench.results import THRESHOLD, Change
from overlaykit.bench.tables import certainty
from overlaykit.cli.output import json_option, print_json, print_table
from overlaykit.errors import Unsupported

QUICK, FULL = 115, 850  # seconds of a run; a slow disk adds to them


@click.group("bench", invoke_without_command=True)
@click.option("--full", is_flag=True, help="Every workload, longer: about fifteen minutes instead of two.")
@click.option("--filesystems", is_flag=True, help="On loop-mounted ext4, xfs and btrfs too: about eight minutes. Root only.")
@click.option(
    "--dir", "directory", type=click.Path(exists=True, file_okay=False), help="Where to measure.  [default: $TMPDIR]"
)
@click.option(
    "--json", "json_file", type=click.Path(dir_okay=False), metavar="FILE", help="Write results, as pytest-benchmark."
)
@click.option(
    "--report", type=click.Path(file_okay=False), metavar="DIR", help="Write a page with plots (needs matplotlib)."
)
@click.option("--workload", "workloads", multiple=True, metavar="NAME", help="Only this one; may be repeated.")
@click.option("--target", "targets", multiple=True, metavar="NAME", help="Only this one and the host; may be repeated.")
@click.option("--seconds", type=click.FloatRange(min=0), help="How long it may take.  [default: 115; --full: 850]")
@click.pass_context
def bench_command(
    ctx: click.Context, full: bool, filesystems: bool, directory: str | None, json_file: str | None, report: str | None,
    workloads: tuple[str, ...], targets: tuple[str, ...], seconds: float | None,
) -> None:  # fmt: skip
    """Measure what a writable layer costs next to a volume: ratios to a directory of the host, in the same rounds.

    \b
    overlaykit bench
    overlaykit bench --dir /dev/shm --workload create --target overlaykit --target kernel-1
    overlaykit bench --json today.json && overlaykit bench compare yesterday.json today.json
    """
    if ctx.invoked_subcommand:
        return
    page = plotting() if report else None
    chosen = pick(bench.WORKLOADS, workloads, "workload")
    shown = pick(bench.TARGETS, targets, "target")
    if targets and bench.HOST not in targets:
        shown.insert(0, next(target for target in bench.TARGETS if target.name == bench.HOST))
    kinds = ("ext4", "xfs", "btrfs") if filesystems else ()
    found: list[bench.Result | bench.Missing] = []
    with bench.Bench(directory) as suite:
        facts = machine(suite.directory)
        click.echo(f"{summary(facts)}; in {suite.directory}\n")
        total = seconds if seconds is not None else FULL if full else QUICK * (1 + len(kinds))
        results = suite.run(
            workloads=chosen, targets=shown, seconds=total, full=full or bool(workloads), filesystems=kinds
        )  # fmt: skip
        with closing(results):  # type: ignore[type-var]
            found.extend(results)
    print_results(found)
    if json_file:
        bench.save(json_file, found, facts)
    if report and page:
        click.echo(f"\n{page.write(Path(report), found, facts)}")


def plotting() -> ModuleType:
    """The module that writes reports; asked before the measuring, so that a missing library costs nobody's time."""
    try:
        return import_module("overlaykit.bench.report")
    except ModuleNotFoundError as e:
        raise Unsupported(f"a report needs {e.name}", hint="pip install 'overlaykit[bench]'") from None


def pick(known: list[Any], names: tuple[str, ...], what: str) -> list[Any]:
    """Those of `known` that have one of `names`; all if there are none. UsageError for a name that is not known."""
    if unknown := set(names) - {one.name for one in known}:
        raise click.UsageError(f"no {what} {min(unknown)!r}; there are: {', '.join(one.name for one in known)}")
    return [one for one in known if not names or one.name in names]


def print_results(found: list[bench.Result | bench.Missing], *, markdown: bool = False) -> None:
    """The tables, and what did not run."""
    for table in bench.tables(found):
        if markdown:
            click.echo(table.markdown())
        else:
            click.echo(table.title)
            print_table(table.header, table.rows)
        click.echo()
    if sure := certainty(found):
        click.echo(f"{sure}\n")
    for missing in found:
        if isinstance(missing, bench.Missing):
            click.echo(f"{'- ' if markdown else ''}not run: {missing.name}: {missing.reason}")


@bench_command.command("show")
@click.argument("results", type=click.Path(exists=True, dir_okay=False))
@click.option("--markdown", is_flag=True, help="As Markdown, for a page.")
@click.option("--report", type=click.Path(file_okay=False), metavar="DIR", help="Write the page with plots, too.")
def show_command(results: str, markdown: bool, report: str | None) -> None:
    """Print the tables of a file of results once more.

    \b
    overlaykit bench show today.json
    overlaykit bench show --markdown today.json >>docs/benchmarks.md
    """
    page = plotting() if report else None
    found, facts = bench.load(results)
    click.echo(f"{summary(facts)}\n")
    print_results(found, markdown=markdown)
    if report and page:
        click.echo(f"\n{page.write(Path(report), found, facts)}")


@bench_command.command("compare")
@click.argument("before", type=click.Path(exists=True, dir_okay=False))
@click.argument("after", type=click.Path(exists=True, dir_okay=False))
@click.option(
    "--threshold", type=click.FloatRange(min=1), default=THRESHOLD, show_default=True, help="What counts as a difference."
)
@click.option("--both", is_flag=True, help="List what got faster, too: do two runs agree?")
@json_option
def compare_command(before: str, after: str, threshold: float, both: bool, as_json: bool) -> int:
    """List what got slower against the host, from one file of results to another; exit code 1 if anything did.

    CHANCE is what the rounds of the two runs let their ratios differ by: what differs less is listed, and is no failure
    (with --both it is).

    \b
    overlaykit bench compare before.json after.json
    overlaykit bench compare --both --threshold 1.15 once.json again.json
    """
    found, common = bench.compare(bench.load(before)[0], bench.load(after)[0], threshold=threshold, both=both)
    sure = [one for one in found if one.sure]
    if as_json:
        print_json([{**asdict(one), "sure": one.sure} for one in found])
    else:
        how = "different" if both else "slower"
        maybe = "" if len(sure) == len(found) else f", {len(sure)} of them by more than chance"
        click.echo(f"{common} ratios in both, {len(found)} {how} by more than {threshold - 1:.0%}{maybe}")
        if found:
            header = ["WORKLOAD", "TARGET", "FILE SYSTEM", "BEFORE", "AFTER", "FACTOR", "CHANCE"]
            print_table(header, [row(one) for one in found])
    return 1 if (found if both else sure) else 0


def row(one: Change) -> list[str]:
    ratios = f"{one.before:.2f}x", f"{one.after:.2f}x"
    return [one.workload, one.target, one.filesystem, *ratios, f"{one.factor:.2f}", f"{one.chance:.2f}"]
