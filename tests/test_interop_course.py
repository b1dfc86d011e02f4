"""A container course, walked through with a real dockerd and with overlaykit: the same commands, and the same output where
Docker's is no accident. Each chapter begins where the one before it ended."""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import ours
import peers
from ours import op
from treetext import differences, listing

import overlaykit
from overlaykit import cli

StrPath = str | os.PathLike[str]


class Course:
    """The two sides. `same` runs a command on both and compares what it prints; `codes` only whether it worked."""

    def __init__(self, docker: peers.Docker, root: Path, place: Path) -> None:
        self.docker, self.root, self.place = docker, root, place
        self.made: list[str] = []

    def both(self, *args: StrPath) -> tuple[tuple[int, str], tuple[int, str]]:
        theirs = self.docker.run(*args, check=False)
        out = io.StringIO()
        with redirect_stdout(out):
            code = cli.main(["--root", str(self.root), *map(os.fspath, args)])
        return (theirs.returncode, theirs.stdout), (code, out.getvalue())

    def same(self, *args: StrPath, unordered: bool = False) -> str:
        """What both print, exit code 0 on both sides."""
        (their_code, theirs), (my_code, mine) = self.both(*args)
        assert (their_code, my_code) == (0, 0), args
        if unordered:  # Docker gives the names of one directory in the order of a Go map
            theirs, mine = "".join(sorted(theirs.splitlines(True))), "".join(sorted(mine.splitlines(True)))
        assert mine == theirs, args
        return mine

    def codes(self, *args: StrPath) -> tuple[str, str]:
        """Both outputs of a command that works on both sides."""
        (their_code, theirs), (my_code, mine) = self.both(*args)
        assert (their_code, my_code) == (0, 0), args
        return theirs, mine

    def refused(self, *args: StrPath) -> None:
        """The command fails on both sides, with the same exit code."""
        (their_code, _), (my_code, _) = self.both(*args)
        assert my_code == their_code != 0, args

    def inspected(self, what: str, template: str) -> tuple[Any, Any]:
        """JSON that `inspect --format` prints on either side."""
        theirs, mine = self.codes("inspect", "--format", template, what)
        return json.loads(theirs), json.loads(mine)

    def ran(self, name: str, image: str, operations: Sequence[ours.Op]) -> None:
        """A container `name` of `image` in which the operations were done: in Docker's by its shell, in ours in process."""
        self.docker("run", "--name", name, "--network", "none", image, "sh", "-c", ours.shell(operations))
        ours.command(self.root, "create", "--name", name, image)
        with overlaykit.Store(self.root) as store, store.container(name) as container:
            ours.perform(container.fs, operations)

    def uppers(self, name: str) -> tuple[dict[str, str], dict[str, str]]:
        """What lies in either writable layer; Docker puts no name there that the container did not change."""
        template = "{{json .GraphDriver.Data.UpperDir}}"
        return tuple(untimed(upper) for upper in self.inspected(name, template))  # type: ignore[return-value]


def untimed(directory: StrPath) -> dict[str, str]:
    """Everything in a directory, but when it was changed, and the kernel's bookkeeping: its whiteouts are one inode."""
    found = listing(directory, without_xattrs=("trusted.overlay.origin", "trusted.overlay.impure", "trusted.overlay.uuid"))
    return {path: re.sub(r" mtime=\S+", "", re.sub(" char 0 0:0.*", " whiteout", line)) for path, line in found.items()}


def test_the_course(own_docker: peers.Docker, small_rootfs: Path, tmp_path: Path) -> None:
    course = Course(own_docker, tmp_path / "store", tmp_path)
    for chapter in (
        *(
            images,
            layers,
            writable_layers,
            what_lies_on_disk,
            commits,
            copies,
            volumes,
            what_an_image_puts_there,
            bind_mounts,
        ),
        *(what_remains_of_volumes, what_remains, portable_images),
    ):
        chapter(course, small_rootfs)


def images(course: Course, rootfs: Path) -> None:
    """A base image from a root filesystem; names, ids, mistakes."""
    options = ["--message", "a base", "--change", 'CMD ["sh"]', "--change", "ENV COLOUR=blue"]
    theirs, mine = course.codes("import", *options, rootfs, "course:base")
    assert re.fullmatch(r"sha256:[0-9a-f]{64}\n", mine)
    assert re.fullmatch(r"sha256:[0-9a-f]{64}\n", theirs)
    assert course.same("images", "--format", "{{.Repository}}:{{.Tag}}", "course") == "course:base\n"
    assert course.same("inspect", "--format", "{{json .Config.Cmd}} {{json .Config.Env}}", "course:base")
    assert course.same("inspect", "--format", "{{.Os}}/{{.Architecture}} {{.RepoTags}}", "course:base")
    course.same("tag", "course:base", "localhost:5000/team/course:other")
    assert course.same("inspect", "--format", "{{len .RepoTags}}", "course:base") == "2\n"
    course.codes("rmi", "localhost:5000/team/course:other")
    assert course.same("inspect", "--format", "{{json .RepoTags}}", "course:base") == '["course:base"]\n'
    for mistake in (
        ["inspect", "none:1"],
        ["tag", "none:1", "x:1"],
        ["rmi", "none:1"],
        ["history", "none:1"],
        ["save", "none:1"],
    ):
        course.refused(*mistake)
    course.refused("inspect", "--format", "{{.Nothing}}", "course:base")
    course.refused("inspect", "--format", "{{.Id", "course:base")


def layers(course: Course, rootfs: Path) -> None:
    """A layer is named by the hash of its content, so both find the same one; an image is not copied by a new one."""
    diff_ids = course.same("inspect", "--format", "{{json .RootFS}}", "course:base")
    assert len(json.loads(diff_ids)["Layers"]) == 1
    theirs, mine = course.codes("history", "--quiet", "course:base")
    assert len(mine.splitlines()) == len(theirs.splitlines()) == 1


def writable_layers(course: Course, rootfs: Path) -> None:
    """Creating a container adds one empty layer; changes are seen by `diff`, and by no other container."""
    course.codes("create", "--name", "first", "course:base")
    course.codes("create", "--name", "second", "course:base")
    course.refused("create", "--name", "first", "course:base")
    assert course.same("ps", "-a", "--format", "{{.Names}} {{.Image}} {{.Status}} {{.Command}}").count("\n") == 2
    assert course.same("diff", "first") == ""
    (course.place / "motd").write_text("changed\n")
    course.same("cp", course.place / "motd", "first:/etc/motd")
    course.same("cp", course.place / "motd", "first:/new")
    assert course.same("diff", "first", unordered=True) == "A /new\nC /etc\nC /etc/motd\n"
    assert course.same("diff", "second") == ""
    course.ran(
        "third",
        "course:base",
        [
            op("write", "/etc/motd", "third\n"),
            op("append", "/home/user/notes", "three\n"),
            op("unlink", "/etc/empty"),
            op("rm", "/lib/deep"),
            op("rm", "/etc/conf.d"),
            op("mkdir", "/etc/conf.d"),
            op("write", "/etc/conf.d/only", "this\n"),
            op("chmod", "/bin/setuid", 0o700),
            op("symlink", "/lib/new", "link"),
            op("unlink", "/lib/link"),
            op("mkdir", "/lib/link"),
            op("mkfifo", "/tmp/pipe"),
        ],
    )
    assert "D /lib/deep\n" in course.same("diff", "third", unordered=True)


def what_lies_on_disk(course: Course, rootfs: Path) -> None:
    """inspect says where the layers are: LowerDir is shared, UpperDir the container's, with whiteouts and opaque marks."""
    for name in ("first", "second", "third"):
        for data in course.inspected(name, "{{json .GraphDriver.Data}}"):
            assert list(data) == ["LowerDir", "MergedDir", "UpperDir", "WorkDir"]
            assert all(Path(each).is_dir() for each in data["LowerDir"].split(":"))
            assert Path(data["UpperDir"]).is_dir()
            assert Path(data["UpperDir"]).parent == Path(data["WorkDir"]).parent == Path(data["MergedDir"]).parent
            assert not os.path.ismount(data["MergedDir"])  # nothing runs, so nothing is mounted
        theirs, mine = course.uppers(name)
        assert differences(theirs, mine) == "", name
    assert course.same("inspect", "--format", "{{.GraphDriver.Name}} {{.Driver}}", "first") == "overlay2 overlay2\n"
    # The layers of an image lie once on disk, whoever uses them. Docker puts one of its own between, for /etc/hosts.
    first, second = (course.inspected(name, "{{json .GraphDriver.Data.LowerDir}}") for name in ("first", "second"))
    tops = course.inspected("course:base", "{{json .GraphDriver.Data.UpperDir}}")
    for one, other, top in zip(first, second, tops, strict=True):
        assert one.split(":")[-1] == other.split(":")[-1] == top


def commits(course: Course, rootfs: Path) -> None:
    """A container's writable layer becomes one more layer of a new image, which shares the others."""
    for name, changes in (
        ("first", ["ENV A=1", 'CMD ["cat", "/etc/motd"]', "LABEL made=here"]),
        ("third", ["WORKDIR /home", 'CMD ["sh"]']),
    ):
        options = [part for change in changes for part in ("--change", change)]
        course.codes("commit", "--author", "A. U. Thor", "--message", f"from {name}", *options, name, f"course:{name}")
    for name in ("first", "third"):
        image = f"course:{name}"
        theirs, mine = course.inspected(image, "{{json .RootFS.Layers}}")
        base_theirs, base_mine = course.inspected("course:base", "{{json .RootFS.Layers}}")
        assert (len(mine), mine[:1]) == (len(theirs), base_mine) == (2, base_theirs)
        course.same("inspect", "--format", "{{json .Config.Cmd}} {{json .Config.Env}} {{.Author}} {{.Comment}}", image)
        course.same("inspect", "--format", "{{.Config.WorkingDir}}|{{len .RootFS.Layers}}", image)
        comments = course.same("history", "--format", "{{.Comment}}", image)
        assert comments.startswith(f"from {name}\n")
    # What was committed is what a new container shows, in both.
    for name in ("first", "third"):
        with course.docker.tree(f"course:{name}") as tree, overlaykit.Store(course.root) as store:
            store.cp(f"image:course:{name}:/", course.place / f"tree of {name}", owner="source")
            assert differences(seconds(tree), seconds(course.place / f"tree of {name}")) == ""


def seconds(directory: Path) -> dict[str, str]:
    """A tree without what Docker's commit does not keep: user xattrs, parts of seconds; nor what it makes to run in."""
    made = {"/etc/hosts", "/etc/resolv.conf", "/etc/hostname", "/etc/mtab", "/.dockerenv", "/dev", "/proc", "/sys"}
    found = listing(directory, without_xattrs=("user.", "trusted."), seconds=True, skip=made)
    # A directory's time is when something was put in it, which is not the same moment on both sides.
    return {path: re.sub(" mtime=[^ ]+", "", line) for path, line in found.items() if path != "/"}


def copies(course: Course, rootfs: Path) -> None:
    """cp: both ways, and what is refused (the table of all cases is in test_interop_cp.py)."""
    for name in ("theirs", "mine"):
        (course.place / name).mkdir()
    course.docker("cp", "third:/etc/.", course.place / "theirs/etc")
    ours.command(course.root, "cp", "third:/etc/.", course.place / "mine/etc")
    assert differences(seconds(course.place / "theirs"), seconds(course.place / "mine")) == ""
    course.same("cp", course.place / "mine/etc/conf.d", "second:/etc")
    assert course.same("diff", "second", unordered=True) == "A /etc/conf.d/only\nC /etc\nC /etc/conf.d\n"
    for source, target in (
        ("first:/nothing", course.place / "x"),
        (course.place / "nothing", "first:/x"),
        (course.place / "motd", "first:/no/such/directory"),
        (course.place / "motd", "first:/absent/"),
        (course.place / "mine", "first:/etc/motd"),
        ("nobody:/etc", course.place / "x"),
        (course.place / "motd", course.place / "x"),
    ):
        course.refused("cp", source, target)


MOUNTS = "{{range .Mounts}}{{.Type}} {{.Destination}} {{.Mode}} {{.RW}} {{.Propagation}}\n{{end}}"
FILES = {"hostname", "hosts", "resolv.conf", "mtab"}  # Docker puts some of its own in their place in every container


def mountpoints(course: Course, volume: str) -> tuple[Path, Path]:
    theirs, mine = course.codes("volume", "inspect", "--format", "{{.Mountpoint}}", volume)
    return Path(theirs.strip()), Path(mine.strip())


def in_volumes(course: Course, volume: str) -> list[str]:
    """The names in a volume, which are the same on both sides."""
    theirs, mine = (sorted(set(os.listdir(place)) - FILES) for place in mountpoints(course, volume))
    assert mine == theirs, volume
    return mine


def mounts(course: Course, container: str) -> list[str]:
    """What inspect says of the mounts, in Docker's order of a Go map."""
    return course.same("inspect", "--format", MOUNTS, container, unordered=True).split("\n")


def volumes(course: Course, rootfs: Path) -> None:
    """A volume is made by name, by mounting it, or without a name; it is listed, filtered and inspected."""
    assert course.same("volume", "create", "--label", "stage=test", "made") == "made\n"
    assert course.same("volume", "create", "made") == "made\n"
    course.codes("create", "--name", "keeper", "-v", "implied:/srv/data", "course:base", "sh")
    assert course.same("volume", "ls", "--quiet") == "implied\nmade\n"
    assert course.same("volume", "ls", "--filter", "dangling=true", "--format", "{{.Name}}") == "made\n"
    assert course.same("volume", "ls", "--filter", "dangling=false", "--quiet") == "implied\n"
    assert course.same("volume", "ls", "--filter", "name=mad", "--filter", "driver=local", "-q") == "made\n"
    assert course.same("volume", "ls", "--filter", "label=stage=test", "-q") == "made\n"
    course.same("volume", "ls", "--format", '{{.Name}} {{.Driver}} {{.Scope}} {{.Labels}} {{.Label "stage"}} {{.Size}}')
    template = "{{.Name}} {{.Driver}} {{.Scope}} {{json .Labels}} {{json .Options}}"
    course.same("volume", "inspect", "--format", template, "made", "implied")
    course.same("inspect", "--type", "volume", "--format", template, "made")
    course.same("inspect", "--format", template, "made")  # neither a container nor an image
    assert mounts(course, "keeper")
    for mistake in (
        ["volume", "inspect", "nothing"],
        ["volume", "create", "not/a/name"],
        ["volume", "create", "--driver", "nothing", "x1"],
        ["volume", "create", "--opt", "colour=blue", "x1"],
        ["volume", "create", "--opt", "type=tmpfs", "x1"],
        ["volume", "ls", "--filter", "colour=blue"],
        ["volume", "rm", "nothing"],
        ["volume", "rm", "implied"],
    ):
        course.refused(*mistake)


def what_an_image_puts_there(course: Course, rootfs: Path) -> None:
    """An empty volume over a directory of the image gets its files; one that has any, or a bound one, does not."""
    course.codes("create", "--name", "filling", "-v", "etc:/etc:ro", "-v", "lib:/lib:nocopy", "course:base", "sh")
    assert "motd" in in_volumes(course, "etc")
    assert in_volumes(course, "lib") == []
    for place in mountpoints(course, "lib"):
        (place / "mine").write_text("mine\n")
    course.codes("create", "--name", "again", "-v", "lib:/etc", "course:base", "sh")
    assert in_volumes(course, "lib") == ["mine"]
    # What is written to a volume is in no container's layer.
    for place in mountpoints(course, "etc"):
        (place / "motd").write_text("in the volume\n")
    assert course.same("diff", "filling") == ""
    assert "volume /etc ro false " in mounts(course, "filling")
    # The others' mounts: the same volumes, with a mode of one's own.
    course.codes("create", "--name", "from", "--volumes-from", "filling:ro", "-v", "own:/lib", "course:base", "sh")
    assert [line for line in mounts(course, "from") if line] == ["volume /etc  false ", "volume /lib z true "]
    course.refused("create", "--name", "wrong", "--volumes-from", "nobody", "course:base", "sh")
    course.codes(
        "create", "--name", "scratch", "--tmpfs", "/run:size=1m", "--mount", "type=tmpfs,dst=/t", "course:base", "sh"
    )
    assert mounts(course, "scratch")
    assert course.same("inspect", "--format", "{{json .HostConfig.Tmpfs}}", "scratch") == '{"/run":"size=1m"}\n'


def bind_mounts(course: Course, rootfs: Path) -> None:
    """A directory or file of the host hides what the image has there; -v makes a missing one, --mount refuses it."""
    host = course.place / "host"
    host.mkdir()
    (host / "file").write_text("host\n")
    course.codes("create", "--name", "bound", "-v", f"{host}:/etc:ro", "-v", f"{host}/file:/home/file", "course:base", "sh")
    mounts(course, "bound")
    theirs, mine = course.inspected("bound", "{{json .HostConfig.Binds}}")
    assert sorted(mine) == sorted(theirs)  # Docker's client has them in a Go map
    with overlaykit.Store(course.root) as store, store.container("bound") as container:
        assert container.fs.listdir("/etc") == ["file"]
    course.refused("create", "--mount", f"type=bind,src={host}/missing,dst=/etc", "course:base", "sh")
    assert not (host / "missing").exists()
    assert os.listdir(host) == ["file"]  # nothing was copied to it


def what_remains_of_volumes(course: Course, rootfs: Path) -> None:
    """rm leaves volumes, rm -v takes those without a name, prune what nobody has."""
    course.codes("create", "--name", "nameless", "-v", "/srv/one", "-v", "named:/srv/two", "course:base", "sh")
    before = len(course.same("volume", "ls", "--format", "{{.Driver}}").splitlines())
    course.same("rm", "-v", "nameless")
    assert len(course.same("volume", "ls", "--format", "{{.Driver}}").splitlines()) == before - 1
    course.codes("create", "--name", "nameless", "-v", "/srv/one", "course:base", "sh")
    course.same("rm", "nameless")
    assert len(course.same("volume", "ls", "--filter", "dangling=true", "--format", "{{.Driver}}").splitlines()) == 3
    for name in ("keeper", "filling", "again", "from", "scratch", "bound"):
        course.same("rm", name)
    assert "motd" in in_volumes(course, "etc")  # outlives its containers
    course.same("volume", "rm", "etc", "lib")
    course.refused("volume", "inspect", "etc")
    course.codes("volume", "prune", "--force")


def what_remains(course: Course, rootfs: Path) -> None:
    """Removing a container removes its writable layer only; an image goes when nothing needs it."""
    uppers = course.inspected("third", "{{json .GraphDriver.Data.UpperDir}}")
    course.refused("rmi", "course:base", "course:none")
    assert course.same("rm", "third") == "third\n"
    assert [os.path.exists(upper) for upper in uppers] == [False, False]
    course.refused("rm", "third")
    course.refused("diff", "third")
    assert course.same("images", "--format", "{{.Tag}}", "course:third") == "third\n"
    assert course.same("diff", "first", unordered=True) == "A /new\nC /etc\nC /etc/motd\n"
    course.codes("rmi", "course:third")
    course.refused("inspect", "course:third")
    tops = course.inspected("course:base", "{{json .GraphDriver.Data.UpperDir}}")
    assert [os.path.isdir(top) for top in tops] == [True, True]
    assert course.same("rm", "first", "second") == "first\nsecond\n"
    assert course.same("ps", "-a", "-q") == ""


def portable_images(course: Course, rootfs: Path) -> None:
    """What one saves the other loads, under the same name and with the same layers."""
    course.docker("save", "-o", course.place / "theirs.tar", "course:first")
    ours.command(course.root, "save", "-o", course.place / "mine.tar", "course:first")
    layers = course.inspected("course:first", "{{json .RootFS.Layers}}")
    for image in ("course:first", "course:base"):
        course.codes("rmi", image)
    loaded = course.docker("load", "-i", course.place / "mine.tar")
    assert loaded == ours.command(course.root, "load", "-i", course.place / "theirs.tar").stdout
    assert course.inspected("course:first", "{{json .RootFS.Layers}}") == layers[::-1]
    course.codes("rmi", "course:first")
    assert course.same("images", "-q", "course") == ""
