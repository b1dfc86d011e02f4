"""Benchmarks: true tables for whoever runs them, and nothing left behind however they end."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from users import SOMEBODY

from overlaykit import bench, cli
from overlaykit.bench.files import Files
from overlaykit.bench.method import Missing, Result
from overlaykit.errors import OverlaykitError

QUICK = ["--seconds", "0", "--workload", "create", "--workload", "chmod"]
STOPS = int(os.environ.get("OVERLAYKIT_BENCH_STOPS", "3"))  # of each signal
MODULE = [sys.executable, "-m", "overlaykit.cli"]


@pytest.fixture
def place() -> Iterator[Path]:
    """A new folder, in memory where there is such: a disk's fsyncs would take minutes."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory, prefix="overlaykit-test-") as folder:
        yield Path(folder)


def only(*names: str) -> list[bench.Target]:
    return [target for target in bench.TARGETS if target.name in names]


def some(*names: str) -> list[bench.Workload]:
    return [workload for workload in bench.WORKLOADS if workload.name in names]


def run(place: Path, *workloads: str, targets: list[bench.Target]) -> list[Result | Missing]:
    with bench.Bench(place) as suite:
        return list(suite.run(workloads=some(*workloads), targets=targets, seconds=0, full=True))


def traces() -> tuple[list[str], list[str]]:
    """Mounts and loop devices of benchmarks, as this machine sees them."""
    mounts = [line for line in Path("/proc/mounts").read_text().splitlines() if "overlaykit-measures" in line]
    loops = [str(f) for f in Path("/sys/block").glob("loop*/loop/backing_file") if "overlaykit-measures" in read(f)]
    return mounts, loops


def read(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:  # detached while we looked
        return ""


def test_every_workload_runs_on_the_host_and_in_process_or_says_why_not(place: Path) -> None:
    small = [workload.name for workload in bench.WORKLOADS if "MiB" not in workload.name and workload.name != "pip"]
    found = run(place, *small, targets=only("host", "overlaykit"))
    told = {one.workload for one in found}
    assert told == set(small)
    for one in found:
        if isinstance(one, Result):
            assert one.amount > 0
            assert len(one.seconds) == len(one.ratios) >= 3
        else:
            assert one.reason
    assert list(place.iterdir()) == []


def test_what_cannot_run_is_listed_with_its_reason(place: Path) -> None:
    @contextmanager
    def refused(scene: bench.Scene) -> Iterator[Files]:
        raise OSError(95, "not on this machine")
        yield  # pragma: no cover

    found = run(place, "create", targets=[*only("host"), bench.Target("mine", "a target of somebody's", refused)])
    assert Missing("", "mine", "not on this machine") in found
    assert [one.target for one in found if isinstance(one, Result)] == ["host"]


def test_a_planted_slowdown_of_thirty_percent_is_found(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = [one for one in run(place, "create", "unlink", targets=only("host", "overlaykit")) if isinstance(one, Result)]
    slow = [
        replace(one, ratios=[ratio * 1.3 for ratio in one.ratios])
        if (one.workload, one.target) == ("unlink", "overlaykit")
        else one
        for one in found
    ]
    bench.save(place / "a.json", found, {})
    bench.save(place / "b.json", slow, {})
    assert cli.main(["bench", "compare", str(place / "a.json"), str(place / "a.json")]) == 0
    assert cli.main(["bench", "compare", str(place / "a.json"), str(place / "b.json"), "--json"]) == 1
    printed = capsys.readouterr().out
    worse = json.loads(printed[printed.index("[") :])
    assert [(one["workload"], one["target"]) for one in worse] == [("unlink", "overlaykit")]


def test_results_come_back_from_their_file_as_they_went(place: Path) -> None:
    found = run(place, "create", "sqlite", targets=only("host", "overlaykit"))
    bench.save(place / "r.json", found, {"cpu": "x"})
    rows, machine = bench.load(place / "r.json")
    assert sorted(map(repr, rows)) == sorted(map(repr, found))
    assert machine == {"cpu": "x"}
    (place / "r.json").write_text('{"benchmarks": 3}')
    with pytest.raises(OverlaykitError, match="no results of overlaykit bench"):
        bench.load(place / "r.json")


def test_an_ordinary_user_without_docker_and_fio_gets_a_true_table(tmp_path: Path) -> None:
    # Python, its packages and ours are readable by all; programs are found in a PATH that has no docker and no fio.
    place = Path("/dev/shm" if os.access("/dev/shm", os.W_OK) else "/tmp") / f"overlaykit-user-{os.getpid()}"
    place.mkdir(mode=0o777)
    place.chmod(0o777)
    try:
        code = (
            "import ctypes, os, sys, sqlite3, resource, traceback, difflib\n"
            "import overlaykit.cli.bench  # while all of Python can be read\n"
            "from overlaykit.cli import main\n"
            f"if os.geteuid() == 0: os.setgroups([]); os.setgid({SOMEBODY}); os.setuid({SOMEBODY})\n"
            "ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE: else /proc/self stays root's\n"
            "os.environ['PATH'] = '/nonexistent'\n"
            f"sys.exit(main(['bench', '--dir', {str(place)!r}, *{[*QUICK, '--workload', 'fio']!r}]))\n"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd="/")
        assert (done.returncode, done.stderr) == (0, "")
        lines = done.stdout.splitlines()
        assert any(line.split()[:1] == ["create"] and line.count("x") >= 1 for line in lines), done.stdout
        assert "not run: docker-layer: docker is not installed" in lines
        assert "not run: fuse-overlayfs: fuse-overlayfs is not installed" in lines
        assert "not run: fio: fio is not installed" in lines
        assert any(line.startswith("not run: kernel-1: only root mounts") for line in lines)
        assert list(place.iterdir()) == []
    finally:
        shutil.rmtree(place)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_nothing_behind(tmp_path: Path, number: signal.Signals) -> None:
    moments = random.Random(int(number))
    for _ in range(STOPS):
        command = [*MODULE, "bench", "--dir", str(tmp_path), "--workload", "create", "--workload", "chmod"]
        running = subprocess.Popen(
            [*command, "--filesystems", "--seconds", "60"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        while not list(tmp_path.iterdir()) and running.poll() is None:
            time.sleep(0.01)  # before that there is nothing to leave behind
        time.sleep(moments.uniform(0, 3))
        running.send_signal(number)
        assert running.communicate(timeout=60)[1].strip() == "overlaykit: interrupted"  # click ends a ^C line
        assert running.returncode == 130
        assert list(tmp_path.iterdir()) == []
        assert traces() == ([], [])


def test_what_a_killed_run_leaves_goes_with_the_next(tmp_path: Path) -> None:
    command = [*MODULE, "bench", "--dir", str(tmp_path), "--workload", "create", "--seconds", "60"]
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while not list(tmp_path.glob("*/create/lower")) and running.poll() is None:
        time.sleep(0.01)
    running.kill()
    running.wait()
    assert traces()[0] == []
    # Its processes are killed with it, and let go of the folder a moment later.
    deadline = time.monotonic() + 30
    while list(tmp_path.iterdir()) and time.monotonic() < deadline:
        with bench.Bench(tmp_path):
            pass
    assert list(tmp_path.iterdir()) == []


def test_a_report_is_one_page_without_anything_from_elsewhere(place: Path) -> None:
    pytest.importorskip("matplotlib")
    from overlaykit.bench import report
    from overlaykit.bench.machine import machine

    found = run(place, "create", "copy-up-4KiB", "copy-up-64KiB", targets=only("host", "overlaykit"))
    page = report.write(place / "report", [*found, Missing("<b>", "x", "because & so")], machine(place))
    text = page.read_text()
    assert text.count("<svg") == 2
    assert "&lt;b&gt; on x: because &amp; so" in text
    assert "http://" not in text.replace("http://www.w3.org/", "")
    assert report.INK not in text
    assert {file.name.partition("-")[0] for file in page.parent.glob("*.png")} == {"ratios", "copy"}


def test_a_name_that_is_not_known_is_told_with_those_that_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--workload", "nosuch"]) == 2
    assert "no workload 'nosuch'; there are: seq-write" in capsys.readouterr().err
