"""The report in a real browser: nothing to complain about, as wide as the window, letters large enough, light and dark."""

from __future__ import annotations

import html
import json
import re
from itertools import product
from pathlib import Path

import peers
import pytest

from overlaykit.bench.method import Missing, Result

pytest.importorskip("matplotlib")

# A browser's window has a least width, a frame has none. What the page looks like in it ends up in an attribute outside.
PROBE = """<script>addEventListener("load", () => {
  const texts = [...document.querySelectorAll("svg text")].map(t => t.getBoundingClientRect());
  const letters = texts.map(t => t.height);
  const meet = (a, b) => a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom;
  parent.postMessage(JSON.stringify({
    inner: innerWidth, scroll: document.documentElement.scrollWidth, letters: Math.min(...letters), count: letters.length,
    hidden: texts.filter((a, i) => texts.some((b, k) => k > i && meet(a, b))).length,
    paper: getComputedStyle(document.body).backgroundColor,
    ink: getComputedStyle(document.querySelector("svg text")).fill}), "*");
})</script>"""
FRAME = """<!doctype html><script>addEventListener("message", e => {document.documentElement.dataset.seen = e.data})</script>
<meta name=color-scheme content="light dark"><iframe src=index.html style="border:0;width:WIDTHpx;height:2000px"></iframe>"""
SIZES = ("4KiB", "64KiB", "1MiB", "16MiB", "64MiB", "256MiB", "1024MiB")
COLOURS = {"light": ("rgb(255, 255, 255)", "rgb(27, 31, 36)"), "dark": ("rgb(20, 23, 26)", "rgb(230, 232, 235)")}


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of every plot, with as many targets as there are."""
    from overlaykit.bench import report

    found: list[Result | Missing] = [Missing("seq-read", "<somebody's>", "because & so")]
    targets = ("host", "bind", "overlaykit", "kernel-1", "kernel-8", "kernel-64", "fuse-overlayfs", "docker-layer")
    workloads = [("seq-write-fsync", "write"), ("stat", "read"), *((f"copy-up-{n}", "copy-up") for n in SIZES)]
    for (workload, kind), (number, target) in product(workloads, enumerate(targets)):
        seconds, ratios = [0.01 * (number + 1)] * 3, [0.02 if workload == "stat" else 15.0**number] * 3
        found.append(Result(workload, target, kind, "what", "ops", "tmpfs", 1, 4096, 0, seconds, seconds, ratios))
    return report.write(tmp_path_factory.mktemp("report"), found, {"cpu": "a processor"})


@pytest.mark.parametrize("width", [390, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_it_whole_and_legibly(page: Path, tmp_path: Path, width: int, scheme: str) -> None:
    (tmp_path / "index.html").write_text(page.read_text().replace("</html>", f"{PROBE}</html>"))
    (tmp_path / "frame.html").write_text(FRAME.replace("WIDTH", str(width)))
    dark = ["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
    done = peers.run(
        "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--virtual-time-budget=2000",
        f"--user-data-dir={tmp_path}/profile", "--window-size=1600,2100", *dark, "--dump-dom", f"file://{tmp_path}/frame.html",
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr
    found = re.search(r'data-seen="([^"]*)"', done.stdout)
    assert found is not None, done.stdout
    seen = json.loads(html.unescape(found[1]))
    assert seen["inner"] == width
    assert seen["scroll"] <= width
    assert seen["count"] > 20
    assert seen["hidden"] == 0, "words on words in a plot"
    assert seen["letters"] >= 10, "pixels of the smallest line of letters in a plot"
    assert (seen["paper"], seen["ink"]) == COLOURS[scheme]
