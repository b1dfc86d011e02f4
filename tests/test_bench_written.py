"""Bytes that a first write copies: counted where they are, in the writable layer, and told apart from shared ones."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import peers
import pytest

from overlaykit import bench, cli
from overlaykit.bench.method import Result
from overlaykit.bench.written import written


@pytest.fixture
def place() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as folder:
        yield Path(folder)


def first_writes(place: Path, *names: str, filesystems: tuple[str, ...] = ()) -> list[Result]:
    workloads = [workload for workload in bench.WORKLOADS if workload.name in names]
    targets = [target for target in bench.TARGETS if target.name in ("host", "overlaykit", "kernel-1", "kernel-metacopy")]
    with bench.Bench(place) as suite:
        found = suite.run(workloads=workloads, targets=targets, seconds=0, filesystems=filesystems)
        return [one for one in found if isinstance(one, Result)]


def test_a_first_write_without_reflinks_copies_the_whole_file(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = first_writes(place, "copy-up-1MiB", "create")
    assert {one.copied for one in found if one.kind != "copy-up" or one.target == "host"} == {None}
    assert all(one.copied == 30 << 20 for one in found if one.kind == "copy-up" and one.target != "host")
    bench.save(place / "r.json", found, {"cpu": "a processor"})
    assert cli.main(["bench", "show", "--markdown", str(place / "r.json")]) == 0
    shown = capsys.readouterr().out
    assert "what one first write copied into the writable layer:\n\n| WORKLOAD | overlaykit |" in shown
    assert "| copy-up-1MiB | 1 MiB |" in shown


@pytest.mark.parametrize("kind", ["btrfs", "xfs"])
def test_a_first_write_with_reflinks_shares_all_but_what_it_wrote(place: Path, kind: str) -> None:
    peers.need_root("loop mounts")
    peers.peer(f"mkfs.{kind}")
    found = [one for one in first_writes(place, "copy-up-1MiB", filesystems=(kind,)) if one.filesystem.startswith(kind)]
    layers = [one for one in found if one.target != "host"]
    assert layers
    for one in layers:
        assert one.copied is not None
        assert one.shared >= 29 << 20, one.target
        assert one.copied <= 8 << 20, one.target  # xfs takes 128 KiB in advance for each file that is written to


def test_what_is_no_regular_file_takes_nothing(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "empty").touch()
    assert written(tmp_path) == (0, 0)
