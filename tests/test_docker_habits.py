"""What the fingers of a Docker user type, done by a real dockerd and here: the same lists, the same exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import ours
import peers
import pytest

StrPath = str | os.PathLike[str]


class Both:
    """A dockerd and a store with the same image habits:1 (CMD sh)."""

    def __init__(self, docker: peers.Docker, root: Path) -> None:
        self.docker, self.root = docker, root

    def __call__(self, *args: StrPath) -> tuple[tuple[int, str], tuple[int, str]]:
        """Exit code and output of the command there and here."""
        theirs, mine = self.docker.run(*args, check=False), ours.command(self.root, *args, check=False)
        return (theirs.returncode, theirs.stdout), (mine.returncode, mine.stdout)

    def same(self, *args: StrPath) -> str:
        """What both print; exit code 0."""
        theirs, mine = self(*args)
        assert mine == (0, theirs[1]), args
        assert theirs[0] == 0, args
        return mine[1]

    def work(self, *args: StrPath) -> None:
        theirs, mine = self(*args)
        assert (theirs[0], mine[0]) == (0, 0), args


@pytest.fixture
def both(own_docker: peers.Docker, small_rootfs: Path, tmp_path: Path) -> Iterator[Both]:
    docker = own_docker
    both = Both(docker, tmp_path / "store")
    docker("import", "--change", "CMD sh", "--change", "LABEL stage=test", small_rootfs, "habits:1")
    docker("save", "-o", tmp_path / "habits.tar", "habits:1")
    ours.command(both.root, "load", "-i", tmp_path / "habits.tar")
    yield both
    docker("rm", "--force", *docker("ps", "--all", "--quiet", "--filter", "name=habits").split(), "none", check=False)
    docker("rmi", "--force", *docker("images", "--quiet", "--filter", "reference=*habits*").split(), "none", check=False)
    docker("image", "prune", "--force")
    docker("volume", "rm", "--force", *docker("volume", "ls", "--quiet").split(), "none", check=False)


LISTS = [
    ["habits*"],
    ["h?bits:[12]"],
    ["habits"],
    ["habits:2"],
    ["localhost/*"],
    ["localhost/habits"],
    ["*"],
    ["--filter", "reference=habits*"],
    ["--filter", "reference=*/habits", "--filter", "reference=habits:2"],
    ["--filter", "dangling=false"],
    ["--filter", "dangling=true"],
    ["--filter", "dangling=false", "*/*"],
    ["--filter", "label=stage"],
    ["--filter", "label=stage=test", "--filter", "label=colour"],
    ["--filter", "label=stage=live"],
    ["--filter", "before=habits:2"],
    ["--filter", "since=habits:1"],
    ["--filter", "since=habits:1", "--filter", "dangling=false"],
    ["--all"],
    ["--all", "--filter", "dangling=true"],
]


def test_images_are_chosen_as_dockers(both: Both) -> None:
    """There was no --filter, and so no `rmi $(images --quiet --filter dangling=true)`."""
    for name, tag in (("habits-1", "habits:2"), ("habits-2", "localhost/habits:2")):
        both.work("create", "--name", name, "habits:1")
        both.work("commit", "--change", f"LABEL colour={name}", name, tag)
    both.work("commit", "--change", "LABEL colour=red", "habits-1", "localhost/habits:2")  # the one before has no name now
    for args in LISTS:
        found = [
            sorted(line for line in output.splitlines() if "habits" in line or "<none>" in line)
            for _, output in both("images", "--format", "{{.Repository}}:{{.Tag}} {{.Size}}", *args)
        ]
        assert found[1] == found[0], args
    for args in (["--filter", "colour=red"], ["--filter", "before=nothing:1"], ["--filter", "dangling=maybe"]):
        (their_code, _), (my_code, _) = both("images", *args)
        assert (their_code, my_code) == (1, 1), args


def test_who_says_no_to_prune_is_asked_for_nothing_more(both: Both) -> None:
    """It was taken for Ctrl-C: exit code 130, and "interrupted"."""
    for what, docker in (["prune"], ["image", "prune"]), (["volume", "prune"], ["volume", "prune"]):
        assert both.docker.run(*docker, check=False).returncode == 0  # at the end of its input
        for said in ("", "n\n"):
            argv = [sys.executable, "-c", ours.MAIN, "--root", str(both.root), *what]
            done = subprocess.run(argv, input=said, capture_output=True, text=True, timeout=60, check=False)
            assert (done.returncode, done.stdout) == (0, ""), what
            assert "interrupted" not in done.stderr
    assert "habits" in both.same("images", "--format", "{{.Repository}}", "habits")


def test_create_and_exec_take_the_terminal_flags(both: Both) -> None:
    """`create -it` is how most people write it; `exec -it box sh` looked for a container called -it."""
    both.work("create", "-it", "--name", "habits-1", "habits:1")
    both.docker("run", "--detach", "-it", "--name", "habits-2", "--network", "none", "habits:1")
    ours.command(both.root, "create", "-it", "--name", "habits-2", "habits:1")
    assert both.same("exec", "-i", "habits-2", "cat", "/etc/motd") == "welcome\n"
    for args in (["--workdir", "/etc", "habits-2", "cat", "motd"], ["--env", "A=b", "habits-2", "sh", "-c", "echo $A"]):
        both.same("exec", *args)
    for args in (["sh", "-c", "exit 7"], ["/etc/motd"], ["/etc"]):
        (their_code, _), (my_code, _) = both("exec", "habits-2", *args)
        assert my_code == their_code != 0, args
    (their_code, _), (my_code, _) = both("exec", "--workdir", "/nowhere", "habits-2", "true")
    assert my_code == their_code == 126
    assert ours.command(both.root, "exec", "habits-2", "nowhere", check=False).returncode == 127  # as `docker run` has it


PASSWD = """root:x:0:0:root:/root:/bin/sh
app:x:1001:1002:An app:/srv/app:/bin/sh
short:x:12
12:x:77:78::/named:

home:x:5:6::
"""
GROUP = """root:x:0:
apps:x:1002:
web:x:33:app,short
logs:x:44:root,app
short:x:55
"""
WHO = [
    "",
    "app",
    "1001",
    "app:web",
    "1001:web",
    "app:99",
    "4242",
    "4242:web",
    ":web",
    "12",
    "77",
    "home",
    "app:short",
    "0:44",
]
WHO += ["app:short", "short", "root:logs", "app:", "1001:", ":"]
NOBODY = ["nobody", "app:nobody", "-1", "99999999999", "2147483648", "app:-3", "app:4294967295"]


def test_exec_is_who_docker_is(both: Both, tmp_path: Path) -> None:
    """Programs ran as root, whatever USER the image had."""
    for name, text in (("passwd", PASSWD), ("group", GROUP)):
        (tmp_path / name).write_text(text)
    both.docker("run", "--detach", "-it", "--name", "habits-1", "--network", "none", "habits:1")
    ours.command(both.root, "create", "--name", "habits-1", "habits:1")
    both.work("cp", tmp_path / "passwd", "habits-1:/etc/passwd")
    both.work("cp", tmp_path / "group", "habits-1:/etc/group")
    say = "cd / && id -u && id -g && echo $HOME"
    for who in WHO:
        both.same("exec", "--user", who, "habits-1", "sh", "-c", say + (" && id -G" if who not in ("", ":") else ""))
    for who in NOBODY:
        (their_code, _), (my_code, _) = both("exec", "--user", who, "habits-1", "true")
        assert their_code != 0, who
        assert my_code == 1, who
    both.work("commit", "--change", "USER app", "habits-1", "habits:2")
    both.docker("run", "--detach", "-it", "--name", "habits-2", "--network", "none", "habits:2")
    ours.command(both.root, "create", "--name", "habits-2", "habits:2")
    assert both.same("exec", "habits-2", "sh", "-c", say) == "1001\n1002\n/srv/app\n"
    assert both.same("exec", "-u", "root", "-e", "HOME=/mine", "habits-2", "sh", "-c", say) == "0\n0\n/mine\n"
    both.docker("rm", "--force", "habits-1", "habits-2")


REFUSED = [
    ["import", "--platform", "bogus", "/dev/null"],
    ["create", "--env", "=x", "habits:1"],
    ["create", "--label", "", "habits:1"],
    ["create", "--label", "=x", "habits:1"],
    ["create", "--workdir", "etc", "habits:1"],
    ["volume", "create", "--label", "=x", "habits-v"],
    ["tag", "habits:1", "sha256"],
    ["tag", "habits:1", "sha256:abcd"],
]


@pytest.mark.parametrize("args", REFUSED, ids=" ".join)
def test_what_makes_no_sense_is_refused(args: list[str], both: Both) -> None:
    """It was written down as it stood: a container that starts in "etc" of nowhere, a variable without a name."""
    (their_code, _), (my_code, _) = both(*args)
    assert their_code != 0
    assert my_code == 1
    assert ours.command(both.root, "ps", "--quiet").stdout == ours.command(both.root, "volume", "ls", "--quiet").stdout == ""


def test_a_container_gets_another_name_or_none(both: Both) -> None:
    """To be called what it is called already was a success; a script did not hear of its mistake."""
    both.work("create", "--name", "habits-1", "habits:1")
    both.work("create", "--name", "habits-2", "habits:1")
    for args in (["habits-1", "habits-1"], ["habits-1", "habits-2"], ["habits-1", "-x"], ["habits-3", "habits-4"]):
        (their_code, _), (my_code, _) = both("rename", *args)
        assert their_code != 0, args
        assert my_code in (1, 2), args
    both.work("rename", "habits-1", "habits-4")


def test_a_variable_without_a_value_is_ours_or_none(both: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--env KEY` with no such variable set an empty one; with Docker the program has none."""
    monkeypatch.setenv("HABIT", "strong")
    monkeypatch.delenv("NOBODY", raising=False)
    args = ["--env", "HABIT", "--env", "NOBODY", "--env", "EMPTY=", "--name", "habits-1", "habits:1"]
    both.work("create", *args)
    theirs, mine = (json.loads(output) for _, output in both("inspect", "--format", "{{json .Config.Env}}", "habits-1"))
    assert mine == ["HABIT=strong", "EMPTY="]
    # Docker's order is that of a hash table.
    assert sorted(each for each in theirs if "=" in each and not each.startswith("PATH=")) == sorted(mine)
    printed = ours.command(both.root, "exec", "-e", "NOBODY", "habits-1", "sh", "-c", "echo $HABIT ${NOBODY-none}").stdout
    assert printed == "strong none\n"


def test_forced_removal_of_what_is_not_there_is_no_error(both: Both) -> None:
    both.work("create", "--name", "habits-1", "habits:1")
    assert both.same("rm", "--force", "habits-0", "habits-1") == "habits-1\n"
    for command in ("rm", "rmi"):
        both.work(command, "--force", "habits-0")
        (their_code, _), (my_code, _) = both(command, "habits-0")
        assert (their_code, my_code) == (1, 1)


def test_binds_are_listed_as_they_were_asked_for(both: Both) -> None:
    both.work("create", "--name", "habits-1", "-v", "habits-z:/z", "-v", "habits-b:/b:ro", "-v", "/srv:/a", "habits:1")
    theirs, mine = (json.loads(text) for _, text in both("inspect", "--format", "{{json .HostConfig.Binds}}", "habits-1"))
    assert mine == ["habits-z:/z", "habits-b:/b:ro", "/srv:/a"]
    assert sorted(theirs) == sorted(mine)  # Docker's command has them in a hash table


def test_history_says_what_the_container_ran_and_not_what_the_image_will(both: Both) -> None:
    both.work("create", "--name", "habits-1", "habits:1", "sh", "-c", "true")
    both.work("commit", "--change", 'CMD ["other"]', "habits-1", "habits:2")
    assert both.same("history", "--format", "{{.CreatedBy}}", "habits:2") == "sh -c true\n\n"
    assert both.same("inspect", "--format", "{{.Config.Cmd}}", "habits:2") == "[other]\n"


def test_import_needs_no_name(both: Both, small_rootfs: Path) -> None:
    both.work("import", small_rootfs)
    assert both.same("images", "--filter", "dangling=true", "--format", "{{.Repository}} {{.Size}}") == "<none> 2.01MB\n"


def test_a_closed_stream_is_as_good_as_dev_null(small_rootfs: Path, tmp_path: Path) -> None:
    """Python has None for it, which was a traceback; and the next file to be opened would get its number."""
    root = tmp_path / "store"
    ours.command(root, "import", small_rootfs, "habits:1")
    ours.command(root, "create", "--name", "box", "habits:1")
    all_three = "<&- >&- 2>&-"
    for command, closed in (
        *((command, "<&-") for command in ("load", "cp - box:/tmp", "write box /q", "import - none:1", "prune")),
        *(("images", closed) for closed in (">&-", "2>&-", all_three)),
        ("cp - box:/tmp", all_three),
    ):
        code = f"import sys; sys.path[:0] = {sys.path!r}; {ours.MAIN}"
        argv = [sys.executable, "-c", code, "--root", str(root), *command.split()]
        shell = ["sh", "-c", f'exec "$@" {closed}', "sh", *argv]
        done = subprocess.run(shell, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == (1 if command == "load" else 0), command  # an empty file is no image
        assert "Traceback" not in done.stderr, command
    assert ours.command(root, "fsck").stdout == ""


def test_an_empty_argument_is_said_to_be_empty(both: Both) -> None:
    """An empty program was a traceback; an empty path an error without a name."""
    ours.command(both.root, "create", "--name", "habits-1", "habits:1")
    for args, code, said in (
        (["exec", "habits-1", ""], 2, "no program to run"),
        (["exec", "habits-1", "--"], 2, "no program to run"),
        (["cat", "habits-1", ""], 1, "'': No such file or directory"),
        (["cp", "", "habits-1:/"], 1, "'': No such file or directory"),
    ):
        done = ours.command(both.root, *args, check=False)
        assert (done.returncode, done.stdout) == (code, ""), args
        assert said in done.stderr
        assert "Traceback" not in done.stderr


def test_what_is_not_utf_8_cannot_be_written_down_and_is_said_so(both: Both) -> None:
    """It was a traceback; Docker writes another character in its place."""
    odd = os.fsdecode(b"\xff")
    for args in (["--label", f"a={odd}"], ["--env", f"A={odd}"], ["-v", f"/srv:/{odd}"], ["-v", f"{odd}:/etc"]):
        done = ours.command(both.root, "create", *args, "habits:1", check=False)
        assert done.returncode == 1
        assert done.stderr.count("\n") == 1
    ours.command(both.root, "create", "--name", "habits-1", "habits:1")
    for args in (["--message", odd], ["--change", f"LABEL a={odd}"], ["--author", odd]):
        assert ours.command(both.root, "commit", *args, "habits-1", check=False).stderr.count("\n") == 1
    assert ours.command(both.root, "ps", "--format", "{{.Names}}").stdout == "habits-1\n"
    assert ours.command(both.root, "fsck").stdout == ""


def test_an_image_from_a_pipe_is_called_standard_input(tmp_path: Path) -> None:
    done = ours.command(tmp_path / "store", "load", check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("overlaykit: standard input is no image: an empty file")


def test_dockers_other_commands_are_answered_with_what_does_their_work(tmp_path: Path) -> None:
    for words, answer in {"run -it base:1": "create, then exec", "container ls": "ps", "system prune": "df, prune"}.items():
        done = ours.command(tmp_path / "store", *words.split(), check=False)
        assert done.returncode == 2
        assert f"did you mean {answer}" in done.stderr


def test_a_file_is_listed_by_a_path_that_begins_without_a_slash(both: Both) -> None:
    """`ls --long box etc/motd` looked for etc/motd/etc/motd."""
    ours.command(both.root, "create", "--name", "habits-1", "habits:1")
    plain, long = (ours.command(both.root, "ls", *args, "habits-1", "etc/motd").stdout for args in ([], ["--long"]))
    assert plain == "etc/motd\n"
    assert long.split()[0] == "-rw-r--r--"
    assert long.endswith(" etc/motd\n")
