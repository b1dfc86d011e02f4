"""Benchmarks: true tables for whoever runs them, and nothing left behind however they end."""

from __future__ import annotations

import errno
import json
import math
import os
import random
import shutil
import signal
import stat
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from kernel_overlay import needs_kernel_overlay
from users import SOMEBODY

from overlaykit import bench, cli
from overlaykit.bench.files import Files
from overlaykit.bench.machine import filesystem
from overlaykit.bench.method import Missing, Result
from overlaykit.bench.rounds import Course, go_on
from overlaykit.bench.sampler import Sampler
from overlaykit.bench.spread import doubt
from overlaykit.bench.tables import certainty
from overlaykit.errors import OverlaykitError

QUICK = ["--seconds", "0", "--workload", "create", "--workload", "chmod"]
STOPS = int(os.environ.get("OVERLAYKIT_BENCH_STOPS", "3"))  # of each signal
MODULE = [sys.executable, "-m", "overlaykit"]


@pytest.fixture
def place(scratch: Path) -> Path:
    return scratch


def only(*names: str) -> list[bench.Target]:
    return [target for target in bench.TARGETS if target.name in names]


def some(*names: str) -> list[bench.Workload]:
    return [workload for workload in bench.WORKLOADS if workload.name in names]


def run(place: Path, *workloads: str, targets: list[bench.Target]) -> list[Result | Missing]:
    with bench.Bench(place) as suite:
        return list(suite.run(workloads=some(*workloads), targets=targets, seconds=0, full=True))


def traces(place: Path) -> tuple[list[str], list[str]]:
    """Mounts and loop devices of benchmarks in `place`, as this machine sees them."""
    mounts = [line for line in Path("/proc/mounts").read_text().splitlines() if str(place) in line]
    loops = [str(f) for f in Path("/sys/block").glob("loop*/loop/backing_file") if str(place) in read(f)]
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
            assert len(one.seconds) == len(one.ratios) >= 1
        else:
            assert one.reason
    assert list(place.iterdir()) == []


def test_a_run_without_time_gives_every_workload_one_round_and_a_slow_target_no_turn(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a disk whose fsync takes 10 ms the default run took several times its two minutes: no workload may take it all."""
    monkeypatch.setattr("overlaykit.bench.rounds.WARMING", 0)
    found = run(place, "create", "stat", targets=only("host", "bind", "overlaykit"))
    assert [len(one.seconds) for one in found if isinstance(one, Result)] == [1, 1]
    assert [one for one in found if isinstance(one, Missing) and one.workload] == [
        Missing(name, "bind, overlaykit", f"no time left on {filesystem(place)}: give more --seconds")
        for name in ("create", "stat")
    ]


def test_reading_is_measured_on_the_same_files_and_writing_on_a_copy(place: Path) -> None:
    """16 MiB in two places of memory were read at speeds that differed by 10 %, another way in each run."""
    (place / "lower").mkdir()
    (place / "lower" / "file").write_text("image")
    (host,) = only("host")
    for read_only in (True, False):
        with host.fresh(bench.Scene(place, place / "lower", read_only=read_only)) as files:
            assert os.path.samefile(files.root + "/file", place / "lower" / "file") is read_only


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
    for one in found:  # rounds that differ as much as they do on a machine with a little else to do
        one.ratios = [one.ratios[0] * by for by in (0.95, 1.06, 1, 0.97)]
        one.seconds = [one.seconds[0]] * 4
    slow = [
        replace(one, ratios=[ratio * 1.3 for ratio in one.ratios], seconds=[mine * 1.3 for mine in one.seconds])
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
    assert [(one["workload"], one["target"], one["sure"]) for one in worse] == [("unlink", "overlaykit", True)]


def test_a_difference_that_the_rounds_themselves_have_is_listed_and_no_failure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of two runs of the same a FUSE server's ratios differed by a quarter, and compare called that slower."""
    files = [tmp_path / name for name in ("a.json", "b.json")]
    for file, ratios in zip(files, ([7, 9.6, 7.3, 7], [9.4, 7, 9.6, 9.1]), strict=True):
        bench.save(file, [Result("truncate", "fuse", "write", "", "ops", "tmpfs", 1, None, 0, ratios, ratios, ratios)], {})
    assert cli.main(["bench", "compare", *map(str, files)]) == 0
    summary, header, row = capsys.readouterr().out.splitlines()
    assert summary == "1 ratios in both, 1 slower by more than 20%, 0 of them by more than chance"
    assert dict(zip(header.split()[-4:], row.split()[-4:], strict=True)) == {
        "BEFORE": "7.15x", "AFTER": "9.25x", "FACTOR": "1.29", "CHANCE": "1.30"
    }  # fmt: skip
    assert cli.main(["bench", "compare", "--both", *map(str, files)]) == 1  # there it is asked whether they agree


def test_a_ratio_is_that_of_rounds_that_nobody_disturbed() -> None:
    """Of three runs of the same the medians of ratios differed by more than 15 % for a dozen of them."""
    host, mine = [1.0, 1.0, 1.6, 1.02, 1.01, 1.01, 1.0, 1.02], [2.0, 3.1, 2.02, 2.06, 2.03, 2.0, 2.0, 2.04]
    ratios = [a / b for a, b in zip(mine, host, strict=True)]
    assert statistics.mean(ratios) > 2.04
    result = Result("stat", "fuse", "read", "", "ops", "tmpfs", 1, None, 0, mine, mine, ratios)
    assert result.ratio == pytest.approx(2, abs=0.015)


def test_below_the_table_stands_how_certain_its_ratios_are() -> None:
    def result(workload: str, *ratios: float) -> Result:
        return Result(workload, "kernel-1", "write", "", "ops", "tmpfs", 1, None, 0, list(ratios), [], list(ratios))

    steady, loose, wild = result("stat", 2, 2.02, 2.01), result("git", 2, 2.1, 2.2), result("sqlite", 2, 3, 4)
    assert certainty([steady, loose, wild, result("fio", 2), result("pip", 1, 1.3, 1)]) == (
        "1 of 5 ratios are certain to 5%; the least: fio on kernel-1 after one round, sqlite on kernel-1 not at all, "
        "pip on kernel-1 to 46%"
    )
    assert certainty([steady, Missing("fio", "", "is not installed")]) == "1 of 1 ratios are certain to 5%"
    assert certainty([]) == ""


def test_the_interval_of_a_ratio_holds_the_true_one_in_nineteen_cases_of_twenty() -> None:
    source = random.Random(5)
    for rounds in (2, 3, 5, 12):
        held = 0
        for _ in range(4000):
            logs = [source.gauss(1, 0.1) for _ in range(rounds)]
            held += abs(statistics.mean(logs) - 1) <= math.log1p(doubt([math.exp(log) for log in logs]))
        assert 0.94 < held / 4000 < 0.97


def test_every_round_has_new_files_and_all_targets_until_all_have_settled(place: Path) -> None:
    """With one layer for all its rounds a run said where in memory its files happened to lie, and the next one differed; and
    when those that had settled had no more rounds, what the others had in the processor's caches was more from then on."""
    seen: dict[str, list[int]] = {"host": [], "bind": [], "overlaykit": []}

    @contextmanager
    def watched(target: bench.Target, scene: bench.Scene) -> Iterator[Files]:
        seen[target.name].append(scene.lower.stat().st_ino)
        with target.fresh(scene) as files:
            yield files

    targets = [replace(target, fresh=partial(watched, target)) for target in only(*seen)]
    course = Course(*some("create"), targets, place, rootless=os.geteuid() != 0, filesystem="")
    missing = list(course.first(0))
    for _ in range(4):
        assert not course.settled
        course.again()
    ran = [one.target for one in course.results]
    assert {*ran, *(one.target for one in missing)} == set(seen)
    for one in course.results:
        assert len(one.ratios) == len(set(seen[one.target])) == 5
        one.ratios[:] = [2, 2.02, 1.99, 2, 2]
    assert course.settled
    course.results[-1].ratios[:] = [2, 2.5, 1.8, 2, 2]
    assert not course.settled
    course.again()
    assert {one.target: len(one.ratios) for one in course.results} == dict.fromkeys(ran, 6)


def test_all_targets_of_a_workload_have_as_many_runs_in_a_sample(place: Path) -> None:
    """Runs get faster one after the other, as their memory comes into the caches: who had three in a sample instead of two,
    by the time that its first one took, was a quarter faster in all of that run."""
    runs = 0

    def run(_: Files) -> int:
        nonlocal runs
        runs += 1
        return 1

    (place / "lower").mkdir()
    scene, workload = bench.Scene(place, place / "lower"), bench.Workload("", "", "read", run, again=lambda files: None)
    for seconds, expected in ((0.001, 5), (0.0014, 5), (0.01, 5), (0.03, 3), (0.09, 3)):
        with closing(Sampler(workload, *only("host"), scene)) as sampler:
            sampler.warm_up()
            sampler.seconds, runs = seconds, 0
            sampler.plan(0.001)
            sampler.sample()
        assert runs == expected, seconds


def test_the_time_left_goes_to_the_least_certain_and_all_have_their_fewest(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("overlaykit.bench.rounds.MOST", 7)
    targets, rootless = only("host", "overlaykit"), os.geteuid() != 0
    courses = [Course(one, targets, place, rootless=rootless, filesystem="") for one in some("create", "stat", "unlink")]
    for course in courses:
        list(course.first(0))
    go_on(courses, time.monotonic())
    assert [course.rounds for course in courses] == [1, 1, 1]
    go_on(courses, math.inf)
    assert all(course.settled and 5 <= course.rounds <= 7 for course in courses)
    (new, even, odd) = courses
    new.rounds, even.rounds, odd.rounds = 4, 5, 7
    even.results[1].ratios[:], odd.results[1].ratios[:] = [2, 2.1, 2], [2, 2.5, 1.8, 2, 2]
    assert sorted(courses, key=lambda one: one.need) == [even, odd, new]


def test_all_that_is_measured_is_on_one_processor_and_the_caller_where_it_was(place: Path) -> None:
    """A FUSE server's ratios were those of waking up another processor, or not: five times as much on an idle machine as on
    a busy one, and a fifth more for minutes."""

    def look(_: Files) -> int:
        seen = subprocess.run(["sh", "-c", "grep Cpus_allowed_list /proc/self/status"], capture_output=True, check=True)
        (place / "seen").write_bytes(seen.stdout)
        return 1

    before = os.sched_getaffinity(0)
    with bench.Bench(place) as suite:
        seen = list(suite.run(workloads=[bench.Workload("look", "", "read", look)], targets=only("host"), seconds=0))
    assert [one.workload for one in seen if isinstance(one, Result)] == ["look"]
    assert (place / "seen").read_text().split() == ["Cpus_allowed_list:", str(max(before))]
    assert os.sched_getaffinity(0) == before


@needs_kernel_overlay
def test_a_full_disk_ends_its_workload_and_not_the_run(place: Path) -> None:
    """Whatever had been measured so far was lost, with a traceback."""
    full = place / "full"
    full.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "none", full], check=True)
    try:
        found = run(full, "seq-write", "create", "sqlite", targets=only("host", "bind", "kernel-1", "overlaykit"))
        assert list(full.iterdir()) == []
    finally:
        subprocess.run(["umount", full], check=True)
    missing = {(one.workload, one.target): one.reason for one in found if isinstance(one, Missing)}
    for target in ("host", "bind", "kernel-1", "overlaykit"):
        assert missing["seq-write", target] == "No space left on device"
    assert any(reason.startswith("sqlite3: ") for reason in missing.values()), missing
    assert {one.target for one in found if isinstance(one, Result) and one.workload == "create"} >= {"host", "bind"}


def test_what_goes_wrong_later_leaves_what_was_measured(place: Path) -> None:
    """A disk that ran full in the fifth round, say: the run ended with a traceback and without a table."""
    runs = 0

    def run(files: Files) -> int:
        nonlocal runs
        runs += 1
        if runs > 20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        time.sleep(0.002 * (runs % 3 + 1))
        return 1

    course = Course(bench.Workload("sleep", "", "read", run), only("host", "bind"), place, rootless=False, filesystem="")
    assert not any(one.target == "" for one in course.first(10))
    go_on([course], math.inf)
    assert course.settled
    assert course.ended.endswith(" rounds: No space left on device")
    assert all(len(one.seconds) == course.rounds >= 1 for one in course.results)
    assert list(place.iterdir()) == []


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


@needs_kernel_overlay
def test_the_rootless_overlay_is_one_of_a_user_namespace_for_root_too(place: Path) -> None:
    scene = bench.Scene(place, place / "lower")
    scene.lower.mkdir()
    os.mknod(scene.lower / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    (target,) = only("kernel-rootless")
    with target.fresh(scene) as files:
        with pytest.raises(PermissionError):  # no devices on what a user has mounted
            os.open(files.root + "/null", os.O_RDONLY)
        assert files.upper is not None
        os.mkdir(files.root + "/new")
        assert (files.upper / "new").is_dir()
    assert str(place) not in Path("/proc/self/mountinfo").read_text()


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
        assert running.communicate(timeout=300)[1].strip() == "overlaykit: interrupted"  # click ends a ^C line
        assert running.returncode == 130
        assert list(tmp_path.iterdir()) == []
        mounts, _ = traces(tmp_path)
        assert mounts == []
        # Another program that began a mount namespace meanwhile keeps a loop device for as long as it has copies of mounts.
        end = time.monotonic() + 120
        while traces(tmp_path)[1]:
            assert time.monotonic() < end
            time.sleep(0.05)


def test_what_a_killed_run_leaves_goes_with_the_next(tmp_path: Path) -> None:
    moments = random.Random(9)
    for _ in range(STOPS):
        command = [*MODULE, "bench", "--dir", str(tmp_path), "--workload", "create", "--workload", "chmod"]
        running = subprocess.Popen([*command, "--filesystems", "--seconds", "60"], stdout=subprocess.DEVNULL)
        while not list(tmp_path.iterdir()) and running.poll() is None:
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 4))
        running.kill()
        running.wait()
        # Its processes are killed with it, and let go of the folder, of mounts and of loop devices a moment later.
        deadline = time.monotonic() + 120
        while (list(tmp_path.iterdir()) or traces(tmp_path) != ([], [])) and time.monotonic() < deadline:
            with bench.Bench(tmp_path):
                pass
        assert list(tmp_path.iterdir()) == []
        assert traces(tmp_path) == ([], [])


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
