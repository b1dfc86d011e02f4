"""explain: which files were copied up, what of them never changed, and what deserves a volume."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import peers
import pytest
from kernel_overlay import mounted, needs_kernel_overlay

from overlaykit import Overlay, cli
from overlaykit.bench.explain import CopiedUp, explain, find_lowers
from overlaykit.errors import NotFound


@pytest.fixture
def places(tmp_path: Path) -> tuple[Path, Path, Path]:
    """An image of a database and a configuration; an empty upper; work."""
    lower, upper, work = (tmp_path / name for name in ("lower", "upper", "work"))
    for place in (lower / "srv/db", lower / "etc", upper, work):
        place.mkdir(parents=True)
    (lower / "srv/db/data").write_bytes(os.urandom(1 << 20))
    (lower / "etc/conf").write_bytes(b"x" * 100)
    return lower, upper, work


def change(write: Path | None, fs: Overlay | None = None) -> None:
    def opened(path: str, flags: int) -> int:
        return fs.open_fd(path, flags | os.O_CREAT, 0o644) if fs else os.open(f"{write}{path}", flags | os.O_CREAT, 0o644)

    for path, at, data in (("/srv/db/data", 8192, b"changed"), ("/srv/db/new", 0, bytes(3 << 20)), ("/etc/conf", 0, b"y")):
        fd = opened(path, os.O_WRONLY)
        os.pwrite(fd, data, at)
        os.close(fd)


EXPECTED = (CopiedUp("/srv/db/data", 1 << 20, (1 << 20) - 4096), CopiedUp("/etc/conf", 100, 0))


def test_one_changed_page_leaves_the_rest_unchanged(places: tuple[Path, Path, Path]) -> None:
    lower, upper, work = places
    with Overlay([lower], upper, work) as fs:
        change(None, fs)
    found = explain(upper, [lower])
    assert found.copied_up == EXPECTED
    assert [(one.path, one.where, one.files) for one in found.advice] == [("/srv/db", "volume", 2)]


@needs_kernel_overlay
def test_an_upper_of_the_kernel_says_the_same(places: tuple[Path, Path, Path], tmp_path: Path) -> None:
    lower, upper, work = places
    (tmp_path / "merged").mkdir()
    with mounted([lower], upper, work, tmp_path / "merged") as merged:
        change(merged)
    assert explain(upper, [lower]).copied_up == EXPECTED


@needs_kernel_overlay
def test_a_metacopy_in_a_renamed_directory_is_found_where_it_was_and_copied_nothing(
    places: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    lower, upper, work = places
    (tmp_path / "merged").mkdir()
    with mounted([lower], upper, work, tmp_path / "merged", metacopy=True, redirect_dir=True) as merged:
        (merged / "srv/db").rename(merged / "srv/moved")
        (merged / "srv/moved/data").chmod(0o600)
    found = explain(upper, [lower])
    assert found.copied_up == (CopiedUp("/srv/moved/data", 0, 0),)
    assert found.size == 0


def test_a_file_that_an_opaque_directory_hides_was_not_copied_up(places: tuple[Path, Path, Path]) -> None:
    lower, upper, work = places
    with Overlay([lower], upper, work) as fs:
        fs.rmtree("/etc")
        fs.mkdir("/etc")
        fs.write_bytes("/etc/conf", b"x" * 100)
    assert explain(upper, [lower]).copied_up == ()


def test_the_lowers_are_found_as_docker_and_podman_note_them(places: tuple[Path, Path, Path], tmp_path: Path) -> None:
    home = tmp_path / "overlay2"
    for name in ("one", "two", "box"):
        (home / name / "diff").mkdir(parents=True)
    (home / "l").mkdir()
    for link, layer in (("AAA", "one"), ("BBB", "two")):
        (home / "l" / link).symlink_to(f"../{layer}/diff")
    (home / "box/lower").write_text("l/BBB:l/AAA")
    assert find_lowers(home / "box/diff") == [home / "one/diff", home / "two/diff"]
    with pytest.raises(NotFound, match="no file beside it says what is below"):
        find_lowers(places[1])


# What a container does there: a page of the database, a small file whole, a directory replaced, a large file of its own.
SCRIPT = """
echo changed | dd of=/srv/db/data bs=1 seek=9000 conv=notrunc
echo changed >/etc/conf
rm -r /opt/old && mkdir /opt/old && echo new >/opt/old/file
cat /srv/db/data /srv/db/data /srv/db/data >/srv/db/new
chmod 600 /srv/attributes
"""


def peers_image(place: Path) -> Path:
    """A tar of a root filesystem with busybox, a database, and what SCRIPT changes."""
    root = place / "root"
    for directory in ("bin", "srv/db", "etc", "opt/old"):
        (root / directory).mkdir(parents=True)
    shutil.copy(peers.peer("busybox"), root / "bin/busybox")
    for name in ("sh", "dd", "cat", "rm", "mkdir", "chmod"):
        (root / "bin" / name).symlink_to("busybox")
    (root / "srv/db/data").write_bytes(os.urandom(1 << 20))
    (root / "srv/attributes").write_bytes(os.urandom(5000))
    (root / "etc/conf").write_text("x" * 100)
    (root / "opt/old/file").write_text("old")
    peers.run("tar", "--create", "--file", place / "image.tar", "--directory", root, ".")
    return place / "image.tar"


@pytest.mark.parametrize("name", ["docker", "podman"])
def test_a_container_of_docker_or_podman_is_explained_by_its_upper_alone(
    name: str, request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    peer = request.getfixturevalue(name)
    peer("import", peers_image(tmp_path), "explain:1")
    if name == "docker":
        peer("run", "--name", "explained", "--network", "none", "explain:1", "/bin/sh", "-c", SCRIPT)
    else:  # podman sets limits that not every machine lets it set, so the script runs in its mount
        peer("create", "--name", "explained", "--network", "none", "explain:1", "/bin/sh")
        peers.run("chroot", peer("mount", "explained").strip(), "/bin/sh", "-c", SCRIPT)
        peer("umount", "explained")
    try:
        upper = json.loads(peer("inspect", "explained"))[0]["GraphDriver"]["Data"]["UpperDir"]
        assert cli.main(["explain", upper, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        copied = {one["path"]: (one["size"], one["unchanged"]) for one in found["copied_up"]}
        size, unchanged = copied.pop("/srv/attributes")
        assert (size, unchanged) in ((5000, 5000), (0, 0))  # the second with metacopy, which podman may have on
        assert copied == {"/srv/db/data": (1 << 20, (1 << 20) - 4096), "/etc/conf": (8, 0)}
        assert [(one["path"], one["where"]) for one in found["advice"]] == [("/srv/db", "volume")]
    finally:
        peer("rm", "--force", "explained")
        peer("rmi", "explain:1")


def test_the_command_reads_an_upper_with_named_lowers(
    places: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    lower, upper, work = places
    with Overlay([lower], upper, work) as fs:
        change(None, fs)
    assert cli.main(["explain", f"{upper}/", "--lower", str(lower)]) == 0
    assert "/srv/db (2 files, 4.19MB) deserves a volume" in capsys.readouterr().out
    assert cli.main(["explain", f"{upper}/", "--lower", str(lower), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["unchanged"] == (1 << 20) - 4096
