"""The same copies with `docker cp` and with `overlaykit cp`: success or failure alike, and the same tree afterwards, on the
host and in the container.

One container of each for all cases: case N has a tree of its own at /c/N, and the same tree on the host. In the table "c:"
is that tree in the container, "h:" the one on the host.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import ours
import peers
import pytest
import rootfs
from treetext import differences, listing

import overlaykit
from overlaykit import cli

WHEN = 1_700_000_000  # seconds: of everything before the copy, so that what a copy touched shows as "now"
CAP_NET_RAW = rootfs.CAP_NET_RAW

# What is tried in both directions: SRC below the one tree, DST below the other, options.
BOTH_WAYS: dict[str, tuple[str, ...]] = {
    "A file to absent": ("file", "new"),
    "A file to absent in a directory": ("file", "dir2/new"),
    "A file to absent without a parent": ("file", "no/new"),
    "A file to absent below a file": ("file", "file2/new"),
    "A empty file to absent": ("empty", "new"),
    "B file to absent with a slash": ("file", "new/"),
    "B file to absent with a dot": ("file", "new/."),
    "C file to file": ("file", "file2"),
    "C file to file with a slash": ("file", "file2/"),
    "C file to another name of a hard link": ("file", "hard/one"),
    "C file to fifo": ("file", "pipe"),
    "C fifo to file": ("pipe", "file2"),
    "D file to directory": ("file", "dir2"),
    "D file to directory with a slash": ("file", "dir2/"),
    "D file to directory with a dot": ("file", "dir2/."),
    "D file over a file in a directory": ("dir/a", "dir2"),
    "D file over a directory in a directory": ("file", "conflict"),
    "D file to the directory above": ("file", "dir2/.."),
    "E directory to absent": ("dir", "new"),
    "E directory with a slash to absent": ("dir/", "new"),
    "E directory to absent with a slash": ("dir", "new/"),
    "E directory to absent without a parent": ("dir", "no/new"),
    "E empty directory to absent": ("void", "new"),
    "F directory to file": ("dir", "file"),
    "F directory to file with a slash": ("dir", "file/"),
    "F directory to fifo": ("dir", "pipe"),
    "G directory to directory": ("dir", "dir2"),
    "G directory with a slash to directory with a slash": ("dir/", "dir2/"),
    "G directory to directory with one of that name": ("dir", "merge"),
    "G directory to directory with a file of that name": ("dir", "clash"),
    "G directory to directory with a link of that name": ("linkdir/", "."),
    "G empty directory to directory": ("void", "dir2"),
    "H contents to absent": ("dir/.", "new"),
    "H contents to absent with a slash": ("dir/.", "new/"),
    "I contents to file": ("dir/.", "file"),
    "J contents to directory": ("dir/.", "dir2"),
    "J contents to directory with a dot": ("dir/.", "dir2/."),
    "J contents to an empty directory": ("dir/.", "void"),
    "J contents over a directory": ("clash/.", "merge"),
    "source that is not there": ("nothing", "new"),
    "source below a file": ("file/x", "new"),
    "source file with a slash": ("file/", "new"),
    "source file with a dot": ("file/.", "new"),
    "source with dots in it": ("dir/sub/../a", "new"),
    "source with doubled slashes": ("dir//sub", "new"),
    "source that ends in dots": ("dir/sub/..", "new"),
    "source through a link": ("linkdir/a", "new"),
    "source link": ("link", "new"),
    "source link over a file": ("link", "file2"),
    "source link into a directory": ("link", "dir2"),
    "source link, followed": ("link", "new", "-L"),
    "source link into a directory, followed": ("link", "dir2", "-L"),
    "source link with a slash to a file": ("link/", "new"),
    "source link to a directory": ("linkdir", "new"),
    "source link to a directory with a slash": ("linkdir/", "new"),
    "source link to a directory with a slash to directory": ("linkdir/", "dir2"),
    "source link to a directory, its contents": ("linkdir/.", "dir2"),
    "source link to a directory, followed": ("linkdir", "new", "-L"),
    "source link to a directory into a directory, followed": ("linkdir", "dir2", "-L"),
    "source broken link": ("broken", "dir2"),
    "source broken link, followed": ("broken", "new", "-L"),
    "source loop, followed": ("loop", "new", "-L"),
    "source of two hops, followed": ("hop", "new", "-L"),
    "destination link to a file": ("file2", "link"),
    "destination of two hops": ("file2", "hop"),
    "destination absolute link": ("file2", "absolute"),
    "destination broken link": ("file", "broken"),
    "destination link to nowhere": ("file", "lost"),
    "destination link to a directory": ("file", "linkdir"),
    "destination link to a directory with a slash": ("file", "linkdir/"),
    "destination through a link": ("file", "linkdir/new"),
    "directory to a link to a directory": ("dir2", "linkdir"),
    "directory to a link to a file": ("dir", "link"),
    "directory to a broken link": ("dir", "broken"),
    "contents to a link to a directory": ("dir2/.", "linkdir"),
    "hard links": ("hard", "new"),
    "fifo": ("pipe", "new"),
    "devices": ("devices", "new"),
    "setuid and capability": ("rights", "new"),
    "owners and modes over others": ("owned", "merge"),
    "name with blanks and letters": ("na\u00efve name", "dir2"),
    "name with pattern characters": ("[x]*", "dir2"),
    "name over 100 bytes": ("long", "new"),
}
# SRC, DST, options; one of them in the container.
ONE_WAY: dict[str, tuple[str, ...]] = {
    "into the container, owned by its user": ("h:owned", "c:new", "-a"),
    "source loop": ("h:loop", "c:new"),
    "destination loop": ("c:file", "h:loop"),
    "into the container, a socket left out": ("h:sockets", "c:new"),
    "from the container, archive": ("c:owned", "h:new", "-a"),
    "a tar into a directory": ("-", "c:dir2"),
    "a tar into a link to a directory": ("-", "c:linkdir"),
    "a tar into a file": ("-", "c:file"),
    "a tar into nothing": ("-", "c:new"),
    "a tar over what is there": ("-", "c:merge"),
    "a tar over a file with a directory": ("-", "c:clash"),
}
# Where overlaykit is meant to differ, and why. The trees are then not compared, only what overlaykit does.
DIFFERS = {
    "relative link out of the destination": "Docker refuses it as a breakout; a link is only text, and we copy it",
    "user xattrs": "Docker keeps security.capability alone; we keep all",
    "container to container": "Docker has none",
    "times": "Docker cuts them to seconds; we keep nanoseconds",
    "a user that only the container knows": "Docker asks the host for USER's number, we the container's /etc/passwd",
    "a loop in the container as source": "Docker looks where a link leads that it does not follow; we copy the link",
    "a loop in the container as destination": "Docker puts the file in the link's place; we say ELOOP",
}

CASES: dict[str, tuple[str, ...]] = {
    **{f"{name}, in": (f"h:{case[0]}", f"c:{case[1]}", *case[2:]) for name, case in BOTH_WAYS.items()},
    **{f"{name}, out": (f"c:{case[0]}", f"h:{case[1]}", *case[2:]) for name, case in BOTH_WAYS.items()},
    **ONE_WAY,
}
NUMBERS = {name: number for number, name in enumerate(CASES)}


def make(base: Path, seen_as: str) -> None:
    """The tree of one case in `base`; its programs find it at `seen_as`."""
    for name, mode in {"": 0o755, "dir": 0o750, "dir/sub": 0o711, "dir2": 0o755, "void": 0o700, "hard": 0o755}.items():
        (base / name).mkdir(parents=True, exist_ok=True)
        (base / name).chmod(mode)
    for name in ("merge/dir/sub", "merge/owned", "clash", "conflict/file", "devices", "rights", "owned", "long"):
        (base / name).mkdir(parents=True)
    files = {"file": 0o644, "file2": 0o600, "dir/a": 0o640, "dir/sub/b": 0o444, "dir2/a": 0o644, "dir2/x": 0o644}
    files |= {"merge/dir/a": 0o600, "merge/dir/own": 0o644, "merge/owned/file": 0o604, "clash/dir": 0o644, "hard/one": 0o644}
    files |= {"rights/setuid": 0o6755, "rights/capable": 0o755, "owned/file": 0o640, "owned/other": 0o644, "[x]*": 0o644}
    files |= {"na\u00efve name": 0o644, f"long/{'n' * 140}": 0o644, "conflict/other": 0o644}
    for name, mode in files.items():
        (base / name).write_text(f"this is {name}\n")
        (base / name).chmod(mode)
    (base / "empty").touch()
    os.link(base / "hard/one", base / "hard/two")
    links = {"link": "file", "linkdir": "dir", "broken": "missing", "lost": "nowhere/missing", "hop": "link"}
    links |= {"loop": "loop2", "loop2": "loop", "absolute": f"{seen_as}/file", "dir/inner": "sub/b"}
    for name, target in links.items():
        (base / name).symlink_to(target)
    os.mkfifo(base / "pipe", 0o622)
    os.mknod(base / "devices/null", 0o020666, os.makedev(1, 3))
    os.mknod(base / "devices/disk", 0o060640, os.makedev(8, 1))
    os.setxattr(base / "rights/capable", "security.capability", CAP_NET_RAW)
    for name, owner in {"owned": (1000, 1001), "owned/file": (1001, 1000), "merge/owned": (7, 8), "link": (5, 5)}.items():
        os.lchown(base / name, *owner)
    for directory, dirs, names in os.walk(base, topdown=False):
        for name in [*dirs, *names]:
            os.utime(Path(directory, name), (WHEN, WHEN), follow_symlinks=False)
    os.utime(base, (WHEN, WHEN))


class Both(NamedTuple):
    docker: peers.Docker
    container: str  # Docker's
    root: Path  # of our store, where it is called box
    host: Path


@pytest.fixture(scope="module")
def both(docker: peers.Docker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Both]:
    """A container of Docker and one of ours, made of the same tar."""
    peers.need_root("owners and devices")
    top = tmp_path_factory.mktemp("cp")
    (top / "rootfs/etc").mkdir(parents=True)
    # Docker's -a asks the host for the number of USER, so games has Debian's; user is the container's own.
    (top / "rootfs/etc/passwd").write_text("root:x:0:0::/:\ngames:x:5:60::/:\nuser:x:1234:4321::/:\n")
    for name, target in {"loop": "loop2", "loop2": "loop"}.items():
        (top / "rootfs" / name).symlink_to(target)
    for number in range(len(CASES)):
        make(top / f"rootfs/c/{number}", f"/c/{number}")
    peers.run("tar", "-c", "--xattrs", "--xattrs-include=*", "--numeric-owner", "-C", top / "rootfs", "-f", top / "tar", ".")
    docker("import", "--change", "USER games", "--change", 'CMD ["sh"]', top / "tar", "small:cp")
    ours.command(top / "store", "import", "--change", "USER games", top / "tar", "small:cp")
    ours.command(top / "store", "create", "--name", "box", "small:cp")
    container = docker("create", "small:cp").strip()
    yield Both(docker, container, top / "store", top / "host")
    docker("rm", container)


def tree_of(both: Both, path: str) -> dict[str, str]:
    """What is at `path` in Docker's container, as the kernel shows its layers."""
    data = both.docker(
        "inspect", "--format", "{{.GraphDriver.Data.UpperDir}}:{{.GraphDriver.Data.LowerDir}}", both.container
    )
    merged = both.docker.place / "merged"
    merged.mkdir(exist_ok=True)
    peers.run("mount", "-t", "overlay", "overlay", "-o", f"ro,lowerdir={data.strip()}", merged)
    try:
        return listing(merged / path)
    finally:
        peers.run("umount", merged)


def told(lines: dict[str, str]) -> dict[str, str]:
    """`lines` with the time of what the copy touched as "now"."""

    def time(found: re.Match[str]) -> str:
        return found[0] if found[1] == str(WHEN) else " mtime=now"

    return {path: re.sub(r" mtime=(\S+)", time, line) for path, line in lines.items()}


def sent_tar(place: Path) -> Path:
    """The tar that the cases with "-" send."""
    make(place / "sent/dir", "/sent")
    names = ["dir/dir", "dir/file", "dir/hard", "dir/link"]
    peers.run("tar", "-c", "--numeric-owner", "-C", place / "sent", "-f", place / "sent.tar", *names)
    peers.run("tar", "-r", "--numeric-owner", "-C", place / "sent/dir", "-f", place / "sent.tar", "dir", "owned")
    return place / "sent.tar"


@pytest.mark.parametrize("case", CASES)
def test_cp_does_what_docker_does(case: str, both: Both, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    number = NUMBERS[case]
    source, target, *options = CASES[case]
    stdin = sent_tar(tmp_path) if source == "-" else None
    outcomes = []
    for who in (both.container, "box"):
        # The same place for both, so that paths in links and messages are the same.
        shutil.rmtree(both.host, ignore_errors=True)
        make(both.host, str(both.host))
        with_socket(both.host / "sockets")
        args = [
            *options,
            *(re.sub("^h:", f"{both.host}/", re.sub("^c:", f"{who}:/c/{number}/", each)) for each in (source, target)),
        ]
        if who == "box":
            with open(stdin or os.devnull) as file:
                monkeypatch.setattr(sys, "stdin", file)
                worked = cli.main(["--root", str(both.root), "cp", *args]) == 0
            with overlaykit.Store(both.root) as store, store.container("box").view() as view:
                inside = told(listing(f"/c/{number}", fs=view))
        else:
            worked = both.docker.run("cp", *args, check=False, stdin=stdin).returncode == 0
            inside = told(tree_of(both, f"c/{number}"))
        outcomes.append((worked, inside, told(listing(both.host))))
    (docker_worked, docker_inside, docker_host), (worked, inside, host) = outcomes
    assert worked == docker_worked
    if worked:
        assert differences(docker_inside, inside) == ""
        assert differences(docker_host, host) == ""


def with_socket(directory: Path) -> None:
    directory.mkdir()
    before = Path.cwd()
    os.chdir(directory)  # a socket's path has to be short
    try:
        with socket.socket(socket.AF_UNIX) as end:
            end.bind("socket")
    finally:
        os.chdir(before)
    (directory / "file").write_text("beside it\n")
    for name in ("file", "socket", "."):
        os.utime(directory / name, (WHEN, WHEN))


def test_there_are_cases_enough() -> None:
    assert len(CASES) >= 60


# --- a stream out -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["dir", "dir/", "dir/.", "file", "link", "linkdir", "linkdir/", "hard", "rights", "void"])
def test_a_stream_out_unpacks_to_what_dockers_does(path: str, both: Both, tmp_path: Path) -> None:
    found = []
    for who, place in ((both.container, tmp_path / "docker"), ("box", tmp_path / "ours")):
        place.mkdir()
        address = f"{who}:/c/{NUMBERS['A file to absent, out']}/{path}"
        with (tmp_path / "tar").open("wb") as out:
            if who == "box":
                argv = [sys.executable, "-c", ours.MAIN, "--root", str(both.root), "cp", address, "-"]
                subprocess.run(argv, stdout=out, check=True)
            else:
                subprocess.run(["docker", "cp", address, "-"], stdout=out, env={**os.environ, **both.docker.env}, check=True)
        peers.run("tar", "-x", "--xattrs", "--xattrs-include=*", "-p", "-f", tmp_path / "tar", "-C", place)
        os.utime(place, (WHEN, WHEN))
        found.append(told(listing(place)))
    assert differences(*found) == ""


# --- where overlaykit is meant to differ --------------------------------------------------------------------------------


@pytest.mark.parametrize("case", DIFFERS)
def test_cp_differs_from_docker_where_it_is_meant_to(case: str, both: Both, tmp_path: Path) -> None:
    place = tmp_path / "src"
    place.mkdir()
    (place / "up").symlink_to("../../../etc/passwd")
    (place / "file").write_text("x")
    os.setxattr(place / "file", "user.colour", b"blue")

    def run(*args: str) -> tuple[int, int]:
        """Exit codes of Docker's cp and of ours; "c:" is the container."""
        theirs = both.docker.run("cp", *(re.sub("^c:", f"{both.container}:", each) for each in args), check=False)
        mine = ours.command(both.root, "cp", *(re.sub("^c:", "box:", each) for each in args), check=False)
        return theirs.returncode, mine.returncode

    with overlaykit.Store(both.root) as store:
        view = store.container("box").view
        match case:
            case "relative link out of the destination":
                assert run(f"{place}/up", "c:/c/") == (1, 0)
                with view() as fs:
                    assert fs.readlink("/c/up") == "../../../etc/passwd"
            case "user xattrs":
                assert run(f"{place}/file", "c:/c/xattrs") == (0, 0)
                with view() as fs:
                    assert fs.getxattr("/c/xattrs", "user.colour") == b"blue"
            case "times":
                os.utime(place / "file", ns=(0, 1_600_000_000_123_456_789))
                assert run(f"{place}/file", "c:/c/time") == (0, 0)
                with view() as fs:
                    assert fs.stat("/c/time").st_mtime_ns == 1_600_000_000_123_456_789
                assert " mtime=1600000000 " in tree_of(both, "c")["/time"]
            case "container to container":
                assert run("c:/etc/passwd", "c:/c/passwd") == (1, 0)
                with view() as fs:
                    assert fs.read_bytes("/c/passwd") == fs.read_bytes("/etc/passwd")
            case "a user that only the container knows":
                ours.command(both.root, "commit", "--change", "USER user", "box", "small:user")
                ours.command(both.root, "create", "--name", "users", "small:user")
                both.docker("commit", "--change", "USER user", both.container, "small:user")
                users = both.docker("create", "small:user").strip()
                assert both.docker.run("cp", "-a", f"{place}/file", f"{users}:/", check=False).returncode == 1
                both.docker("rm", users)
                ours.command(both.root, "cp", "-a", f"{place}/file", "users:/")
                with store.container("users").view() as fs:
                    assert (fs.stat("/file").st_uid, fs.stat("/file").st_gid) == (1234, 4321)
            case "a loop in the container as source":
                assert run("c:/loop", f"{tmp_path}/loop") == (1, 0)
                assert (tmp_path / "loop").readlink() == Path("loop2")
            case "a loop in the container as destination":
                assert run(f"{place}/file", "c:/loop") == (0, 1)
                with view() as fs:
                    assert fs.islink("/loop")
