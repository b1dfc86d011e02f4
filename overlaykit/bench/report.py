"""A report: one HTML page with its plots inside it (SVG), and the plots as PNG beside it.

Text and lines of a plot take the page's colours, so that it can be read in the dark; marks have a shape each, so that it can
be read without colours.
"""

from __future__ import annotations

import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from overlaykit.bench.machine import summary
from overlaykit.bench.method import Missing, Result
from overlaykit.bench.tables import Table, certainty, tables
from overlaykit.bench.targets import HOST, TARGETS
from overlaykit.errors import Unsupported
from overlaykit.sizes import size

INK = "#123456"  # no plot has this colour; it becomes the page's own
WIDTH = 5.2  # inches at 72 units: legible when a phone shows it at 360 pixels
COLOURS = ("#e8833a", "#2f7ed8", "#2ca25f", "#d33682", "#8a63d2", "#b8860b", "#1aa3a3", "#d9534f", "#6c8e23", "#777777")
SHAPES = "osD^vP*X<>"
LOWERS = (1, 8, 64)
STYLE = """
:root{color-scheme:light dark;--ink:#1b1f24;--paper:#fff;--line:#d8dde3}
@media(prefers-color-scheme:dark){:root{--ink:#e6e8eb;--paper:#14171a;--line:#3a4048}}
body{margin:0 auto;max-width:1240px;padding:1rem;font:16px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper)}
figure{margin:1rem 0}figure svg{width:100%;height:auto;max-width:590px}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,540px),1fr));gap:1rem}
h3{font-size:1rem}.wide{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:14px}
th,td{padding:.25rem .6rem;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th:first-child,td:first-child{text-align:left;position:sticky;left:0;background:var(--paper)}
"""


def write(directory: Path, found: Sequence[Result | Missing], machine: dict[str, Any]) -> Path:
    """The page, index.html, written to `directory` with a PNG of each plot. Unsupported if there is nothing to plot."""
    results = [result for result in found if isinstance(result, Result) and result.ratio is not None]
    if not results:
        raise Unsupported("no result with a ratio to the host: nothing to plot")
    directory.mkdir(parents=True, exist_ok=True)
    sections = []
    for number, filesystem in enumerate(dict.fromkeys(result.filesystem for result in results)):
        here = [result for result in results if result.filesystem == filesystem]
        figures = []
        for name, figure in plots(here).items():
            slug = f"{name}-{filesystem.split()[0]}"
            figure.savefig(directory / f"{slug}.png", dpi=200, facecolor="white")
            figures.append(f"<figure>{svg(figure, f'{slug}-{number}')}</figure>")
        shown = "".join(table_html(table) for table in tables(here))
        sections.append(f"<h2>{html.escape(filesystem)}</h2><div class=plots>{''.join(figures)}</div>{shown}")
    reasons = [f"{m.name}: {m.reason}" for m in found if isinstance(m, Missing)]
    missing = "".join(f"<li>{html.escape(reason)}</li>" for reason in reasons)
    facts, sure = html.escape(summary(machine)), html.escape(certainty(found))
    page = directory / "index.html"
    page.write_text(
        f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width,initial-scale=1'>"
        f"<link rel=icon href='data:,'><title>Writable layer and volume</title><style>{STYLE}</style>"
        f"<h1>Writable layer and volume</h1><p>{facts}</p><p>How many times as long each target takes as a directory of the "
        f"host, by rounds in turn. 1 is the speed of a volume. {sure}.</p>{''.join(sections)}"
        f"<h2>What did not run</h2><ul>{missing or '<li>nothing</li>'}</ul></html>\n"
    )
    return page


def plots(results: Sequence[Result]) -> dict[str, Figure]:
    """The plots that these results can fill."""
    made = {"ratios": by_workload([r for r in results if r.target != HOST])}
    sizes = [r for r in results if r.workload.startswith("copy-up-") and r.target != HOST]
    if sizes:
        made["copy-up"] = by_size(sizes)
    lowers = [r for r in results if r.target in {f"kernel-{n}" for n in LOWERS}]
    if len({r.target for r in lowers}) > 1:
        made["lowers"] = by_lowers(lowers)
    return made


def by_workload(results: Sequence[Result]) -> Figure:
    """A row per workload, in it a line per target, so that none hides another."""
    workloads = list(dict.fromkeys(r.workload for r in results))[::-1]
    targets = targets_of(results)
    figure, axes = canvas("Times the host directory's time, by workload", 1.8 + 0.5 * len(workloads))
    for number, target in enumerate(targets):
        mine = {r.workload: r.ratio for r in results if r.target == target}
        rows = [i for i, w in enumerate(workloads) if w in mine]
        at = [i + 0.4 - 0.8 * (number + 0.5) / len(targets) for i in rows]
        style = mark(target) | {"markersize": 5}
        axes.plot([mine[workloads[i]] for i in rows], at, linestyle="none", label=target, **style)
    axes.set_yticks(range(len(workloads)), workloads)
    axes.set_ylim(-0.6, len(workloads) - 0.4)
    for i in range(1, len(workloads)):
        axes.axhline(i - 0.5, color="#888888", alpha=0.35, linewidth=0.6)
    axes.set_xscale("log")
    axes.axvline(1, color=INK, linewidth=1)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}x" if x < 1000 else f"{x / 1000:g}k"))
    finish(figure, axes)
    axes.grid(visible=False, axis="y")
    return figure


def by_size(results: Sequence[Result]) -> Figure:
    figure, axes = canvas("First write to an image's file: milliseconds by size", 4.4)
    for target in targets_of(results):
        mine = sorted((bytes_of(r.workload), r.time / r.amount * 1e3) for r in results if r.target == target)
        axes.plot([x for x, _ in mine], [y for _, y in mine], label=target, **mark(target))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sorted({bytes_of(r.workload) for r in results}))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: short(x)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    return finish(figure, axes)


def by_lowers(results: Sequence[Result]) -> Figure:
    figure, axes = canvas("The kernel's overlay: times the host, by number of lowers", 4.4)
    shown = [w for w in dict.fromkeys(r.workload for r in results) if w in LOWERS_SHOWN]
    for number, workload in enumerate(shown):
        mine = sorted((int(r.target.rpartition("-")[2]), r.ratio or 0) for r in results if r.workload == workload)
        style = {"color": COLOURS[number], "marker": SHAPES[number], "markersize": 7, "linewidth": 1.5}
        axes.plot([x for x, _ in mine], [y for _, y in mine], label=workload, **style)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(LOWERS, [str(n) for n in LOWERS])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}x"))
    return finish(figure, axes)


LOWERS_SHOWN = ("create", "unlink", "stat", "list-wide", "copy-up-4KiB", "chmod", "rename-lower", "remove-lower")


def bytes_of(workload: str) -> int:
    text = workload.removeprefix("copy-up-")
    return int(text[:-3]) << (20 if text.endswith("MiB") else 10)


def short(count: float) -> str:
    """Bytes in the few letters that fit below an axis: 64K."""
    return size(count, binary=True).replace(" ", "").removesuffix("iB")


def targets_of(results: Sequence[Result]) -> list[str]:
    return list(dict.fromkeys(r.target for r in results))


def mark(target: str) -> dict[str, Any]:
    """The same shape and colour for a target in every plot."""
    names = [known.name for known in TARGETS if known.name != HOST]
    number = names.index(target) if target in names else len(names)
    return {
        "color": COLOURS[number % len(COLOURS)], "marker": SHAPES[number % len(SHAPES)], "markersize": 7, "linewidth": 1.5,
    }  # fmt: skip


def canvas(title: str, height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=12, color=INK, loc="right")
    return figure, axes


def finish(figure: Figure, axes: Any) -> Figure:
    axes.grid(color="#888888", alpha=0.35, linewidth=0.6)
    axes.tick_params(colors=INK, which="both", labelsize=11)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_formatter(NullFormatter())
    for spine in axes.spines.values():
        spine.set_color(INK)
    legend = figure.legend(loc="outside lower center", ncols=2, fontsize=11, frameon=False)
    for text in legend.get_texts():
        text.set_color(INK)
    return figure


def svg(figure: Figure, salt: str) -> str:
    """The figure as an SVG element whose ink is the page's, and whose ids no other figure has."""
    out = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt, "font.family": "sans-serif"}):
        figure.savefig(out, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = out.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    for name in ("figure_1", "patch_", "axes_", "line2d_", "text_", "xtick_", "ytick_", "matplotlib.axis_", "legend_"):
        text = text.replace(f'id="{name}', f'id="{salt}-{name}')
    return text


def table_html(table: Table) -> str:
    head = "".join(f"<th>{html.escape(cell)}" for cell in table.header)
    rows = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}' for cell in row)}" for row in table.rows)
    return f"<h3>{html.escape(table.title)}</h3><div class=wide><table><tr>{head}{rows}</table></div>"
