"""overlaykit tour: the README's first command, whose every step checks itself."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import imagefiles as im
import ours
import pytest

import overlaykit
from overlaykit.cli.tour import choose
from overlaykit.oci import validate

STEPS = ["base image", "inherit", "create", "write", "copy-up", "delete", "diff", "commit", "save", "verify"]
LINE = re.compile(r" ?\d+ (?P<title>.{10}) +(?P<size>[0-9.]+[kMG]?B) +(?P<ms>\d+)   (?P<what>.+) -> (?P<where>.+)")


def steps(output: str) -> list[re.Match[str]]:
    return [found for line in output.splitlines() if (found := LINE.match(line))]


def test_the_tour_goes_all_the_way(tmp_path: Path) -> None:
    root = tmp_path / "tour"
    done = ours.command(root, "tour")
    assert done.stderr == ""
    told = steps(done.stdout)
    assert [step["title"].strip() for step in told] == STEPS
    for step in told:
        if not step["where"].startswith("$") and not step["where"].endswith("..."):
            assert (root / step["where"]).exists() or (root / step["where"]).is_char_device()
    with overlaykit.Store(root) as store:
        assert {tag for image in store.images() for tag in image.tags} == {"tour/python:1", "tour/app:1", "tour/app:2"}
        assert [container.name for container in store.containers()] == ["two", "one"]
        assert store.container("two").diff() == []
        assert validate(store.image("tour/app:2")) == []
    for line in re.findall(r"^  overlaykit --root \S+ (.+)$", done.stdout, re.MULTILINE):
        assert ours.command(root, *line.split()).stdout


def test_the_tour_of_an_image_of_ones_own(tmp_path: Path) -> None:
    image = im.write(tmp_path / "image.tar", im.docker_20(tag="own:1"), form="tar")
    done = ours.command(tmp_path / "tour", "tour", "--image", image, "--clean")
    told = [step["title"].strip() for step in steps(done.stdout)]
    assert told[0] == "load"
    assert told[-1] == "verify"
    assert not (tmp_path / "tour").exists()


def test_the_tour_wants_a_folder_of_its_own(tmp_path: Path) -> None:
    with overlaykit.Store(tmp_path / "store"):
        pass
    done = ours.command(tmp_path / "store", "tour", "--clean", check=False)
    assert done.returncode == 2
    assert (tmp_path / "store" / "store.db").exists()


def test_the_tour_needs_no_arguments(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "overlaykit", "tour", "--clean"]
    environment = {"TMPDIR": str(tmp_path), "PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run(argv, capture_output=True, text=True, check=True, env=environment)
    assert len(steps(done.stdout)) == len(STEPS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("lines", ["/ dir", "/ dir\n/etc/a.conf file 644 5000"])
def test_an_image_with_few_files_is_toured_with_fewer_steps(lines: str) -> None:
    from treetext import tree

    victim, _ = choose(tree(lines))
    assert victim is None
