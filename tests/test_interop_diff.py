"""The same changes in a container of Docker and in one of ours: the same lines from diff.

Docker gives the names of one directory in the order of a Go map, another one each time, so the lines are sorted here.
Names that Docker mounts over (/etc/hosts, /etc/hostname, /etc/resolv.conf) stay out of it.
"""

from __future__ import annotations

from pathlib import Path

import ours
import peers
import pytest
from ours import op

CASES = {
    "nothing": [],
    "add a file": [op("write", "/etc/new", "x")],
    "add an empty file": [op("write", "/etc/new", "")],
    "add a file at the root": [op("write", "/new", "x")],
    "add a directory": [op("mkdir", "/etc/new.d")],
    "add nested directories": [op("makedirs", "/opt/a/b/c"), op("write", "/opt/a/b/c/file", "x")],
    "add beside names that sort around a slash": [
        op("makedirs", "/opt/a"),
        op("write", "/opt/a/x", "1"),
        op("write", "/opt/a-b", "2"),
        op("write", "/opt/a.b", "3"),
        op("write", "/opt/a0", "4"),
    ],
    "add a symlink": [op("symlink", "/etc/self", "self"), op("symlink", "/etc/out", "/nowhere")],
    "add a fifo": [op("mkfifo", "/tmp/pipe")],
    "add a name with spaces": [op("write", "/etc/two words", "x")],
    "write a file": [op("write", "/etc/motd", "other\n")],
    "write the same content": [op("write", "/etc/motd", "welcome\n")],
    "append to a file": [op("append", "/etc/motd", "more\n")],
    "overwrite the beginning": [op("overwrite", "/etc/motd", "WEL")],
    "truncate a file": [op("truncate", "/etc/motd", 2)],
    "lengthen a file": [op("truncate", "/etc/motd", 100_000)],
    "touch a file": [op("touch", "/etc/motd")],
    "touch a directory": [op("touch", "/etc")],
    "chmod a file": [op("chmod", "/etc/motd", 0o600)],
    "chmod to what it was": [op("chmod", "/etc/motd", 0o644)],
    "chmod a directory": [op("chmod", "/etc/conf.d", 0o700)],
    "chmod sticky and setgid": [op("chmod", "/lib/deep", 0o3755)],
    "chmod there and back": [op("chmod", "/etc/motd", 0o600), op("chmod", "/etc/motd", 0o644)],
    "chown a file": [op("chown", "/etc/motd", 1000, 1000)],
    "chown a directory": [op("chown", "/lib/deep", 1000, 0)],
    "chown a symlink": [op("chown", "/lib/link", 1000, 1000)],
    "chown a setuid program": [op("chown", "/bin/setuid", 1, 1)],
    "chown a capable program": [op("chown", "/bin/capable", 0, 0)],
    "delete a file": [op("unlink", "/etc/motd")],
    "delete two of three files": [op("unlink", "/etc/conf.d/a"), op("unlink", "/etc/conf.d/b")],
    "delete a symlink": [op("unlink", "/lib/link")],
    "delete one name of three": [op("unlink", "/lib/deep/uno")],
    "delete a tree": [op("rm", "/lib/deep")],
    "delete a tree at the root": [op("rm", "/home")],
    "delete what was added": [op("write", "/etc/new", "x"), op("unlink", "/etc/new")],
    "delete a tree that was added": [op("makedirs", "/opt/a/b"), op("rm", "/opt/a")],
    "delete a file and make it again": [op("unlink", "/etc/motd"), op("write", "/etc/motd", "again\n")],
    "delete a tree and make it again": [op("rm", "/lib/deep"), op("mkdir", "/lib/deep")],
    "delete a tree and make half of it again": [
        op("rm", "/lib/deep"),
        op("makedirs", "/lib/deep/er"),
        op("write", "/lib/deep/er/data", "short"),
        op("write", "/lib/deep/three", "3"),
    ],
    "empty a directory": [op("unlink", "/etc/conf.d/a"), op("unlink", "/etc/conf.d/b"), op("touch", "/etc/conf.d")],
    "a directory becomes a file": [op("rm", "/lib/deep"), op("write", "/lib/deep", "a file now")],
    "a directory becomes a symlink": [op("rm", "/etc/conf.d"), op("symlink", "/etc/conf.d", "/tmp")],
    "a file becomes a directory": [
        op("unlink", "/etc/motd"),
        op("mkdir", "/etc/motd"),
        op("write", "/etc/motd/x", "1"),
    ],
    "a file becomes an empty directory": [op("unlink", "/etc/motd"), op("mkdir", "/etc/motd")],
    "a file becomes a symlink": [op("unlink", "/etc/motd"), op("symlink", "/etc/motd", "hostname")],
    "a file becomes a fifo": [op("unlink", "/etc/motd"), op("mkfifo", "/etc/motd")],
    "a symlink becomes a file": [op("unlink", "/lib/link"), op("write", "/lib/link", "1\n")],
    "a symlink becomes a directory": [
        op("unlink", "/lib/link"),
        op("mkdir", "/lib/link"),
        op("write", "/lib/link/x", ""),
    ],
    "a symlink points elsewhere": [op("unlink", "/lib/link"), op("symlink", "/lib/link", "deep/two")],
    "a fifo becomes a file": [op("unlink", "/tmp/queue"), op("write", "/tmp/queue", "x")],
    "rename a file": [op("rename", "/etc/motd", "/etc/motto")],
    "rename a file into another directory": [op("rename", "/etc/motd", "/home/motd")],
    "rename over a file": [op("rename", "/etc/motd", "/etc/empty")],
    "rename there and back": [op("rename", "/etc/motd", "/etc/x"), op("rename", "/etc/x", "/etc/motd")],
    "rename a symlink": [op("rename", "/lib/link", "/lib/chain")],
    "rename a directory that was added": [
        op("makedirs", "/opt/a"),
        op("write", "/opt/a/x", "1"),
        op("rename", "/opt/a", "/opt/b"),
    ],
    "link to a file of the image": [op("link", "/etc/motd", "/etc/motd2")],
    "link to a file that was added": [op("write", "/etc/new", "x"), op("link", "/etc/new", "/etc/newer")],
    "write through one name of three": [op("append", "/lib/deep/one", "more")],
    "write through a symlink": [op("write", "/lib/link", "through\n")],
    "change deep down": [op("chmod", "/lib/deep/er/data", 0o600)],
    "many at once": [
        op("write", "/etc/motd", "all\n"),
        op("unlink", "/etc/empty"),
        op("rm", "/lib/deep/er"),
        op("makedirs", "/srv/www/html"),
        op("write", "/srv/www/html/index", "<p>"),
        op("chmod", "/home/user", 0o755),
        op("rename", "/etc/passwd", "/etc/passwd-"),
        op("symlink", "/srv/link", "www"),
        op("rm", "/var/log"),
        op("mkdir", "/var/log"),
    ],
}


@pytest.fixture(scope="module")
def image(docker: peers.Docker, small_rootfs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root of a store with the image small:diff, which Docker has too."""
    docker("import", small_rootfs, "small:diff")
    root = tmp_path_factory.mktemp("diff") / "store"
    ours.command(root, "import", small_rootfs, "small:diff")
    return root


@pytest.mark.parametrize("case", CASES)
def test_diff_says_what_docker_says(case: str, docker: peers.Docker, image: Path) -> None:
    import overlaykit

    operations = CASES[case]
    there = docker("run", "--detach", "--network", "none", "small:diff", "sh", "-c", ours.shell(operations)).strip()
    try:
        assert docker("wait", there).strip() == "0", docker("logs", there)
        expected = sorted(docker("diff", there).splitlines())
    finally:
        docker("rm", "--force", there)
    with overlaykit.Store(image) as store, store.create(store.image("small:diff")) as container:
        ours.perform(container.fs, operations)
        assert sorted(f"{change.kind} {change.path}" for change in container.diff()) == expected
        name = container.name
    assert sorted(ours.command(image, "diff", name).stdout.splitlines()) == expected
