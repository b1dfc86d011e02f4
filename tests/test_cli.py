"""The command line as people and scripts meet it: output, exit codes, help."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import imagefiles as im
import ours
import peers
import pytest
import rootfs

import overlaykit
from overlaykit import cli

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch) -> Run:
    """`run("images", "-q")`: exit code, output and errors of `overlaykit --root ROOT images -q`."""

    def run(*args: str | Path, stdin: bytes = b"") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        capfdbinary.readouterr()
        code = cli.main(["--root", str(tmp_path / "store"), *map(str, args)])
        out, err = capfdbinary.readouterr()
        return code, out.decode(errors="surrogateescape"), err.decode(errors="surrogateescape")

    return run


@pytest.fixture
def good(run: Run, tmp_path: Path) -> Run:
    """The same, where there are the image base:1 and a container box of it."""
    rootfs.write(tmp_path / "rootfs.tar")
    assert run("import", tmp_path / "rootfs.tar", "base:1", "-c", 'CMD ["sh"]')[0] == 0
    assert run("create", "base:1", "--name", "box")[0] == 0
    return run


def output(result: tuple[int, str, str]) -> str:
    code, out, err = result
    assert (code, err) == (0, ""), err
    return out


def test_states_of_a_container(good: Run, tmp_path: Path) -> None:
    output(good("write", "box", "/etc/motd", stdin=b"one\n"))
    assert output(good("snapshot", "box", "first")) == "first\n"
    output(good("write", "box", "/etc/motd", stdin=b"two\n"))
    assert output(good("snapshot", "box")) == "1\n"
    assert [each["name"] for each in json.loads(output(good("snapshots", "box", "--json")))] == ["first", "1"]
    assert output(good("rollback", "box", "first")) == "first\n"
    output(good("fork", "box", "twin"))
    assert output(good("cat", "twin", "/etc/motd")) == "one\n"
    output(good("write", "twin", "/etc/new", stdin=b"new\n"))
    output(good("apply-to", "twin", "box", "/etc/new"))
    assert output(good("keep", "box", "/etc/new")) == "/etc/motd\n"
    assert output(good("diff", "box")) == "C /etc\nA /etc/new\n"
    output(good("discard", "box", "/etc/new"))
    assert "A /etc/new" not in output(good("diff", "box"))
    output(good("export", "twin", "-o", tmp_path / "out.tar"))
    with tarfile.open(tmp_path / "out.tar") as tar:
        assert "etc/new" in tar.getnames()
    assert good("rollback", "box", "none")[0] == 1
    output(good("snapshot", "--rm", "box", "first"))
    assert output(good("fsck")) == ""
    assert "Total reclaimed space" in output(good("gc"))
    assert "Deleted: base:1" in output(good("prune", "--all", "--containers", "--force"))
    assert output(good("ps", "-q")) == ""


# --- the main job -----------------------------------------------------------------------------------------------------


def test_the_main_job(good: Run, tmp_path: Path) -> None:
    output(good("write", "box", "/etc/motd", stdin=b"changed\n"))
    output(good("write", "box", "/etc/motd", "--append", stdin=b"more\n"))
    assert output(good("cat", "box", "/etc/motd", "/etc/hostname")) == "changed\nmore\nsmall\n"
    program = tmp_path / "app.sh"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    output(good("put", "box", program, "/bin"))
    output(good("put", "box", program, "/bin/other"))
    assert output(good("diff", "box")) == "C /bin\nA /bin/app.sh\nA /bin/other\nC /etc\nC /etc/motd\n"
    assert "-rwxr-xr-x" in output(good("ls", "-l", "box", "/bin/app.sh"))
    changed = json.loads(output(good("diff", "--json", "box")))[-1]
    assert changed["path"] == "/etc/motd"
    assert (changed["size_before"], changed["size_after"]) == (8, 13)
    assert "content" in changed["reasons"]
    id = output(good("commit", "box", "mine:1", "-m", "motd", "-a", "me", "-c", "ENV A=b")).strip()
    saved = tmp_path / "mine.tar"
    output(good("save", "mine:1", saved))
    assert output(good("rm", "box")) == "box\n"
    assert "Untagged: mine:1\nDeleted: " + id in output(good("rmi", "mine:1"))
    assert output(good("load", saved)) == "Loaded image: mine:1\n"
    assert output(good("images", "-q", "--no-trunc", "mine")) == id + "\n"
    assert output(good("history", "mine:1")).splitlines()[1].split()[-1] == "motd"
    output(good("create", "mine:1", "--name", "second"))
    assert output(good("cat", "second", "/etc/motd")) == "changed\nmore\n"


def test_mount_and_umount(good: Run, tmp_path: Path) -> None:
    peers.need_root("mounts")
    place = Path(output(good("mount", "box")).strip())
    try:
        assert (place / "etc/motd").read_text() == "welcome\n"
        code, _, err = good("write", "box", "/etc/motd", stdin=b"x")
        assert code == 1
        assert "mounted" in err
        assert output(good("cat", "box", "/etc/motd")) == "welcome\n"
    finally:
        assert output(good("umount", "box")) == "box\n"
    assert good("umount", "box")[0] == 1


def test_exec_runs_a_program_in_the_container(good: Run) -> None:
    """base:1 has no program to run, so the command line is shown to say so; tests/test_inside.py runs some."""
    peers.need_root("mounts")
    code, out, err = good("exec", "box", "--", "/bin/missing", "--flag")
    assert (code, out) == (127, "")
    assert err == "overlaykit: /bin/missing: No such file or directory\n"
    assert good("shell", "box")[0] == 127
    assert output(good("cat", "box", "/etc/motd")) == "welcome\n"


def test_save_writes_every_form(good: Run, tmp_path: Path) -> None:
    for form, name in (("docker-archive", "d.tar"), ("oci-archive", "o.tar"), ("oci-dir", "o")):
        output(good("save", "--format", form, "base:1", tmp_path / name))
        with overlaykit.Store(tmp_path / f"store of {name}") as store:
            assert [image.tags for image in store.load(tmp_path / name)] == [["base:1"]]
    (tmp_path / "there").mkdir()
    output(good("save", "base:1", tmp_path / "there"))
    assert (tmp_path / "there/index.json").exists()


def test_a_directory_and_a_pipe_are_imported(good: Run, tmp_path: Path) -> None:
    id = output(good("import", "-", "piped:1", stdin=(tmp_path / "rootfs.tar").read_bytes())).strip()
    assert id.startswith("sha256:")
    (tmp_path / "tree/etc").mkdir(parents=True)
    (tmp_path / "tree/etc/motd").write_text("from a directory\n")
    output(good("import", tmp_path / "tree", "dir:1"))
    output(good("create", "dir:1", "--name", "dir"))
    assert output(good("cat", "dir", "/etc/motd")) == "from a directory\n"


# --- lists ------------------------------------------------------------------------------------------------------------


def test_images_looks_as_dockers(good: Run) -> None:
    output(good("tag", "base:1", "localhost:5000/team/base:x"))
    output(good("commit", "box"))
    header, *rows = (line.split() for line in output(good("images")).splitlines())
    assert header == ["REPOSITORY", "TAG", "IMAGE", "ID", "CREATED", "SIZE"]
    assert sorted(row[:2] for row in rows) == [["<none>", "<none>"], ["base", "1"], ["localhost:5000/team/base", "x"]]
    assert all(row[-1].endswith("kB") for row in rows)
    assert len(output(good("images", "base")).splitlines()) == 2
    assert len(output(good("images", "-q")).split()) == 2
    assert output(good("images", "--digests", "base:1")).count("sha256:") == 1
    facts = json.loads(output(good("images", "--json", "base:1")))
    assert facts[0]["names"] == ["base:1", "localhost:5000/team/base:x"]


def test_ps_lists_the_newest_first(good: Run) -> None:
    second = output(good("create", "base:1", "--name", "second")).strip()
    header, *rows = output(good("ps", "-a")).splitlines()
    assert header.split() == ["CONTAINER", "ID", "IMAGE", "COMMAND", "CREATED", "NAMES"]
    assert [row.split()[-1] for row in rows] == ["second", "box"]
    assert rows[0].split()[:3] == [second[:12], "base:1", '"sh"']
    assert output(good("ps", "-q", "--no-trunc")).split()[0] == second
    assert [each["name"] for each in json.loads(output(good("ps", "--json")))] == ["second", "box"]
    assert len(output(good("rm", "second", "box")).split()) == 2
    assert output(good("ps", "-q")) == ""


def test_ps_lists_the_containers_that_pass_all_filters(good: Run) -> None:
    output(good("create", "base:1", "--name", "webbed", "-l", "stage=test", "-l", "x", "-v", "data:/srv"))
    output(good("commit", "webbed", "made:1"))
    id = output(good("create", "made:1", "--name", "web")).strip()

    def listed(*filters: str) -> list[str]:
        options = [word for text in filters for word in ("--filter", text)]
        return output(good("ps", "--format", "{{.Names}}", *options)).split()

    assert listed("name=web") == ["web", "webbed"]
    assert listed("name=^/web$") == ["web"]
    assert listed("name=webbed", "name=box") == ["webbed", "box"]
    assert listed(f"id={id[:8]}") == ["web"]
    assert listed(f"id={id[1:]}") == []
    assert listed("label=stage=test", "label=x") == ["web", "webbed"]  # a commit keeps labels
    assert listed("label=stage=other") == []
    assert listed("volume=data") == listed("volume=/srv") == ["webbed"]
    assert listed("ancestor=base:1") == ["web", "webbed", "box"]
    assert listed("ancestor=none:1") == listed("status=running") == []
    assert listed("status=created", "name=box") == ["box"]
    for wrong in ("status=odd", "colour=red", "name", "name=["):
        code, _, err = good("ps", "--filter", wrong)
        assert (code, err.count("\n")) == (1, 1)
        assert wrong in err


def test_a_container_gets_a_name_of_its_own(good: Run) -> None:
    id = output(good("create", "base:1")).strip()
    (container,) = json.loads(output(good("inspect", id[:8])))
    assert container["Id"] == id
    assert container["Name"].count("_") >= 1


def test_history_shows_layers(good: Run) -> None:
    facts = json.loads(output(good("history", "--json", "base:1")))
    assert [fact["comment"] for fact in facts] == ["Imported from rootfs.tar"]
    assert facts[0]["layer"].startswith("sha256:")
    assert output(good("history", "-q", "--no-trunc", "base:1")) == facts[0]["layer"] + "\n"


def test_inspect_finds_containers_before_images(good: Run) -> None:
    output(good("tag", "base:1", "box"))
    box, image = json.loads(output(good("inspect", "box", "base:1")))
    assert box["Name"] == "/box"
    assert "RootFS" in image
    (image,) = json.loads(output(good("inspect", "--type", "image", "box")))
    assert "RootFS" in image
    assert good("inspect", "--type", "container", "base:1")[0] == 1


def test_info_tells_where_and_what(good: Run, tmp_path: Path) -> None:
    facts = json.loads(output(good("info", "--json")))
    assert (facts["root"], facts["images"], facts["containers"]) == (str(tmp_path / "store"), 1, 1)
    assert "whiteout format: " in output(good("info"))


def test_ls_lists_a_directory_or_a_file(good: Run) -> None:
    assert output(good("ls", "box", "/etc/conf.d")) == "a\nb\n"
    assert output(good("ls", "box", "/etc/motd")) == "/etc/motd\n"
    facts = json.loads(output(good("ls", "--json", "box", "/etc/conf.d")))
    assert facts[0] | {"mtime_ns": 0} == {"name": "a", "mode": "-rw-r-----", "uid": 0, "gid": 0, "size": 4, "mtime_ns": 0}
    assert "\udcff\udcfe" in output(good("ls", "box", "/etc"))  # a name that is no UTF-8 goes out as it is


# --- --format -----------------------------------------------------------------------------------------------------------


def test_format_prints_each_by_a_template(good: Run) -> None:
    assert output(good("images", "--format", "{{.Repository}}:{{.Tag}}")) == "base:1\n"
    assert output(good("ps", "--format", "{{upper .Names}} {{.Image}} {{.Status}}")) == "BOX base:1 Created\n"
    assert output(good("history", "--format", "{{.Comment}}", "base:1")) == "Imported from rootfs.tar\n"
    assert json.loads(output(good("images", "--format", "json")))["Repository"] == "base"
    assert json.loads(output(good("ps", "--format", "{{json .}}")))["Names"] == "box"
    assert output(good("ps", "--format", r"table {{.Names}}\t{{lower .Image}}")) == "NAMES     IMAGE\nbox       base:1\n"
    assert output(good("ps", "--format", "table")) == output(good("ps"))
    output(good("commit", "box", "labels:1", "-c", "LABEL com.example.a=1 com.example.b=2"))
    output(good("create", "labels:1", "--name", "labels"))
    labels = output(good("ps", "--format", '{{.Label "com.example.a"}}|{{.Label "none"}}|{{.Labels}}')).splitlines()
    assert labels == ["1||com.example.a=1,com.example.b=2", "||"]


def test_inspect_prints_the_graph_driver_by_a_template(good: Run) -> None:
    (box,) = json.loads(output(good("inspect", "box")))
    data = output(good("inspect", "--format", "{{json .GraphDriver.Data}}", "box"))
    assert list(json.loads(data)) == ["LowerDir", "MergedDir", "UpperDir", "WorkDir"]
    assert json.loads(data) == box["GraphDriver"]["Data"]
    assert output(good("inspect", "-f", "{{.Name}}", "box", "box")) == "/box\n/box\n"


def test_what_is_no_template_is_said_in_a_line(good: Run) -> None:
    for form, code in (("{{.Nope}}", 1), ("{{.Name", 64), ("{{nosuch 1}}", 64)):
        assert good("inspect", "--format", form, "box")[0] == code
        assert good("ps", "--format", form)[2].startswith("overlaykit: template: ")


# --- several names ------------------------------------------------------------------------------------------------------


def test_a_name_that_is_not_there_does_not_stop_the_others(good: Run) -> None:
    output(good("create", "base:1", "--name", "second"))
    output(good("tag", "base:1", "other:1"))
    code, out, err = good("inspect", "nobody", "box", "other")
    assert code == 1
    assert [each["Name"] for each in json.loads(out)] == ["/box"]
    assert len(err.splitlines()) == 2
    assert good("inspect", "nobody") == (1, "[]\n", "overlaykit: no container, image or volume nobody\n")
    code, out, err = good("rm", "nobody", "second")
    assert (code, out, len(err.splitlines())) == (1, "second\n", 1)
    code, out, err = good("rmi", "none:1", "other:1")
    assert (code, out, len(err.splitlines())) == (1, "Untagged: other:1\nTotal reclaimed space: 0B\n", 1)


# --- as Docker has it ----------------------------------------------------------------------------------------------------


def test_load_and_save_take_dockers_options_and_pipes(good: Run, tmp_path: Path) -> None:
    output(good("save", "base:1", "-o", tmp_path / "a.tar"))
    argv = [sys.executable, "-c", ours.MAIN, "--root", str(tmp_path / "store")]
    piped = subprocess.run([*argv, "save", "base:1"], capture_output=True, check=True).stdout
    assert piped == (tmp_path / "a.tar").read_bytes()
    assert output(good("load", "-i", tmp_path / "a.tar")) == "Loaded image: base:1\n"
    for options in ([], ["-"], ["--quiet"]):
        done = subprocess.run([*argv, "load", *options], input=piped, capture_output=True, check=True)
        assert done.stdout == b"Loaded image: base:1\n"
    assert good("load", "-i", "a", "b")[0] == 2
    assert good("save", "base:1", "-o", "a", "b")[0] == 2


def test_a_file_that_cannot_be_written_is_named_as_it_was_given(good: Run, tmp_path: Path) -> None:
    """It was called by the name that it has until it is whole, which nobody had heard of."""
    for target, message in (("none/a.tar", "No such file or directory"), ("file/a.tar", "Not a directory")):
        (tmp_path / "file").touch()
        code, _, errors = good("save", "base:1", "-o", tmp_path / target)
        assert (code, errors) == (1, f"overlaykit: {tmp_path / target}: {message}\n")


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["dif"], "diff"),
        (["diff", "b"], "box base:1"),
        (["rmi", ""], "base:1"),
        (["inspect", "b"], "box base:1"),
        (["cp", "--follow"], "--follow-link"),
        (["cp", "box", ":", "/etc/mo"], "/etc/motd"),  # bash takes the colon for a word of its own
        (["cp", "x", "box", ":", "/home/"], "/home/user/"),
    ],
)
def test_bash_completes(words: list[str], offered: str, good: Run, tmp_path: Path) -> None:
    """The script that `completion bash` prints, in a real bash."""
    (tmp_path / "overlaykit").write_text(f"#!/bin/sh\nexec {sys.executable} -c '{ours.MAIN}' \"$@\"\n")
    (tmp_path / "overlaykit").chmod(0o755)
    (tmp_path / "completion").write_text(output(good("completion", "bash")))
    script = f"""
        PATH={tmp_path}:$PATH; export OVERLAYKIT_ROOT={tmp_path}/store
        . {tmp_path}/completion
        COMP_WORDS=(overlaykit {" ".join(word or "''" for word in words)}); COMP_CWORD={len(words)}
        _overlaykit_completion overlaykit
        echo "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert (done.stdout.strip(), done.stderr) == (offered, "")


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_have_a_script_too(shell: str, run: Run) -> None:
    assert "_OVERLAYKIT_COMPLETE" in output(run("completion", shell))


def test_a_word_with_a_colon_is_completed_as_a_whole(good: Run, tmp_path: Path) -> None:
    """As zsh and fish want it."""
    env = {"COMP_WORDS": "overlaykit cp box:/etc/mo", "COMP_CWORD": "2", "_OVERLAYKIT_COMPLETE": "zsh_complete"}
    env |= {"OVERLAYKIT_ROOT": str(tmp_path / "store"), "PATH": os.environ["PATH"]}
    env |= {"PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    done = subprocess.run([sys.executable, "-c", ours.MAIN], capture_output=True, text=True, check=True, env=env)
    assert done.stdout.splitlines()[:2] == ["plain", "box:/etc/motd"]


# --- what goes wrong --------------------------------------------------------------------------------------------------

MISTAKES: dict[str, tuple[str, ...]] = {
    "no image none:1": ("create", "none:1"),
    "no container nobody": ("diff", "nobody"),
    "there is a container box": ("create", "base:1", "--name", "box"),
    "/nowhere: No such file": ("cat", "box", "/nowhere"),
    "/etc: Is a directory": ("cat", "box", "/etc"),
    "nowhere.tar: No such file": ("load", "nowhere.tar"),
    "needed by container box": ("rmi", "base:1"),
    "compression 'rar'": ("commit", "box", "x:1", "--compression", "rar"),
    "not a change of a config": ("commit", "box", "x:1", "--change", "RUN make"),
    "no image nothing": ("save", "nothing", "out.tar"),
    "is no platform": ("load", "x.tar", "--platform", "a b"),
}


@pytest.mark.parametrize("said", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_1(said: str, good: Run) -> None:
    code, out, err = good(*MISTAKES[said])
    assert (code, out) == (1, "")
    assert err.startswith("overlaykit: ")
    assert said in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("args", [["bogus"], ["images", "--bogus"], ["create"], ["save", "--format", "zip", "a", "b"]])
def test_what_is_not_understood_is_exit_code_2(args: list[str], run: Run) -> None:
    code, out, err = run(*args)
    assert (code, out) == (2, "")
    assert "Usage: overlaykit" in err


def test_a_command_that_is_nearly_right_is_named(run: Run) -> None:
    assert "did you mean images?" in run("image")[2]


def test_ctrl_c_is_exit_code_130(good: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: overlaykit.Store) -> list[overlaykit.StoredImage]:
        raise KeyboardInterrupt

    monkeypatch.setattr(overlaykit.Store, "images", interrupted)
    code, out, err = good("images")
    assert (code, out) == (130, "")
    assert err.strip() == "overlaykit: interrupted"


def test_a_reader_that_goes_away_is_no_traceback(good: Run, tmp_path: Path) -> None:
    argv = [sys.executable, "-c", ours.MAIN, "--root", str(tmp_path / "store"), "cat", "box", *["/home/user/notes"] * 500]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.read(10)
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == b""
    assert process.returncode == 141


# --- help -------------------------------------------------------------------------------------------------------------


def test_help_lists_every_command(run: Run) -> None:
    listing = output(run("--help"))
    for name in cli.HOMES:
        assert f"\n  {name} " in listing


@pytest.mark.parametrize("name", cli.HOMES)
def test_help_of_a_command_teaches_with_an_example(name: str, run: Run) -> None:
    text = output(run(name, "--help"))
    assert f"Usage: overlaykit {name}" in text
    assert f"overlaykit {name}" in text.split("\n", 1)[1] or "overlaykit --root" in text


# --- odds and ends ----------------------------------------------------------------------------------------------------


def test_images_without_names_are_loaded_too(run: Run, tmp_path: Path) -> None:
    files = im.docker_20()
    manifest = json.loads(files["manifest.json"])
    manifest[0]["RepoTags"] = None
    im.write(tmp_path / "image.tar", files | {"manifest.json": im.to_json(manifest)}, form="tar")
    out = output(run("load", tmp_path / "image.tar"))
    assert out.startswith("Loaded image ID: sha256:")
    assert output(run("images")).splitlines()[1].startswith("<none>")


def test_sizes_and_ages_are_written_as_docker_does() -> None:
    from datetime import UTC, datetime, timedelta

    from overlaykit.cli.output import ago, size

    assert [size(n) for n in (0, 999, 1000, 74_800_000, 1_230_000_000)] == ["0B", "999B", "1kB", "74.8MB", "1.23GB"]
    assert [size(n, binary=True) for n in (0, 4096, 64 << 20, 1 << 40)] == ["0 B", "4 KiB", "64 MiB", "1 TiB"]
    assert size(5 * 10**15) == "5PB"
    now = datetime.now(UTC)
    ages = {0.1: "Less than a second ago", 1.2: "1 second ago", 30: "30 seconds ago", 70: "About a minute ago"}
    ages |= {600: "10 minutes ago", 3700: "About an hour ago", 86400 * 3: "3 days ago", 86400 * 800: "2 years ago"}
    for seconds, said in ages.items():
        assert ago(now - timedelta(seconds=seconds), now) == said
    assert ago(None) == "N/A"


def test_a_terminal_gets_no_control_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    from overlaykit.cli.output import shown

    assert shown("/etc/\x1b[2J") == "/etc/\x1b[2J"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert shown("/etc/\x1b[2J\udcff na\u00efve") == "/etc/\\x1b[2J\\udcff na\u00efve"
