"""The index: names of one lower file stay names of one file over copy-up, in process and in mounts (index=on)."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from kernel_overlay import mounted, needs_kernel_overlay
from users import somebody

from overlaykit import Overlay
from overlaykit.errors import Unsupported

pytestmark = needs_kernel_overlay
NAMES = ("a", "d/b", "d/c")  # of one lower file


@pytest.fixture
def base(tmp_path: Path) -> Path:
    for name in ("lower/d", "upper", "work", "theirs", "scrap", "merged"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "lower/a").write_text("lower")
    for name in NAMES[1:]:
        os.link(tmp_path / "lower/a", tmp_path / "lower" / name)
    (tmp_path / "lower/single").write_text("single")
    return tmp_path


def ours(base: Path) -> Overlay:
    return Overlay([base / "lower"], base / "upper", base / "work", index=True)


def theirs(base: Path) -> Any:
    return mounted([base / "lower"], base / "upper", base / "work", base / "merged", index=True)


def seen(fs: Any, root: str) -> dict[str, tuple[int, int, str]]:
    """Number, links and content of each name that is there."""
    out = {}
    for name in NAMES:
        if os.path.basename(name) in fs.listdir(f"{root}/{os.path.dirname(name)}"):
            st = fs.stat(f"{root}/{name}")
            with fs.open_it(f"{root}/{name}") as file:
                out[name] = (st.st_ino, st.st_nlink, file.read())
    return out


class InKernel:
    """The os module's functions, as an Overlay has them."""

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    open_it = staticmethod(open)


class InProcess:
    def __init__(self, overlay: Overlay) -> None:
        self.overlay = overlay

    def __getattr__(self, name: str) -> Any:
        return getattr(self.overlay, name)

    def open_it(self, path: str, mode: str = "r") -> Any:
        return self.overlay.open(path, mode)


def append(fs: Any, path: str) -> None:
    with fs.open_it(path, "a") as file:
        file.write("+")


def test_a_write_to_one_name_is_seen_by_all_and_by_the_kernel(base: Path) -> None:
    ino = (base / "lower/a").stat().st_ino
    with ours(base) as overlay:
        append(InProcess(overlay), "/d/b")
        found = seen(InProcess(overlay), "")
    assert found == dict.fromkeys(NAMES, (ino, 3, "lower+"))
    with theirs(base):
        assert seen(InKernel(), str(base / "merged")) == found
        append(InKernel(), str(base / "merged/a"))
    with ours(base) as overlay:
        assert seen(InProcess(overlay), "") == dict.fromkeys(NAMES, (ino, 3, "lower++"))
    assert (base / "lower/a").read_text() == "lower"


def entries(work: Path) -> dict[str, dict[str, bytes]]:
    """The index: each entry's name and marks. A mount leaves a whiteout for its next ones there, which opening removes."""
    index = work / "index"
    return {
        entry.name: {n: os.getxattr(entry, n) for n in os.listxattr(entry) if n.startswith("trusted.overlay.")}
        for entry in index.iterdir()
        if not entry.name.startswith("#")
    }


def program(fs: Any, root: str) -> None:
    append(fs, f"{root}/d/b")
    append(fs, f"{root}/single")
    fs.unlink(f"{root}/a")
    fs.link(f"{root}/d/b", f"{root}/new")
    fs.rename(f"{root}/new", f"{root}/newer")
    fs.chmod(f"{root}/d/c", 0o600)


def test_the_index_is_written_as_the_kernel_writes_it(base: Path) -> None:
    with mounted([base / "lower"], base / "theirs", base / "scrap", base / "merged", index=True):
        program(InKernel(), str(base / "merged"))
    with ours(base) as overlay:
        program(InProcess(overlay), "")
    assert entries(base / "work") == entries(base / "scrap")
    (marks,) = entries(base / "work").values()
    assert set(marks) == {"trusted.overlay.origin", "trusted.overlay.nlink"}


def test_the_entry_goes_with_the_last_name(base: Path) -> None:
    with ours(base) as overlay:
        append(InProcess(overlay), "/a")
        for name in NAMES:
            assert len(os.listdir(base / "work/index")) == 1
            overlay.unlink(f"/{name}")
        assert os.listdir(base / "work/index") == []
    with theirs(base):
        assert seen(InKernel(), str(base / "merged")) == {}


def test_without_an_index_they_break_apart(base: Path) -> None:
    """As in a mount with index=off."""
    with Overlay([base / "lower"], base / "upper", base / "work") as overlay:
        append(InProcess(overlay), "/a")
        assert {name: content for name, (_, _, content) in seen(InProcess(overlay), "").items()} == {
            "a": "lower+", "d/b": "lower", "d/c": "lower"
        }  # fmt: skip


def test_the_index_of_another_upper_is_refused(base: Path) -> None:
    with ours(base) as overlay:
        append(InProcess(overlay), "/a")
    with pytest.raises(Unsupported, match="is another upper's"):
        Overlay([base / "lower"], base / "theirs", base / "work", index=True)
    shutil.rmtree(base / "work/index")
    with ours(base) as overlay:  # as the hint has it
        overlay.stat("/a")


def test_what_is_no_entry_is_refused(base: Path) -> None:
    with ours(base) as overlay:
        append(InProcess(overlay), "/a")
    (base / "work/index/strange").touch()
    with pytest.raises(Unsupported, match="'strange' is no entry"):
        ours(base)


def test_a_count_that_a_killed_process_left_is_put_right(base: Path) -> None:
    """Between its two writes link() says the count in terms of the lower file's links."""
    with ours(base) as overlay:
        append(InProcess(overlay), "/a")
    (entry,) = (base / "work/index").iterdir()
    assert os.getxattr(entry, "trusted.overlay.nlink") == b"U+1"
    os.setxattr(entry, "trusted.overlay.nlink", b"L+0")
    with ours(base) as overlay:
        assert {links for _, links, _ in seen(InProcess(overlay), "").values()} == {3}
    assert os.getxattr(entry, "trusted.overlay.nlink") == b"U+1"


def test_who_may_not_follow_handles_is_told(base: Path) -> None:
    Overlay(
        [base / "lower"], base / "theirs", base / "scrap"
    ).close()  # what is imported at the first opening may be out of that user's reach
    with somebody(base / "lower", base / "upper", base / "work"), pytest.raises(Unsupported, match="DAC_READ_SEARCH"):
        ours(base)
