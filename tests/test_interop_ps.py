"""`ps --filter` beside a real dockerd: the same containers, the same names."""

from __future__ import annotations

from pathlib import Path

import ours
import peers

FILTERS = (
    ("name=ps-web",),
    ("name=^/ps-web$",),
    ("name=^ps-web$",),
    ("name=webbed", "name=ps-box"),
    ("label=ps=test",),
    ("label=ps=test", "label=other"),
    ("volume=/srv",),
    ("volume=ps-data",),
    ("volume=ps-da",),
    ("ancestor=ps-base:1",),
    ("ancestor=ps-made:1",),
    ("ancestor=ps-none:1",),
    ("status=created",),
    ("status=running",),
    ("status=odd",),
    ("colour=red",),
)
FEWER = (["-n", "2"], ["--last", "1"], ["-n", "0"], ["-n", "9"], ["-n", "-1"], ["-l"], ["--latest", "-n", "2"])


def test_filters_list_what_docker_lists(own_docker: peers.Docker, small_rootfs: Path, tmp_path: Path) -> None:
    docker = own_docker
    docker("import", small_rootfs, "ps-base:1")
    ours.command(tmp_path / "store", "import", small_rootfs, "ps-base:1")
    both = (
        lambda *args: docker.run(*args, check=False),
        lambda *args: ours.command(tmp_path / "store", *args, check=False),
    )
    try:
        for run in both:
            for args in (
                ("create", "--name", "ps-box", "ps-base:1", "sh"),
                ("create", "--name", "ps-webbed", "-l", "ps=test", "-l", "other", "-v", "ps-data:/srv", "ps-base:1", "sh"),
                ("commit", "ps-webbed", "ps-made:1"),
                ("create", "--name", "ps-web", "ps-made:1", "sh"),
            ):
                done = run(*args)
                assert done.returncode == 0, (args, done.stderr)
        for filters in FILTERS:
            options = [word for text in filters for word in ("--filter", text)]
            results = [run("ps", "-a", "--format", "{{.Names}}", *options) for run in both]
            theirs, mine = ((done.returncode, [n for n in done.stdout.split() if n.startswith("ps-")]) for done in results)
            assert mine == theirs, filters
        for options in (*FEWER, ["-l", "--filter", "name=ps-box"], ["-n", "2", "--filter", "label=ps=test"]):
            theirs, mine = (run("ps", "-a", "--format", "{{.Names}}", *options) for run in both)
            assert (mine.returncode, mine.stdout) == (theirs.returncode, theirs.stdout), options
    finally:
        docker("rm", "ps-box", "ps-webbed", "ps-web", check=False)
        docker("volume", "rm", "ps-data", check=False)
