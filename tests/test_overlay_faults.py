"""Faults at every system call of a change: ENOSPC, EIO, EINTR, SIGKILL, injected by strace. Afterwards the merged tree is
the one from before or the one that was wanted, and the next opening finds nothing in work.

A few places are tried, as OVERLAYKIT_STRESS_SEED says; OVERLAYKIT_FAULTS=all tries every one (some minutes).
"""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from faults import ALL, calls, dice, needs_strace, traced
from kernel_overlay import SCRATCH

from overlaykit.overlay import Overlay, View

pytestmark = needs_strace

FAULTS = ("error=ENOSPC", "error=EIO", "error=EINTR", "signal=KILL")
SOME = 12  # places of an operation that are tried unless all are
Change = Callable[[Overlay], object]


def copied(change: Change) -> Change:
    """`change`, on an overlay in which /dir/f has been copied up."""

    def run(overlay: Overlay) -> None:
        change(overlay)

    run.first = lambda overlay: overlay.chmod("/dir/f", 0o600)  # type: ignore[attr-defined]
    return run


CHANGES: dict[str, Change] = {
    "open a lower file for writing": lambda o: os.close(o.open_fd("/dir/sub/large", os.O_WRONLY)),
    "change a lower file's mode": lambda o: o.chmod("/dir/sub/large", 0o600),
    "make a file over a whiteout": lambda o: o.mknod("/gone", 0o100644),
    "rename a lower file over another": lambda o: o.rename("/dir/f", "/dir/g"),
    "rename a copied-up file": copied(lambda o: o.rename("/dir/f", "/new")),
    "exchange two lower files": lambda o: o.rename("/dir/f", "/dir/sub/large", flags=2),
    "unlink a lower file": lambda o: o.unlink("/dir/f"),
    "unlink a copied-up file": copied(lambda o: o.unlink("/dir/f")),
    "remove a lower tree": copied(lambda o: o.rmtree("/dir")),
}


class Place:
    """A lower, and an upper with a whiteout; `again` makes a fresh upper and work."""

    def __init__(self, base: Path, change: Change) -> None:
        self.base, self.change = base, change
        self.lower, self.upper, self.work = base / "lower", base / "upper", base / "work"
        (self.lower / "dir" / "sub").mkdir(parents=True)
        (self.lower / "dir" / "sub").chmod(0o2750)
        (self.lower / "dir" / "f").write_text("f")
        (self.lower / "dir" / "g").write_text("g")
        (self.lower / "gone").write_text("gone")
        large = self.lower / "dir" / "sub" / "large"
        large.write_bytes(bytes(range(256)) * 2000)
        os.chown(large, 1000, 1000)
        large.chmod(0o4755)
        os.setxattr(large, "user.k", b"v")

    def again(self) -> None:
        for path in (self.upper, self.work):
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir()
        with self.open() as overlay:
            overlay.unlink("/gone")
            getattr(self.change, "first", lambda overlay: None)(overlay)

    def open(self) -> Overlay:
        return Overlay([self.lower], self.upper, self.work)

    def tree(self) -> dict[str, Any]:
        """What the merged tree shows, but for times of directories and of what was written just now."""
        out: dict[str, Any] = {}
        with View([self.lower, self.upper]) as view:
            todo = ["/"]
            while todo:
                path = todo.pop()
                st = view.lstat(path)
                out[path] = [
                    oct(st.st_mode),
                    st.st_uid,
                    st.st_gid,
                    [(k, view.getxattr(path, k)) for k in view.listxattr(path)],
                ]
                if stat.S_ISDIR(st.st_mode):
                    todo += [path.rstrip("/") + "/" + name for name in view.listdir(path)]
                else:
                    out[path].append(view.read_bytes(path))
        return out

    def run(self, *strace: str) -> tuple[str, str]:
        """How the change ends in a child under strace ("done", an errno's name, "killed"), and what strace wrote."""
        self.again()

        def prepare() -> Callable[[], object]:
            overlay = self.open()
            return lambda: self.change(overlay)

        return traced(prepare, self.base / "log", *strace)


@pytest.mark.parametrize("name", CHANGES)
def test_a_fault_at_any_system_call_leaves_the_tree_before_or_after(name: str) -> None:
    with tempfile.TemporaryDirectory(dir=SCRATCH) as folder:
        place = Place(Path(folder), CHANGES[name])
        place.again()
        before = place.tree()
        answer, log = place.run()
        assert answer == "done"
        after = place.tree()
        places = [(call, when, fault) for call, when in calls(log) for fault in FAULTS]
        assert len(places) > 4 * len(FAULTS)
        if not ALL:
            places = dice(name).sample(places, SOME)
        for call, when, fault in places:
            answer, _ = place.run("-e", f"trace={call}", "-e", f"inject={call}:{fault}:when={when}")
            where = f"{fault} at {call} {when}: {answer}"
            assert (answer == "killed") == (fault == "signal=KILL"), where
            found = place.tree()
            assert found in ((after,) if answer == "done" else (before, after)), where
            with place.open():
                assert os.listdir(place.work / "work") == [], where
            assert place.tree() == found, where
