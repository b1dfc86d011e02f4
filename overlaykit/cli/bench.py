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
from overlaykit.bench.machine import machine
from overlaykit.bench.results import THRESHOLD
from overlaykit.cli.output import json_option, print_json, print_table, size
from overlaykit.errors import Unsupported

QUICK, FULL = 90, 800  # seconds of measuring; making and removing files comes on top


@click.group("bench", invoke_without_command=True)
@click.option("--full", is_flag=True, help="Every workload, longer: about fifteen minutes instead of two.")
@click.option("--filesystems", is_flag=True, help="On loop-mounted ext4, xfs and btrfs too. Root only.")
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
@click.option("--seconds", type=click.FloatRange(min=0), help="How long to measure.")
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
        click.echo(f"{facts['cpus']} x {facts['cpu']}, Linux {facts['kernel']}, {facts['user']}; in {suite.directory} "
                   f"({facts['filesystem']})\n")  # fmt: skip
        total = seconds if seconds is not None else FULL if full else QUICK
        results = suite.run(
            workloads=chosen, targets=shown, seconds=total, full=full or bool(workloads), filesystems=kinds
        )  # fmt: skip
        with closing(results):  # type: ignore[type-var]
            found.extend(results)
    print_results(found, [target.name for target in shown])
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


def print_results(found: list[bench.Result | bench.Missing], targets: list[str]) -> None:
    """A table per file system, a row per workload, and what did not run."""
    results = [result for result in found if isinstance(result, bench.Result)]
    for filesystem in dict.fromkeys(result.filesystem for result in results):
        here = [result for result in results if result.filesystem == filesystem]
        columns = [target for target in targets if any(result.target == target for result in here)]
        click.echo(f"{filesystem}: median time on the host, and how many times that each target takes (quartiles in --json)")
        rows = []
        for workload in dict.fromkeys(result.workload for result in here):
            by_target = {result.target: result for result in here if result.workload == workload}
            rows.append([workload, *(cell(by_target.get(column)) for column in columns)])
        print_table(["WORKLOAD", *columns], rows)
        click.echo()
    for missing in found:
        if isinstance(missing, bench.Missing):
            click.echo(f"not run: {missing.name}: {missing.reason}")


def cell(result: bench.Result | None) -> str:
    if result is None:
        return "-"
    if result.target == bench.HOST or result.ratio is None:
        rate = f" {size(round(result.amount / result.median))}/s" if result.unit == "bytes" else ""
        return f"{result.median * 1e3:.3g} ms{rate}"
    return f"{result.ratio:.2f}x"


@bench_command.command("compare")
@click.argument("before", type=click.Path(exists=True, dir_okay=False))
@click.argument("after", type=click.Path(exists=True, dir_okay=False))
@click.option(
    "--threshold", type=click.FloatRange(min=1), default=THRESHOLD, show_default=True, help="What counts as slower."
)
@json_option
def compare_command(before: str, after: str, threshold: float, as_json: bool) -> int:
    """List what got slower against the host, from one file of results to another; exit code 1 if anything did.

    \b
    overlaykit bench compare before.json after.json
    """
    worse, common = bench.compare(bench.load(before)[0], bench.load(after)[0], threshold=threshold)
    if as_json:
        print_json([asdict(one) for one in worse])
    else:
        click.echo(f"{common} ratios in both, {len(worse)} slower by more than {threshold - 1:.0%}")
        if worse:
            header = ["WORKLOAD", "TARGET", "FILE SYSTEM", "BEFORE", "AFTER"]
            print_table(header, [[w.workload, w.target, w.filesystem, f"{w.before:.2f}x", f"{w.after:.2f}x"] for w in worse])
    return 1 if worse else 0
