"""What Python has on top of the system calls, walk, glob, copytree, rmtree and pathlib's, on an overlay and on a plain
directory with the same files: the same results, types and errors."""

from __future__ import annotations

import copy
import fnmatch
import gc
import glob
import os
import pickle
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from overlaykit import Overlay, View

DEPTH = 1200  # directories in each other: more than Python recurses, and a path still fits into PATH_MAX


class Sides:
    """The same files as a plain directory, which is the current one, and as the lower of an overlay."""

    def __init__(self, base: Path) -> None:
        self.plain = base / "plain"
        self.upper, self.work = base / "upper", base / "work"
        for part in ("plain", "upper", "work"):
            (base / part).mkdir()
        fill(self.plain)
        shutil.copytree(self.plain, base / "lower", symlinks=True)
        self.lower = base / "lower"
        self.fs = Overlay([self.lower], self.upper, self.work)


def fill(top: Path) -> None:
    for name in ("d/y", "e", ".git", "a[b]"):
        (top / name).mkdir(parents=True)
    for name in ("f", "d/x", "d/y/z.py", ".git/config", "a[b]/x1", os.fsdecode(b"\xff\xfe")):
        (top / name).write_text(name.encode(errors="surrogateescape").hex())
    (top / "crlf").write_bytes(b"a\r\nb\rc\n")
    for name, target in {"l": "f", "dangling": "nowhere", "round": "round", "ld": "d", "d/up": "../d/y"}.items():
        (top / name).symlink_to(target)


@pytest.fixture
def sides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sides]:
    found = Sides(tmp_path)
    monkeypatch.chdir(found.plain)
    with found.fs:
        yield found


def outcome(call: Callable[[], Any]) -> Any:
    """What a call gives, in an order that can be compared, or the error and its paths."""
    try:
        result = call()
        if isinstance(result, Iterator):
            result = list(result)
    except OSError as e:
        return type(e), e.errno, e.filename, e.filename2
    except (TypeError, ValueError) as e:
        return type(e)
    if isinstance(result, list):
        return sorted((plain(each) for each in result), key=repr)
    return result


def plain(step: Any) -> Any:
    """A step of a walk with its lists sorted, and without the number of its descriptor."""
    return (
        tuple(sorted(x) if isinstance(x, list) else type(x) if isinstance(x, int) else x for x in step)
        if isinstance(step, tuple)
        else step
    )


TOPS = [".", "d", b"d", "ld", "ld/", "f", "nope", b"nope", "d/..", "round", "", "f/x"]


@pytest.mark.parametrize("top", TOPS, ids=repr)
@pytest.mark.parametrize("topdown", [True, False])
@pytest.mark.parametrize("follow", [True, False])
def test_walk_and_fwalk_go_where_those_of_os_go(sides: Sides, top: Any, topdown: bool, follow: bool) -> None:
    """A symlink that leads round in a circle once took its whole directory out of every walk, listing and glob: is_dir
    of it is ELOOP, which was taken for an error of the directory, and passed over in silence."""
    errors: list[list[Any]] = [[], []]
    ours = outcome(lambda: sides.fs.walk(top, topdown, errors[0].append, follow))
    assert ours == outcome(lambda: os.walk(top, topdown, errors[1].append, follow))
    assert [e.errno for e in errors[0]] == [e.errno for e in errors[1]]
    ours = outcome(lambda: sides.fs.fwalk(top, topdown, follow_symlinks=follow))
    if top != "f" or not follow:  # of a file os.fwalk raises an error that names its own descriptor
        assert ours == outcome(lambda: os.fwalk(top, topdown, follow_symlinks=follow))


@pytest.mark.parametrize("top", [".", b"."])
def test_directories_taken_out_of_a_step_are_not_walked(sides: Sides, top: Any) -> None:
    def only_d(walk: Any) -> Iterator[Any]:
        for directory, dirs, files in walk(top):
            dirs[:] = [name for name in dirs if name in ("d", b"d")]
            yield directory, dirs, files

    assert outcome(lambda: only_d(sides.fs.walk)) == outcome(lambda: only_d(os.walk))


PATTERNS = ["*", "**", "d/**", "*/", "d/*.py", "[f]", "[!f]*", ".*", "*/*", "l", "ld/*", "dangling", "round", "nope", ""]
PATTERNS += ["./*", "\udcff*", "[", "f/", "f/*", "d**", "**/y/**", "a[[]b]/*", "d/../*"]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("recursive", [False, True])
def test_glob_finds_what_glob_finds(sides: Sides, pattern: str, recursive: bool, hidden: bool) -> None:
    through = {"ld/", "d/up/"} if recursive and "**" in pattern else set()  # "**" goes through no symlink here
    for given in (pattern, os.fsencode(pattern)):
        options = {"recursive": recursive, "include_hidden": hidden}
        theirs = glob.glob(given, **options)  # type: ignore[arg-type]
        theirs = [path for path in theirs if not any(each in os.fsdecode(path) for each in through)]
        found = sides.fs.glob(given, **options)
        assert sorted(found) == sorted(theirs)
        assert sorted(sides.fs.iglob(given, **options)) == sorted(theirs)


def test_glob_in_a_directory_gives_paths_from_there(sides: Sides) -> None:
    for pattern in ("*", "y/*", "y/**/*.py", "x", "nope"):
        theirs = glob.glob(pattern, root_dir="d", recursive=True)
        assert sorted(sides.fs.glob(pattern, root_dir="d", recursive=True)) == sorted(theirs)
    assert sides.fs.glob("/[f]", root_dir="d") == ["/f"]


@pytest.mark.parametrize(
    "name", ["new", b"new", "d", b"d", "d/", "new/a/b/", "new/a/.", "d/.", "", ".", "f/x", "l", "dangling"]
)
@pytest.mark.parametrize("exist_ok", [False, True])
def test_makedirs_does_and_says_what_that_of_os_does(sides: Sides, name: Any, exist_ok: bool) -> None:
    ours = outcome(lambda: sides.fs.makedirs(name, 0o700, exist_ok=exist_ok))
    assert ours == outcome(lambda: os.makedirs(name, 0o700, exist_ok=exist_ok))
    assert outcome(lambda: sides.fs.walk(".")) == outcome(lambda: os.walk("."))


def test_what_has_no_bytes_is_no_xattr_and_leaves_the_lower_file_alone(sides: Sides) -> None:
    for value in (b"v", bytearray(b"v"), memoryview(b"v")):
        sides.fs.setxattr("d/x", "user.v", value)
        assert sides.fs.getxattr("d/x", "user.v") == b"v"
    with pytest.raises(TypeError):
        sides.fs.setxattr("f", "user.v", "text")  # type: ignore[arg-type]
    assert not (sides.upper / "f").exists()


def test_a_closed_overlay_says_so_and_not_that_nothing_exists(sides: Sides) -> None:
    assert not sides.fs.exists("a\0b")
    assert not sides.fs.exists("\ud800")
    sides.fs.close()
    for ask in (sides.fs.exists, sides.fs.isdir, sides.fs.lexists, sides.fs.stat, sides.fs.listdir):
        with pytest.raises(ValueError, match="closed"):
            ask("f")


# --- copytree and rmtree ----------------------------------------------------------------------------------------------


def contents(top: str | Path) -> dict[str, str]:
    return {
        os.path.relpath(os.path.join(at, name), top): os.readlink(path) if os.path.islink(path) else str(os.path.isdir(path))
        for at, dirs, files in os.walk(top)
        for name in dirs + files
        for path in [os.path.join(at, name)]
    }


def test_copytree_copies_what_that_of_shutil_copies(sides: Sides) -> None:
    left_out = shutil.ignore_patterns("round", "*.py", "up")  # shutil looks for what "up" points to from where we are
    options: dict[str, Any] = {"ignore": left_out, "ignore_dangling_symlinks": True}
    assert sides.fs.copytree("/", "/copy/of", **options) == "/copy/of"
    shutil.copytree(sides.lower, "copy", **options)
    assert contents(sides.upper / "copy" / "of") == contents("copy")


def test_copytree_says_at_its_end_what_it_could_not_copy(sides: Sides) -> None:
    with pytest.raises(shutil.Error) as ours:
        sides.fs.copytree("/", "/copy")
    with pytest.raises(shutil.Error) as theirs:
        shutil.copytree(sides.lower, "copy")
    assert sorted(os.path.basename(e[0]) for e in ours.value.args[0]) == ["dangling", "round"]
    assert sorted(os.path.basename(e[0]) for e in theirs.value.args[0]) == ["dangling", "round"]
    assert contents(sides.upper / "copy") == contents("copy")


@pytest.mark.parametrize("path", ["l", "ld", "f", "nope"])
def test_rmtree_of_what_is_no_directory_takes_nothing(sides: Sides, path: str) -> None:
    before = outcome(lambda: sides.fs.walk("/"))
    with pytest.raises(OSError, match=path):
        sides.fs.rmtree(path)
    sides.fs.rmtree(path, ignore_errors=True)
    assert outcome(lambda: sides.fs.walk("/")) == before


# --- pathlib ----------------------------------------------------------------------------------------------------------


def relative(result: Any, top: str) -> Any:
    if isinstance(result, Iterator):
        return sorted(str(relative(each, top)) for each in result)
    if isinstance(result, os.stat_result):
        return stat.S_IFMT(result.st_mode)
    if hasattr(result, "__fspath__"):
        return os.path.relpath("/" + os.fspath(result).removeprefix(top), "/")
    return result


ASKED = ["exists", "is_dir", "is_file", "is_symlink", "is_fifo", "is_socket", "is_block_device", "is_char_device"]
ASKED += ["stat", "lstat", "readlink", "iterdir", "read_bytes", "resolve"]
QUESTIONS: list[tuple[str, tuple[Any, ...]]] = [(name, ()) for name in ASKED]
QUESTIONS += [("read_text", ("utf-8",)), ("read_text", ("ascii", "replace")), ("match", ("*.py",))]
QUESTIONS += [
    ("glob", (p,)) for p in ["*", "**", "**/*", "*.py", "**/*.py", "", "d/*", "[f]", ".*", "*/*", "**/", "d/**", "x"]
]
QUESTIONS += [("rglob", (p,)) for p in ["*", "*.py", "y/*", "d/y", "x", "**", ".*"]]


@pytest.mark.parametrize("path", ["f", "d", "l", "ld", "dangling", "nope", "d/y/z.py", "d/up", "a[b]", "crlf", "f/x"])
def test_a_path_answers_as_that_of_pathlib_does(sides: Sides, path: str) -> None:
    def answer(of: Any, name: str, args: tuple[Any, ...], top: str) -> Any:
        found = outcome(lambda: relative(getattr(of, name)(*args), top))
        return found[:2] if isinstance(found, tuple) else found  # an error: its path is not the same

    for name, args in QUESTIONS:
        expected = answer(sides.plain / path, name, args, f"{sides.plain}/")
        assert answer(sides.fs.path("/") / path, name, args, "/") == expected, (name, args)


def test_a_path_reads_and_writes_lines_as_pathlib_does(sides: Sides) -> None:
    for newline in (None, "", "\r\n"):
        for path in (sides.plain / "text", sides.fs.path("text")):
            assert path.write_text("ä\nb\n", "latin-1", "strict", newline) == 4
        assert sides.fs.read_bytes("text") == (sides.plain / "text").read_bytes()
        assert sides.fs.path("text").read_text("latin-1") == (sides.plain / "text").read_text("latin-1")
    with sides.fs.path("text").open("r", encoding="latin-1", newline="") as file:
        assert file.read() == "ä\r\nb\r\n"


def test_a_path_says_that_its_symlinks_lead_round(sides: Sides) -> None:
    with pytest.raises(RuntimeError, match="loop"):
        sides.fs.path("round").resolve()
    with pytest.raises(FileNotFoundError):
        sides.fs.path("nope").resolve(strict=True)


# --- deep trees -------------------------------------------------------------------------------------------------------


def test_a_tree_may_be_deeper_than_python_recurses(sides: Sides) -> None:
    """Removing one left an upper behind that could not be opened again: who clears work recursed, and failed each time."""
    assert sys.getrecursionlimit() <= DEPTH
    fs, deep = sides.fs, "/n" * DEPTH
    fs.makedirs(deep)
    fs.write_bytes(deep + "/file", b"x")
    assert sum(1 for _ in fs.walk("/n")) == DEPTH
    assert next(fs.walk("/n", topdown=False))[0] == deep
    assert fs.glob("/n/**/file", recursive=True) == [deep + "/file"]
    assert sum(1 for path in fs.path("/n").rglob("*") if fnmatch.fnmatch(path.name, "f*")) == 1
    fs.copytree("/n", "/copy")
    super(Overlay, fs).rmtree("/copy")  # as anybody but root
    fs.rmtree("/n")
    assert not {"n", "copy"} & {*fs.listdir("/")}
    assert os.listdir(sides.work / "work") == []


def test_what_a_killed_process_left_in_work_is_cleared_however_deep(sides: Sides) -> None:
    sides.fs.makedirs("/n" * DEPTH)
    sides.fs.close()
    os.rename(sides.upper / "n", sides.work / "work" / "#1")
    Overlay([sides.lower], sides.upper, sides.work).close()
    assert os.listdir(sides.work / "work") == []


def test_a_file_deep_in_a_lower_is_copied_up(sides: Sides, tmp_path: Path) -> None:
    deep = "/n" * DEPTH
    sides.fs.makedirs(deep)
    sides.fs.close()
    (tmp_path / "next").mkdir()
    with Overlay([sides.lower, sides.upper], tmp_path / "next", sides.work) as fs:
        fs.write_bytes(deep + "/new", b"x")
        assert fs.listdir(deep) == ["new"]
        fs.rmtree("/n")
        assert not fs.exists("/n")
    with Overlay([sides.lower], sides.upper, sides.work) as fs:
        fs.rmtree("/n")


# --- the object itself ------------------------------------------------------------------------------------------------


def test_an_overlay_is_not_copied_and_keeps_its_descriptors(sides: Sides) -> None:
    """copy.deepcopy made a second owner of each descriptor on its way to an error; it closed them, and the overlay then
    wrote to whatever got the numbers next."""
    sides.fs.listdir("d")
    for attempt in (copy.copy, copy.deepcopy, pickle.dumps):
        for what in (sides.fs, sides.fs.path("d"), {"fs": sides.fs}):
            if attempt is not copy.copy or what is sides.fs:
                with pytest.raises(TypeError, match="neither copied nor pickled"):
                    attempt(what)
    gc.collect()
    assert sides.fs.exists("d/x")


def test_an_overlay_says_what_it_is(sides: Sides) -> None:
    assert repr(sides.fs) == f"<Overlay {sides.upper} of 1 lowers>"
    with View([sides.plain, sides.lower]) as view:
        assert repr(view) == "<View of 2 lowers>"
    assert repr(view) == "<View closed>"


def test_one_path_is_no_list_of_lowers(sides: Sides) -> None:
    for make in (lambda: View(str(sides.lower)), lambda: Overlay(str(sides.lower), sides.upper, sides.work)):
        with pytest.raises(TypeError, match="a list of directories"):
            make()
