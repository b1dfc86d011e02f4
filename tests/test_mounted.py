"""Directories and files of the host in an overlay, in process: against the kernel's own mounts, errno by errno."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peers
import pytest

from overlaykit.overlay import Overlay, View, bind_mount, mount, overlay_mount
from overlaykit.overlay.bound import Bound
from overlaykit.overlay.mount import set_read_only
from overlaykit.overlay.mounted import Mounted

MOUNTS = (("/data", "vol", False), ("/ro", "vol2", True), ("/data/sub", "vol3", False), ("/etc/hosts", "hosts", False))


def build(place: Path) -> None:
    """lower, upper and work of an overlay, and what is to be mounted in it."""
    for name in (
        "lower/etc",
        "lower/data/sub",
        "lower/ro",
        "lower/plain/deep",
        "upper",
        "work",
        "vol/sub/x",
        "vol2/d",
        "vol3",
    ):
        (place / name).mkdir(parents=True)
    for name in (
        "lower/etc/hosts",
        "lower/etc/motd",
        "lower/data/hidden",
        "vol/file",
        "vol2/file",
        "vol2/d/f",
        "vol3/deep",
        "hosts",
    ):
        (place / name).write_text(f"{name}\n")
    (place / "lower/link").symlink_to("/data/file")
    (place / "lower/to-data").symlink_to("data")
    (place / "vol/out").symlink_to("/etc/motd")
    (place / "vol/up").symlink_to("../../../../etc/motd")
    (place / "vol/loop").symlink_to("loop")
    (place / "vol/dangling").symlink_to("nowhere")


class InKernel:
    """os on a mounted tree whose root the process has changed to, for absolute symlinks to mean the same."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def __call__(self, operation: Callable[[Any], Any]) -> Any:
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.chroot(self.root)
            os.chdir("/")
            os.write(write, repr(outcome(operation, os)).encode())
            os._exit(0)
        os.close(write)
        with open(read, "rb") as file:
            answer = file.read().decode()
        os.waitpid(pid, 0)
        return answer


def outcome(operation: Callable[[Any], Any], fs: Any) -> tuple[str, Any]:
    try:
        return "gives", operation(fs)
    except OSError as e:
        return "raises", e.errno


def spell(fs: Any, path: str, flags: int, data: bytes = b"", mode: int = 0o644) -> Any:
    fd = fs.open_fd(path, flags, mode) if isinstance(fs, Mounted) else os.open(path, flags, mode)
    try:
        return os.write(fd, data) if data else os.read(fd, 100) if not flags & os.O_DIRECTORY else None
    finally:
        os.close(fd)


W = os.O_WRONLY | os.O_CREAT
OPERATIONS: dict[str, Callable[[Any], Any]] = {
    "list /": lambda fs: sorted(fs.listdir("/")),
    "list the volume": lambda fs: sorted(fs.listdir("/data")),
    "list through a symlink": lambda fs: sorted(fs.listdir("/to-data/.")),
    "list a file": lambda fs: fs.listdir("/data/file"),
    "list the inner volume": lambda fs: sorted(fs.listdir("/data/sub")),
    "read through a symlink into the volume": lambda fs: spell(fs, "/link", os.O_RDONLY),
    "read through a symlink out of the volume": lambda fs: spell(fs, "/data/out", os.O_RDONLY),
    "dots stop at the root": lambda fs: spell(fs, "/data/up", os.O_RDONLY),
    "dots leave the volume": lambda fs: spell(fs, "/data/../etc/motd", os.O_RDONLY),
    "dots leave the inner volume": lambda fs: spell(fs, "/data/sub/../file", os.O_RDONLY),
    "read the mounted file": lambda fs: spell(fs, "/etc/hosts", os.O_RDONLY),
    "what is hidden": lambda fs: fs.stat("/data/hidden").st_size,
    "a loop": lambda fs: fs.stat("/data/loop").st_size,
    "lstat of a loop": lambda fs: stat.S_IFMT(fs.lstat("/data/loop").st_mode),
    "dangling": lambda fs: fs.stat("/data/dangling").st_size,
    "below a file": lambda fs: fs.stat("/data/file/x").st_size,
    "a slash after a file": lambda fs: fs.stat("/data/file/").st_size,
    "readlink": lambda fs: fs.readlink("/data/out"),
    "readlink of a file": lambda fs: fs.readlink("/data/file"),
    "write to the volume": lambda fs: spell(fs, "/data/new", W, b"new"),
    "write to the mounted file": lambda fs: spell(fs, "/etc/hosts", os.O_WRONLY | os.O_TRUNC, b"changed"),
    "write to the image": lambda fs: spell(fs, "/etc/motd", W, b"lifted"),
    "create what is there": lambda fs: spell(fs, "/data/file", W | os.O_EXCL, b"x"),
    "create over a dangling link": lambda fs: spell(fs, "/data/dangling", W, b"through"),
    "create a directory by open": lambda fs: spell(fs, "/data/newdir/", W, b"x"),
    "open a directory to write": lambda fs: spell(fs, "/data/sub", os.O_WRONLY, b"x"),
    "open a symlink that is not to be followed": lambda fs: spell(fs, "/data/out", os.O_RDONLY | os.O_NOFOLLOW),
    "open a file as a directory": lambda fs: spell(fs, "/data/file", os.O_RDONLY | os.O_DIRECTORY),
    "read-only: read": lambda fs: spell(fs, "/ro/file", os.O_RDONLY),
    "read-only: write": lambda fs: spell(fs, "/ro/file", os.O_WRONLY, b"x"),
    "read-only: create": lambda fs: spell(fs, "/ro/new", W, b"x"),
    "read-only: truncate": lambda fs: fs.truncate("/ro/file", 0),
    "read-only: mkdir": lambda fs: fs.mkdir("/ro/new"),
    "read-only: mkdir of what is there": lambda fs: fs.mkdir("/ro/d"),
    "read-only: unlink": lambda fs: fs.unlink("/ro/file"),
    "read-only: unlink what is not there": lambda fs: fs.unlink("/ro/nothing"),
    "read-only: rmdir": lambda fs: fs.rmdir("/ro/d"),
    "read-only: rename": lambda fs: fs.rename("/ro/file", "/ro/other"),
    "read-only: rename what is not there": lambda fs: fs.rename("/ro/nothing", "/ro/other"),
    "read-only: link": lambda fs: fs.link("/ro/file", "/ro/other"),
    "read-only: link from elsewhere": lambda fs: fs.link("/data/file", "/ro/other"),
    "read-only: symlink": lambda fs: fs.symlink("x", "/ro/s"),
    "read-only: chmod": lambda fs: fs.chmod("/ro/file", 0o600),
    "read-only: chmod of nothing": lambda fs: fs.chmod("/ro/nothing", 0o600),
    "read-only: chown": lambda fs: fs.chown("/ro/file", 1, 1),
    "read-only: utime": lambda fs: fs.utime("/ro/file", ns=(1, 1)),
    "read-only: setxattr": lambda fs: fs.setxattr("/ro/file", "trusted.a", b"1"),
    "rename in the volume": lambda fs: fs.rename("/data/new", "/data/renamed"),
    "rename out of the volume": lambda fs: fs.rename("/data/file", "/file"),
    "rename into the volume": lambda fs: fs.rename("/etc/motd", "/data/motd"),
    "rename between volumes": lambda fs: fs.rename("/data/file", "/data/sub/file"),
    "rename what is not there out": lambda fs: fs.rename("/data/nothing", "/nothing"),
    "rename a mount point": lambda fs: fs.rename("/data", "/date"),
    "rename an inner mount point": lambda fs: fs.rename("/data/sub", "/data/bus"),
    "rename over a mount point": lambda fs: fs.rename("/etc/motd", "/etc/hosts"),
    "rename a mount point that is a file": lambda fs: fs.rename("/etc/hosts", "/etc/h"),
    "link in the volume": lambda fs: fs.link("/data/file", "/data/again"),
    "link out of the volume": lambda fs: fs.link("/data/file", "/again"),
    "link over what is there": lambda fs: fs.link("/data/file", "/etc/motd"),
    "link the mounted file": lambda fs: fs.link("/etc/hosts", "/etc/hosts2"),
    "unlink a mounted file": lambda fs: fs.unlink("/etc/hosts"),
    "unlink a mounted directory": lambda fs: fs.unlink("/data"),
    "rmdir a mounted directory": lambda fs: fs.rmdir("/data"),
    "rmdir an inner mount point": lambda fs: fs.rmdir("/data/sub"),
    "rmdir a mounted file": lambda fs: fs.rmdir("/etc/hosts"),
    "rmdir dot": lambda fs: fs.rmdir("/data/."),
    "rmdir dots": lambda fs: fs.rmdir("/data/.."),
    "rmdir nothing": lambda fs: fs.rmdir("/data/nothing"),
    "unlink nothing": lambda fs: fs.unlink("/data/nothing"),
    "unlink in the volume": lambda fs: fs.unlink("/data/renamed"),
    "unlink a directory in the volume": lambda fs: fs.unlink("/ro/d"),
    "mkdir in the volume": lambda fs: fs.mkdir("/data/dir", 0o750),
    "mkdir with a slash": lambda fs: fs.mkdir("/data/slashed/"),
    "mkdir on a mount point": lambda fs: fs.mkdir("/data"),
    "mkdir below nothing": lambda fs: fs.mkdir("/data/nothing/x"),
    "rmdir in the volume": lambda fs: fs.rmdir("/data/slashed"),
    "symlink": lambda fs: fs.symlink("../ro/file", "/data/dir/s"),
    "through the new symlink": lambda fs: spell(fs, "/data/dir/s", os.O_RDONLY),
    "a longer way through": lambda fs: spell(fs, "/to-data/../to-data/sub/deep", os.O_RDONLY),
    "mknod": lambda fs: fs.mknod("/data/fifo", stat.S_IFIFO | 0o600),
    "chmod in the volume": lambda fs: fs.chmod("/data/file", 0o600),
    "chmod of a mount point": lambda fs: fs.chmod("/data", 0o700),
    "chown of a symlink": lambda fs: fs.chown("/data/out", 7, 8, follow_symlinks=False),
    "owner of the symlink": lambda fs: fs.lstat("/data/out").st_uid,
    "utime": lambda fs: fs.utime("/data/file", ns=(10**18, 10**18 + 1)),
    "time": lambda fs: fs.stat("/data/file").st_mtime_ns,
    "truncate": lambda fs: fs.truncate("/data/file", 2),
    "xattr": lambda fs: fs.setxattr("/data/file", "trusted.a", b"1"),
    "the xattr": lambda fs: fs.getxattr("/data/file", "trusted.a"),
    "no such xattr": lambda fs: fs.getxattr("/data/file", "trusted.b"),
    "remove the xattr": lambda fs: fs.removexattr("/data/file", "trusted.a"),
    "image: create": lambda fs: spell(fs, "/new", W, b"x"),
    "image: create what is there": lambda fs: spell(fs, "/etc/motd", W | os.O_EXCL, b"x"),
    "image: append": lambda fs: spell(fs, "/etc/motd", os.O_WRONLY | os.O_APPEND, b"x"),
    "image: read": lambda fs: spell(fs, "/etc/motd", os.O_RDONLY),
    "image: truncate": lambda fs: fs.truncate("/etc/motd", 3),
    "image: mkdir": lambda fs: fs.mkdir("/fresh"),
    "image: mkdir of what is there": lambda fs: fs.mkdir("/etc"),
    "image: mkdir of a mount point": lambda fs: fs.mkdir("/ro"),
    "image: mkfifo": lambda fs: fs.mkfifo("/fifo"),
    "image: symlink": lambda fs: fs.symlink("x", "/s"),
    "image: link": lambda fs: fs.link("/etc/motd", "/etc/motd2"),
    "image: link of nothing": lambda fs: fs.link("/nothing", "/etc/motd3"),
    "image: rename": lambda fs: fs.rename("/etc/motd", "/etc/motd4"),
    "image: rename nothing": lambda fs: fs.rename("/nothing", "/etc/motd4"),
    "image: chmod": lambda fs: fs.chmod("/plain", 0o700),
    "image: chmod of nothing": lambda fs: fs.chmod("/nothing", 0o700),
    "image: chown": lambda fs: fs.chown("/plain", 3, 4),
    "image: utime": lambda fs: fs.utime("/plain/deep", ns=(1, 1)),
    "image: setxattr": lambda fs: fs.setxattr("/plain", "trusted.a", b"1"),
    "image: removexattr": lambda fs: fs.removexattr("/plain", "trusted.a"),
    "image: unlink": lambda fs: fs.unlink("/link"),
    "image: unlink nothing": lambda fs: fs.unlink("/nothing"),
    "image: rmdir": lambda fs: fs.rmdir("/plain/deep"),
    "the empty path": lambda fs: fs.stat(""),
    "list / at last": lambda fs: sorted(fs.listdir("/")),
}  # fmt: skip


@pytest.fixture
def place() -> Iterator[Path]:
    peers.need_root("only root mounts")
    with peers.overlay_place("mounted") as path:
        yield path
        peers.unmount_below(path)


def tree(top: Path) -> list[tuple[object, ...]]:
    """Every name below `top` with what a user can see of it, times of directories aside."""
    found: list[tuple[object, ...]] = []
    for directory, dirs, files in os.walk(top):
        for name in [*dirs, *files]:
            path = Path(directory) / name
            st = path.lstat()
            content = path.read_bytes() if stat.S_ISREG(st.st_mode) else os.readlink(path) if path.is_symlink() else b""
            found.append(
                (str(path.relative_to(top)), st.st_mode, st.st_uid, st.st_gid, content, st.st_nlink * path.is_file())
            )
    return sorted(found)


@pytest.mark.parametrize("sealed", [False, True], ids=["writable", "read-only"])
def test_each_operation_gives_what_the_kernels_mounts_give(place: Path, sealed: bool) -> None:
    """sealed: nothing can be changed but through the mounts, as in a container that was made with --read-only."""
    kernel, ours = place / "kernel", place / "ours"
    for side in (kernel, ours):
        build(side)
    merged = kernel / "merged"
    merged.mkdir()
    mount(overlay_mount([kernel / "lower"], kernel / "upper", kernel / "work", merged))
    for target, source, read_only in MOUNTS:
        mount(bind_mount(kernel / source, f"{merged}{target}", read_only=read_only))
    if sealed:
        set_read_only(merged)
    bounds = [Bound(target, ours / source, read_only=read_only) for target, source, read_only in MOUNTS]
    run = InKernel(merged)
    different = []
    lower, upper = ours / "lower", ours / "upper"
    with Mounted(View([lower, upper]) if sealed else Overlay([lower], upper, ours / "work"), bounds) as fs:
        for name, operation in OPERATIONS.items():
            theirs, mine = run(operation), repr(outcome(operation, fs))
            if theirs != mine:
                different.append(f"{name}: kernel {theirs}, here {mine}")
    assert different == []
    for source in ("vol", "vol2", "vol3", "upper"):
        assert tree(ours / source) == tree(kernel / source)
    assert (ours / "hosts").read_bytes() == (kernel / "hosts").read_bytes()


def test_mount_points_that_are_missing_are_made_in_upper(place: Path) -> None:
    build(place)
    bounds = [Bound("/new/dir", place / "vol"), Bound("/new/file", place / "hosts"), Bound("/new/dir/made", place / "vol3")]
    with Mounted(Overlay([place / "lower"], place / "upper", place / "work"), bounds) as fs:
        assert fs.read_bytes("/new/dir/file") == b"vol/file\n"
        assert fs.read_bytes("/new/file") == b"hosts\n"
        assert fs.read_bytes("/new/dir/made/deep") == b"vol3/deep\n"
    assert (place / "upper/new/file").stat().st_size == 0
    assert os.listdir(place / "upper/new/dir") == []
    assert (place / "vol/made").is_dir()


def test_a_mount_that_fails_closes_the_overlay(place: Path) -> None:
    build(place)
    overlay = Overlay([place / "lower"], place / "upper", place / "work")
    with pytest.raises(NotADirectoryError):
        Mounted(overlay, [Bound("/etc/motd", place / "vol")])
    assert overlay.closed


def test_a_tree_is_removed_but_for_what_is_mounted_in_it(place: Path) -> None:
    build(place)
    with Mounted(Overlay([place / "lower"], place / "upper", place / "work"), [Bound("/plain/deep", place / "vol")]) as fs:
        with pytest.raises(OSError, match="busy"):
            fs.rmtree("/plain")
        assert fs.listdir("/plain") == ["deep"]


def test_a_symlink_swapped_in_leads_nowhere_outside(place: Path) -> None:
    build(place)
    secret = place / "secret"
    secret.write_text("host's own\n")
    with Mounted(Overlay([place / "lower"], place / "upper", place / "work"), [Bound("/data", place / "vol")]) as fs:
        (place / "vol/evil").symlink_to(secret)
        with pytest.raises(FileNotFoundError):
            fs.read_bytes("/data/evil")
        shutil.rmtree(place / "vol/sub")
        (place / "vol/sub").symlink_to(place)
        with pytest.raises(FileNotFoundError):
            fs.read_bytes("/data/sub/secret")


def test_a_directory_of_any_layer_is_one_beside_a_mount(place: Path) -> None:
    """Entries took the layer's number for a part of what they are: of an image with several layers only the bottom had
    directories, and walk and cp -r left out what is in all others."""
    build(place)
    for layer, path in (("lower", "bottom/f"), ("lower2", "middle/f"), ("lower3", "top/f")):
        (place / layer / path).parent.mkdir(parents=True, exist_ok=True)
        (place / layer / path).write_bytes(b"x")
        (place / layer / f"link-{layer}").symlink_to("bottom")
    lowers = [place / "lower", place / "lower2", place / "lower3"]
    with Mounted(Overlay(lowers, place / "upper", place / "work"), [Bound("/data", place / "vol")]) as fs:
        names = ("bottom", "middle", "top")
        assert {f"/{name}" for name in names} <= {path for path, _, files in fs.walk("/") if "f" in files}
        with fs.scandir("/") as found:
            kinds = {e.name: (e.is_dir(follow_symlinks=False), e.is_file(), e.is_symlink(), e.is_dir()) for e in found}
        for name in names:
            assert kinds[name] == (True, False, False, True)
        for name in ("lower", "lower2", "lower3"):
            assert kinds[f"link-{name}"] == (False, False, True, True)


def test_in_a_mount_a_slash_asks_for_a_directory_and_a_symlink_has_no_mode(place: Path) -> None:
    build(place)
    with Mounted(Overlay([place / "lower"], place / "upper", place / "work"), [Bound("/data", place / "vol")]) as fs:
        fs.mkdir("/data/made")
        fs.rename("/data/made/", "/data/moved/")
        assert (place / "vol/moved").is_dir()
        with pytest.raises(NotADirectoryError):
            fs.rename("/data/file", "/data/other/")
        with pytest.raises(OSError, match="not supported"):
            fs.chmod("/data/dangling", 0o600, follow_symlinks=False)
        fs.chmod("/data/file", 0o600, follow_symlinks=False)
        assert (place / "vol/file").stat().st_mode & 0o777 == 0o600
