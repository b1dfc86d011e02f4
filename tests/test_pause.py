"""commit while something runs in a container: it stands still meanwhile, and goes on whatever becomes of the commit."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import ours
import peers
import pytest

from overlaykit import InUse, Store, StoredImage
from overlaykit.overlay.pausing import paused, running_in

# A line in one file, and then the same in another: apart by one at most, at any moment.
COUNTING = "i=0; echo > /ready; while :; do i=$((i+1)); echo $i >> /first; echo $i >> /second; done"


@pytest.fixture
def root(small_rootfs: Path, tmp_path: Path) -> Iterator[Path]:
    """The root of a store with a container called box."""
    peers.need_root("mounts")
    with Store(tmp_path / "store") as store:
        store.import_rootfs(small_rootfs, "base:1")
        store.create("base:1", name="box")
        yield store.root


@contextmanager
def exec_in(root: Path, script: str) -> Iterator[list[int]]:
    """The processes of `overlaykit exec box -- sh -c SCRIPT`, once it has made /ready."""
    argv = [sys.executable, "-c", ours.MAIN, "--root", os.fspath(root), "exec", "box", "--", "sh", "-c", script]
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL, start_new_session=True) as program:
        try:
            with Store(root) as store:
                upper = store.snapshots.fs(store.container("box").id)
            until(lambda: (upper / "ready").exists())
            yield running_in(upper)
        finally:
            while left := running_in(upper):
                for pid in left:
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            program.wait(120)


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.005)


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def make_large(root: Path) -> None:
    """Let the writable layer take a while to be packed."""
    with Store(root) as store, store.container("box") as box:
        for number in range(8):
            box.fs.path(f"/large{number}").write_bytes(os.urandom(8 << 20))


def numbers(image: StoredImage, store: Store) -> tuple[int, int]:
    with store.create(image) as box:
        return lines(box.fs.path("/first").read_text()), lines(box.fs.path("/second").read_text())


def test_what_runs_stands_still_and_goes_on(root: Path) -> None:
    make_large(root)
    with exec_in(root, COUNTING) as pids, Store(root) as store:
        until(lambda: numbers_in(store)[1] > 100)
        seen: list[str] = []
        done = threading.Event()
        (program,) = pids

        def watch() -> None:
            while not done.is_set():
                seen.append(state(program))
                time.sleep(0.005)

        watcher = threading.Thread(target=watch)
        watcher.start()
        image = store.container("box").commit()
        done.set()
        watcher.join()
        first, second = numbers(image, store)
        assert first - second in (0, 1)
        assert re.fullmatch("[^T]*T+[^T]*", "".join(seen))  # it stood still once, and all the time
        assert state(program) != "T"
        now = numbers_in(store)[1]
        until(lambda: numbers_in(store)[1] > now)


def numbers_in(store: Store) -> tuple[int, int]:
    upper = store.snapshots.fs(store.container("box").id)
    return lines((upper / "first").read_text()), lines((upper / "second").read_text())


def lines(text: str) -> int:
    assert text.split() == [str(number + 1) for number in range(text.count("\n"))]
    return text.count("\n")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_commit_that_is_killed_leaves_nothing_stopped(root: Path, number: int) -> None:
    make_large(root)
    with exec_in(root, COUNTING) as (program,):
        argv = [sys.executable, "-c", ours.MAIN, "--root", os.fspath(root), "commit", "box", "half:1"]
        with subprocess.Popen(argv, stderr=subprocess.DEVNULL, start_new_session=True) as commit:
            until(lambda: state(program) == "T")
            os.killpg(commit.pid, number)
            assert commit.wait(120) != 0
        until(lambda: state(program) != "T")
    with Store(root) as store:
        assert "half:1" not in [tag for image in store.images() for tag in image.tags]


def test_a_commit_that_fails_leaves_nothing_stopped(root: Path) -> None:
    with exec_in(root, COUNTING) as (program,), Store(root) as store:
        upper = store.snapshots.fs(store.container("box").id)

        def fail() -> None:
            with paused(upper):
                assert state(program) == "T"
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            fail()
        assert state(program) != "T"


def test_a_keeper_that_is_killed_leaves_nothing_stopped(root: Path) -> None:
    with exec_in(root, COUNTING) as (program,), Store(root) as store:
        with paused(store.snapshots.fs(store.container("box").id)):
            assert state(program) == "T"
            children = Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text().split()
            (keeper,) = (int(pid) for pid in children if command(pid) == command("self"))
            os.kill(keeper, signal.SIGKILL)
        assert state(program) != "T"


def command(pid: str) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def test_all_of_many_that_fork_are_stopped(root: Path) -> None:
    forking = "echo > /ready; for n in 1 2 3 4; do (while :; do (echo $n > /n$n); done) & done; wait"
    with exec_in(root, forking), Store(root) as store:
        upper = store.snapshots.fs(store.container("box").id)
        for _ in range(5):
            with paused(upper):
                before = {path.name: path.stat().st_mtime_ns for path in upper.iterdir()}
                assert {state(pid) for pid in running_in(upper)} <= {"T", "Z"}
                time.sleep(0.05)
                assert {path.name: path.stat().st_mtime_ns for path in upper.iterdir()} == before
            until(lambda before=before: (upper / "n1").exists() and (upper / "n1").stat().st_mtime_ns != before.get("n1"))


def test_what_its_user_stopped_stays_so(root: Path) -> None:
    with exec_in(root, "sleep 100 & echo > /ready; wait"), Store(root) as store:
        upper = store.snapshots.fs(store.container("box").id)

        def sleeping() -> list[int]:
            return [pid for pid in running_in(upper) if command(str(pid)).startswith(b"sleep\0")]

        until(lambda: len(sleeping()) == 1)  # a shell until it has become sleep
        (sleeper,), pids = sleeping(), running_in(upper)
        os.kill(sleeper, signal.SIGSTOP)
        until(lambda: state(sleeper) == "T")
        with paused(upper):
            assert {state(pid) for pid in pids} == {"T"}
        assert state(sleeper) == "T"
        assert "T" not in {state(pid) for pid in pids if pid != sleeper}


def test_no_pause_lets_it_run(root: Path) -> None:
    with exec_in(root, "echo > /ready; sleep 100") as (program, *_), Store(root) as store:
        seen = []
        box = store.container("box")
        box.commit("running:1", pause=False)
        seen.append(state(program))
        assert "T" not in seen
        for flag in ("--no-pause", "--pause=false", "--pause", "-p"):
            ours.command(root, "commit", flag, "box", f"said{flag.strip('-').replace('=', '-')}:1")
        assert state(program) != "T"
        with pytest.raises(InUse):
            _ = box.fs  # only a commit goes on beside a program


def test_who_works_in_a_mount_is_stopped_and_nobody_else(root: Path, tmp_path: Path) -> None:
    with Store(root) as store:
        box = store.container("box")
        upper = store.snapshots.fs(box.id)
        place = box.mount()
        users, others = [], []
        try:
            with (place / "log").open("w") as log:
                users = [subprocess.Popen(["sleep", "100"], cwd=place), subprocess.Popen(["sleep", "100"], stdout=log)]
            others = [subprocess.Popen(["sleep", "100"], cwd=tmp_path)]
            with paused(upper):
                assert [state(user.pid) for user in users] == ["T", "T"]
                assert "T" not in {state(other.pid) for other in others}
            assert "T" not in {state(user.pid) for user in users}
            # one who commits from there does not wait for himself
            argv = [sys.executable, "-c", ours.MAIN, "--root", os.fspath(root), "commit", "box", "inside:1"]
            shell = ["sh", "-c", '"$@"; exit $?', "sh", *argv]
            subprocess.run(shell, cwd=place, check=True, timeout=300, capture_output=True)
            assert store.image("inside:1").tags == ["inside:1"]
        finally:
            for program in (*users, *others):
                program.kill()
                program.wait()
            box.unmount()


def test_files_that_are_open_in_another_process_still_refuse(root: Path) -> None:
    with Store(root) as store, Store(root) as other:
        _ = other.container("box").fs
        with pytest.raises(InUse, match="open in another process"):
            store.container("box").commit()
