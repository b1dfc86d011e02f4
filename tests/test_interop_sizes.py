"""How much images, layers and containers hold, beside a real dockerd: the same numbers, in lists and in inspect. And what
`inspect` says of the mounts that --mount asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ours
import peers
import pytest
from ours import op

import overlaykit

OPERATIONS = (
    op("mkdir", "/big"),
    op("write", "/big/file", "x" * 100_000),
    op("link", "/big/file", "/big/same"),
    op("symlink", "/big/link", "/some/where/else"),
    op("write", "/big/sparse", ""),
    op("truncate", "/big/sparse", 1_000_000),
    op("mkfifo", "/big/pipe"),
    op("unlink", "/etc/motd"),
    op("append", "/etc/passwd", "x:x:7:7::/:/bin/sh\n"),
    op("rm", "/lib/deep"),
)
MOUNTS = (
    "type=volume,src=size-v,dst=/v,volume-nocopy,volume-label=a=b,volume-opt=type=tmpfs,volume-opt=device=tmpfs",
    "type=bind,src=/tmp,dst=/t,readonly,bind-propagation=rslave",
    "type=tmpfs,dst=/s,tmpfs-size=1m,tmpfs-mode=700",
    "type=volume,dst=/anonymous",
    "type=volume,src=size-w,dst=/a,readonly,volume-driver=local",
    "type=bind,src=/tmp,dst=/again",
)


class Both:
    """A command on both sides, that has to work on both."""

    def __init__(self, docker: peers.Docker, root: Path) -> None:
        self.docker, self.root = docker, root

    def __call__(self, *args: str) -> tuple[str, str]:
        return self.docker(*args), ours.command(self.root, *args).stdout

    def same(self, *args: str) -> str:
        theirs, mine = self(*args)
        assert mine == theirs, args
        return mine

    def inspected(self, *args: str) -> tuple[Any, Any]:
        theirs, mine = self("inspect", *args)
        return json.loads(theirs)[0], json.loads(mine)[0]


@pytest.fixture
def both(docker: peers.Docker, small_rootfs: Path, tmp_path: Path) -> Both:
    docker("import", small_rootfs, "size-base:1")
    ours.command(tmp_path / "store", "import", small_rootfs, "size-base:1")
    return Both(docker, tmp_path / "store")


def test_sizes_are_dockers(both: Both, tmp_path: Path) -> None:
    script = ours.shell(OPERATIONS)
    both.docker("run", "--name", "size-box", "--network", "none", "-v", "size-data:/data", "size-base:1", "sh", "-c", script)
    ours.command(both.root, "create", "--name", "size-box", "-v", "size-data:/data", "size-base:1")
    with overlaykit.Store(both.root) as store, store.container("size-box") as box:
        ours.perform(box.fs, OPERATIONS)
        box.fs.path("/data/not-counted").write_text("x" * 50_000)
    try:
        both("commit", "size-box", "size-made:1")
        both("create", "--name", "size-fresh", "size-made:1", "sh")
        names = ("size-box", "size-fresh")
        for name in names:
            # Docker's own layer between the image's and the container's holds nothing
            sizes = [{key: side[key] for key in ("SizeRw", "SizeRootFs")} for side in both.inspected("--size", name)]
            assert sizes[1] == sizes[0], name
            assert not any("SizeRw" in side for side in both.inspected(name))
            shown = both.same("ps", "-a", "--filter", f"name=^{name}$", "--format", "{{.Names}} {{.Size}}")
            assert "virtual" in shown
        assert both.same("inspect", "--size", "--format", "{{.SizeRw}} {{.SizeRootFs}}", *names)
        assert all("SIZE" in side.splitlines()[0] for side in both("ps", "-a", "-s"))
        for image in ("size-base:1", "size-made:1"):
            theirs, mine = both.inspected(image)
            assert mine["Size"] == theirs["Size"] > 0
            both.same("images", "--format", "{{.Repository}} {{.Size}}", image)
            both.same("history", "--format", "{{.Size}}", image)
        # read from the archive, before anything of it is unpacked
        both.docker("save", "-o", str(tmp_path / "saved.tar"), "size-made:1")
        ours.command(tmp_path / "second", "load", tmp_path / "saved.tar")
        (size,) = ours.command(tmp_path / "second", "images", "--format", "{{.Size}}").stdout.split()
        assert size == both.same("images", "--format", "{{.Size}}", "size-made:1").strip()
    finally:
        both.docker("rm", *names, check=False)
        both.docker("volume", "rm", "size-data", check=False)


def test_inspect_lists_what_mount_options_asked_for(both: Both) -> None:
    options = [word for text in MOUNTS for word in ("--mount", text)]
    both("create", "--name", "size-mounts", *options, "-v", "size-x:/x", "-v", "/nameless", "size-base:1", "sh")
    # not of the first: Docker has no --volumes-from of a tmpfs
    both("create", "--name", "size-two", "--mount", MOUNTS[1], "--mount", MOUNTS[4], "size-base:1", "sh")
    both("create", "--name", "size-from", "--volumes-from", "size-two", "size-base:1", "sh")
    try:
        theirs, mine = both.inspected("size-mounts")
        assert mine["HostConfig"]["Mounts"] == theirs["HostConfig"]["Mounts"]
        theirs, mine = both.inspected("size-from")
        assert mine["HostConfig"]["Mounts"] is theirs["HostConfig"].get("Mounts") is None
        assert both.same("rm", "-v", "size-mounts", "size-from") == "size-mounts\nsize-from\n"
    finally:
        both.docker("rm", "-v", "size-mounts", "size-two", "size-from", check=False)
        both.docker("volume", "rm", "size-v", "size-w", "size-x", check=False)
