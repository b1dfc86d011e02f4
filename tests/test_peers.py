"""The tests' own tools: a missing peer is never silent in CI, and a daemon leaves nothing on the machine."""

from __future__ import annotations

import re
from pathlib import Path

import ours
import peers
import pytest
from ours import op
from test_interop_diff import CASES
from treetext import listing


def test_a_missing_peer_skips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "IN_CI", False)
    with pytest.raises(pytest.skip.Exception, match="no-such-tool is not installed"):
        peers.peer("no-such-tool")


def test_a_missing_peer_fails_in_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "IN_CI", True)
    with pytest.raises(pytest.fail.Exception, match="no-such-tool is not installed"):
        peers.peer("no-such-tool")


def test_a_failing_peer_shows_its_output() -> None:
    with pytest.raises(AssertionError, match="exit code 3\nout\nerr"):
        peers.run("sh", "-c", "echo out; echo err >&2; exit 3")


def test_a_daemon_leaves_nothing_behind(small_rootfs: Path) -> None:
    with peers.docker_daemon() as docker:
        docker("import", small_rootfs, "small:1")
        docker("run", "--detach", "--network", "none", "small:1", "sleep", "1000")
        assert processes_of(docker.place)
    assert processes_of(docker.place) == []
    assert not docker.place.exists()
    assert str(docker.place) not in Path("/proc/self/mountinfo").read_text()


def processes_of(place: Path) -> list[bytes]:
    found = []
    for entry in Path("/proc").iterdir():
        try:
            command = (entry / "cmdline").read_bytes() if entry.name.isdigit() else b""
        except OSError:
            continue  # ended in between
        if bytes(place) in command:
            found.append(command)
    return found


@pytest.mark.parametrize("case", CASES)
def test_changes_are_the_same_in_a_directory_and_in_a_shell(case: str, small_rootfs: Path, tmp_path: Path) -> None:
    """What the diff tests do to Docker's container and to ours is one thing, or they would compare nothing."""
    peers.need_root("chroot and other owners")
    for name in ("directory", "shell"):
        (tmp_path / name).mkdir()
        options = ["--xattrs", "--xattrs-include=*", "--warning=no-unknown-keyword"]
        peers.run("tar", "-xpf", small_rootfs, *options, "-C", tmp_path / name)
    ours.perform(ours.Plain(tmp_path / "directory"), CASES[case])
    peers.run("chroot", tmp_path / "shell", "/bin/sh", "-c", ours.shell(CASES[case]))
    assert untimed(listing(tmp_path / "directory")) == untimed(listing(tmp_path / "shell"))


def untimed(lines: dict[str, str]) -> list[str]:
    return [re.sub(r" mtime=\S+", "", line) for line in lines.values()]


def test_an_operation_without_a_shell_form_is_an_error() -> None:
    with pytest.raises(ValueError, match="setxattr"):
        ours.shell([op("setxattr", "/etc/motd", "user.x", b"y")])
