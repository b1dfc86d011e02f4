"""A table of volume cases, each done by a real dockerd and by overlaykit: equal success or failure of each command, equal
volumes with equal trees, equal mounts of the container.

Not in it, since overlaykit is meant to differ: a filling that is interrupted (Docker leaves it half done, here it is empty
or full: tests/test_volumes.py), the times of directories and symlinks (Docker loses them), a source such as ./data (Docker's
client takes it for a path beside it, here paths are absolute), what a failed `create` leaves (here no volume), and
`volume prune`, which in newer Dockers and here spares volumes that have a name.
"""

from __future__ import annotations

import io
import json
import os
import shlex
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import ours
import peers
import pytest
import rootfs

from overlaykit.cli import main

IMAGE = "volumes:1"  # has VOLUME /var/anon
CREATE = f"create --name box {{}} {IMAGE} sh"

# What is done, a command a line; @ is an option of `create`. HOST is a directory of the host with `file` and `dir/inner`.
CASES = {
    "a named volume is filled": ["@ -v data:/etc"],
    "a named volume over nothing": ["@ -v data:/nothing/there"],
    "a named volume over a file": ["@ -v data:/srv"],
    "nocopy": ["@ -v data:/etc:nocopy"],
    "copy": ["@ -v data:/etc:copy"],
    "read-only is filled too": ["@ -v data:/etc:ro"],
    "through a symlink": ["@ -v data:/mnt"],
    "lib with its links": ["@ -v data:/lib"],
    "home": ["@ -v data:/home"],
    "the sticky directory": ["@ -v data:/tmp"],
    "an anonymous volume": ["@ -v /etc"],
    "an anonymous volume of the image is named": ["@ -v data:/var/anon"],
    "a bind over VOLUME": ["@ -v HOST:/var/anon"],
    "two volumes": ["@ -v data:/etc -v more:/lib"],
    "one place twice": ["@ -v data:/etc -v more:/etc"],
    "one place twice, spelled otherwise": ["@ -v data:/etc -v more:/etc/"],
    "one place by both options": ["@ -v data:/etc --mount src=more,dst=/etc"],
    "nested": ["@ -v data:/etc -v more:/etc/conf.d"],
    "an existing volume": ["volume create data", "@ -v data:/etc"],
    "create again": ["volume create data", "volume create data"],
    "create with labels": ["volume create --label a=b data"],
    "create with a bad name": ["volume create .data"],
    "create with a short name": ["volume create d"],
    "create with a slash": ["volume create a/b"],
    "mount a relative path": ["@ -v a/b:/etc"],
    "a relative target": ["@ -v data:etc"],
    "the root": ["@ -v data:/"],
    "the root by dots": ["@ -v data:/etc/.."],
    "an unknown mode": ["@ -v data:/etc:xx"],
    "two modes": ["@ -v data:/etc:ro,rw"],
    "an anonymous volume with a mode": ["@ -v /etc:ro"],
    "nocopy of a bind": ["@ -v HOST:/etc:nocopy"],
    "propagation of a volume": ["@ -v data:/etc:rshared"],
    "too many colons": ["@ -v data:/etc:ro:x"],
    "a bind": ["@ -v HOST:/etc"],
    "a bind, read-only": ["@ -v HOST:/etc:ro"],
    "a bind of a file": ["@ -v HOST/file:/etc/motd"],
    "a bind with propagation": ["@ -v HOST:/etc:rslave"],
    "--mount of a volume": ["@ --mount type=volume,src=data,dst=/etc"],
    "--mount without a type": ["@ --mount source=data,target=/etc"],
    "--mount nocopy": ["@ --mount src=data,dst=/etc,volume-nocopy"],
    "--mount readonly": ["@ --mount src=data,dst=/etc,readonly"],
    "--mount not readonly": ["@ --mount src=data,dst=/etc,readonly=false"],
    "--mount of a bind": ["@ --mount type=bind,src=HOST,dst=/etc"],
    "--mount of a bind that is missing": ["@ --mount type=bind,src=HOST/missing,dst=/etc"],
    "--mount of a relative bind": ["@ --mount type=bind,src=missing,dst=/etc"],
    "--mount without a target": ["@ --mount src=data"],
    "--mount with an unknown key": ["@ --mount src=data,dst=/etc,colour=blue"],
    "--mount with a bind's option on a volume": ["@ --mount src=data,dst=/etc,bind-propagation=rslave"],
    "--mount with a label": ["@ --mount src=data,dst=/etc,volume-label=a=b"],
    "--mount of an unknown type": ["@ --mount type=cloud,src=data,dst=/etc"],
    "volumes-from nobody": ["@ --volumes-from nobody"],
    "volumes-from in a bad mode": ["create --name first volumes:1 sh", "@ --volumes-from first:xx"],
    "own before volumes-from": ["create --name first -v data:/etc volumes:1 sh", "@ --volumes-from first -v own:/etc"],
    "volumes-from": ["create --name first -v data:/etc -v HOST:/h volumes:1 sh", "@ --volumes-from first"],
    "volumes-from, read-only": ["create --name first -v data:/etc -v HOST:/h:ro volumes:1 sh", "@ --volumes-from first:ro"],
    "volumes-from, read-write": ["create --name first -v data:/etc:ro -v /lib volumes:1 sh", "@ --volumes-from first:rw"],
    "volumes-from of two": [
        "create --name first -v data:/etc volumes:1 sh",
        "create --name second -v more:/lib volumes:1 sh",
        "@ --volumes-from first --volumes-from second:ro",
    ],
    "an anonymous --mount": ["@ --mount dst=/etc"],
    "an anonymous --mount, read-only": ["@ --mount type=volume,dst=/etc,readonly"],
    "one volume twice, of which one has something": ["@ -v data:/etc -v data:/nothing/there"],
    "one volume twice, of which one is not copied": ["@ -v data:/etc -v data:/lib:nocopy"],
    "a volume with options": ["volume create --opt type=tmpfs --opt device=tmpfs --opt o=size=1m data", "@ -v data:/etc"],
    "a bind as a volume": ["volume create --opt type=none --opt o=bind --opt device=HOST data", "@ -v data:/etc"],
    "a bind as a volume that is missing": [
        "volume create --opt type=none --opt o=bind --opt device=HOST/missing data",
        "@ -v data:/etc",
    ],
    "nfs without a kernel for it": ["volume create --opt type=nfs --opt device=:/x data", "@ -v data:/etc"],
    "an option that there is not": ["volume create --opt colour=blue data"],
    "a type without a device": ["volume create --opt type=tmpfs data"],
    "a device without a type": ["volume create --opt device=tmpfs data"],
    "o without both": ["volume create --opt o=size=1m data"],
    "a size": ["volume create --opt size=1m data"],
    "a driver that there is not": ["volume create --driver nothing data"],
    "--tmpfs": ["@ --tmpfs /run"],
    "--tmpfs with options": ["@ --tmpfs /run:size=1m,mode=1770,noexec"],
    "--tmpfs over VOLUME": ["@ --tmpfs /var/anon"],
    "--tmpfs at a relative path": ["@ --tmpfs run"],
    "--tmpfs at the root": ["@ --tmpfs /"],
    "--tmpfs where a volume is": ["@ --tmpfs /etc -v data:/etc"],
    "--mount of a tmpfs": ["@ --mount type=tmpfs,dst=/run,tmpfs-size=64k,tmpfs-mode=1770"],
    "--mount of a tmpfs with a source": ["@ --mount type=tmpfs,src=x,dst=/run"],
    "--mount of a tmpfs with a bad size": ["@ --mount type=tmpfs,dst=/run,tmpfs-size=xx"],
    "--mount of a tmpfs with a bad mode": ["@ --mount type=tmpfs,dst=/run,tmpfs-mode=9"],
    "--mount of a tmpfs with a volume's option": ["@ --mount type=tmpfs,dst=/run,volume-nocopy"],
    "--mount of a volume with a tmpfs's option": ["@ --mount src=data,dst=/run,tmpfs-size=1m"],
    "rm of some": ["volume create data", "volume rm nothing data"],
    "rm of a used volume": ["@ -v data:/etc", "volume rm data"],
    "rm of a free volume": ["@ -v data:/etc", "rm box", "volume rm data"],
    "rm of no volume": ["volume rm nothing"],
    "a volume outlives its container": ["@ -v data:/etc", "rm box"],
    "rm -v takes anonymous volumes only": ["@ -v data:/etc -v /lib", "rm -v box"],
    "rm -v spares what another has": ["@ -v /lib", "create --name second --volumes-from box volumes:1 sh", "rm -v box"],
    "rename": ["@ -v data:/etc", "rename box other", "rename other box"],
    "rename to a name that is taken": ["create --name first volumes:1 sh", "@", "rename first box"],
}


INIT = {"hostname", "hosts", "resolv.conf", "mtab"}  # Docker puts files of its own in their place in every container


class Side:
    """Docker or overlaykit, by its command."""

    def __init__(self, run: Callable[..., subprocess.CompletedProcess[str]], host: Path) -> None:
        self.run, self.host = run, host

    def __call__(self, line: str) -> bool:
        line = CREATE.format(line[1:]) if line.startswith("@") else line
        return self.run(*shlex.split(line.replace("HOST", str(self.host))), check=False).returncode == 0

    def volumes(self) -> dict[str, Any]:
        """Each volume's tree; anonymous ones by what is in them."""
        names = self.run("volume", "ls", "--quiet", check=True).stdout.split()
        found = {}
        for facts in json.loads(self.run("volume", "inspect", *names, check=True).stdout) if names else []:
            lines = tree(Path(facts["Mountpoint"]))
            labels = {k: v for k, v in (facts["Labels"] or {}).items() if not k.startswith("com.docker")}
            name = facts["Name"] if len(facts["Name"]) < 64 else f"anonymous {len(lines)}"
            found[name] = (lines, labels)
        return found

    def mounts(self) -> list[tuple[Any, ...]] | None:
        done = self.run("inspect", "box", check=False)
        if done.returncode:
            return None
        facts = json.loads(done.stdout)[0]
        keys = ("Type", "Destination", "Mode", "RW", "Propagation")
        found = [(*(mount[key] for key in keys), shown_source(mount)) for mount in facts["Mounts"]]
        return sorted(found, key=str)

    def clear(self) -> None:
        if ids := self.run("ps", "-aq", check=True).stdout.split():
            self.run("rm", "-f", *ids, check=True)
        if names := self.run("volume", "ls", "--quiet", check=True).stdout.split():
            self.run("volume", "rm", *names, check=True)


def shown_source(mount: dict[str, Any]) -> str:
    if mount["Type"] == "bind":
        return str(mount["Source"])
    name = str(mount.get("Name", ""))  # a tmpfs has none
    return name if len(name) < 64 else "anonymous"


def tree(top: Path) -> list[tuple[object, ...]]:
    found: list[tuple[object, ...]] = []
    for path in [top, *top.rglob("*")]:
        if path.name in INIT:
            continue
        st = path.lstat()
        content = path.read_bytes() if stat.S_ISREG(st.st_mode) else os.readlink(path) if path.is_symlink() else ""
        xattrs = {name: os.getxattr(path, name, follow_symlinks=False) for name in os.listxattr(path, follow_symlinks=False)}
        links = 0 if path.is_dir() else st.st_nlink
        # what was made just now has that time; Docker keeps those of files only, and we all
        when = st.st_mtime_ns if st.st_mtime < 1_750_000_000 and stat.S_ISREG(st.st_mode) else 0
        name = os.fsencode(path.relative_to(top))
        found.append((name, oct(st.st_mode), st.st_uid, st.st_gid, st.st_rdev, when, links, content, sorted(xattrs.items())))
    return sorted(found, key=lambda line: str(line[0]))


@pytest.fixture(scope="module")
def sides(docker: peers.Docker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Side, Side]]:
    peers.need_root("dockerd's volumes are root's")
    place = tmp_path_factory.mktemp("volumes")
    host = place / "host"
    (host / "dir/inner").mkdir(parents=True)
    (host / "file").write_text("host\n")
    rootfs.write(place / "rootfs.tar")
    docker("import", "--change", "VOLUME /var/anon", place / "rootfs.tar", IMAGE)
    root = place / "store"
    ours.command(root, "import", "--change", "VOLUME /var/anon", place / "rootfs.tar", IMAGE)

    def run(*args: str, check: bool) -> subprocess.CompletedProcess[str]:
        out = io.StringIO()
        with redirect_stdout(out), redirect_stderr(io.StringIO()):
            code = main(["--root", str(root), *args])
        assert not (check and code), args
        return subprocess.CompletedProcess(args, code, out.getvalue())

    yield Side(docker.run, host), Side(run, host)
    docker("rmi", IMAGE)
    shutil.rmtree(root)


@pytest.mark.parametrize("case", CASES)
def test_docker_and_overlaykit_do_the_same(case: str, sides: tuple[Side, Side]) -> None:
    theirs, mine = sides
    try:
        done = [(line, theirs(line), mine(line)) for line in CASES[case]]
        assert [(line, here) for line, _, here in done] == [(line, there) for line, there, _ in done]
        if done[-1][1] or not done[-1][0].startswith("@"):
            assert mine.volumes() == theirs.volumes()
        assert mine.mounts() == theirs.mounts()
    finally:
        theirs.clear()
        mine.clear()
