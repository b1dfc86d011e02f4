"""A differential fuzzer: random stacks of layers, random programs of operations, on a kernel mount and in process.

After every operation the results are compared, at the end the merged trees; then each side's upper is read by the other.
Run it for long with  python tests/overlay_fuzz.py --seed 0 --cases 2000 [--redirect] [--metacopy] [--userxattr] [--index]
A failing case prints its seed and the shrunk program.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import os
import random
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, os.path.dirname(__file__))
from kernel_overlay import SCRATCH, Chroot, mounted

from overlaykit._ext import copyup
from overlaykit.overlay import Overlay, View
from overlaykit.tree import WhiteoutFormat, scan

NAMES = ["a", "b", "c", "d", "e", "f"]
ODD = [".", "..", "x" * 255, "x" * 256, "\udcff", ".wh.a", ".wh..wh..opq", "a b", "#1"]
TARGETS = ["a", "b", "../a", "/a", "/b/c", "../../..", "a/b", "loop", "missing", "/", ".", "b/", "/c/d", "y" * 255]
XATTRS = ["user.k", "user.overlay.opaque", "trusted.k", "trusted.overlay.opaque", "trusted.overlay.overlay.x", "security.k"]
CAPABILITY = bytes.fromhex("0100000200040000000000000000000000000000")
ACL = bytes.fromhex("0200000001000600ffffffff02000400e803000004000400ffffffff10000600ffffffff20000400ffffffff")
SYSTEM_XATTRS = {
    "security.capability": CAPABILITY, "system.posix_acl_access": ACL, "system.posix_acl_default": ACL
}  # fmt: skip
OLD = 1_000_000_000  # all times that a program sets are far from now

Op = tuple[Any, ...]


@dataclass
class Profile:
    """What varies between runs."""

    redirect_dir: bool = False
    metacopy: bool = False
    userxattr: bool = False
    index: bool = False
    most_lowers: int = 4
    operations: int = 40
    rotate: bool = True

    def mount_options(self) -> dict[str, bool]:
        return {
            "redirect_dir": self.redirect_dir, "metacopy": self.metacopy, "userxattr": self.userxattr, "index": self.index
        }  # fmt: skip

    @property
    def prefix(self) -> str:
        return "user.overlay." if self.userxattr else "trusted.overlay."


# --- making layers and programs ---------------------------------------------------------------------------------------


class Maker:
    """Random layers and programs from one seed."""

    def __init__(self, seed: int, profile: Profile) -> None:
        self.random = random.Random(seed)
        self.profile = profile

    def path(self, deepest: int = 3) -> str:
        r = self.random
        names = [r.choice(NAMES[: r.choice([3, 4, 6])]) for _ in range(r.choice([1, 1, 2, 2, 3][: deepest + 2]))]
        if r.random() < 0.03:
            names[r.randrange(len(names))] = r.choice(ODD)
        if r.random() < 0.02:
            names.insert(r.randrange(len(names) + 1), r.choice([".", ".."]))
        path = "/".join(names)
        if r.random() < 0.04:
            path += "/"
        return "/" + path if r.random() < 0.5 else path

    def content(self) -> tuple[str, int]:
        """A letter and how often it is repeated."""
        r = self.random
        return r.choice("xyz"), r.choice([0, 1, r.randrange(2, 200), 5000])

    def layer(self, top: bool) -> list[Op]:
        """A recipe for one layer directory."""
        r = self.random
        recipe: list[Op] = []
        for _ in range(r.choice([3, 6, 12, 20])):
            path = "/".join(r.choice(NAMES[:4]) for _ in range(r.choice([1, 2, 2, 3])))
            kind = r.choices(
                ["file", "dir", "link", "whiteout", "opaque", "xwhiteout", "fifo", "char", "hardlink", "sparse"],
                [8, 8, 3, 4, 3, 1, 1, 1, 12 if self.profile.index else 2, 1],
            )[0]
            look = (
                r.choice([0o644, 0o600, 0o755, 0o4755, 0o2755, 0o1777, 0o000]),
                r.choice([0, 1000]),
                r.choice([0, 1000]),
                OLD + r.randrange(10**6) * 1000 + r.randrange(10**9) / 10**9,
                r.choice([None, None, "user.k", *SYSTEM_XATTRS]),
            )
            argument: Any = self.content() if kind == "file" else None
            if kind == "link":
                argument = r.choice(TARGETS)
            if kind == "hardlink":
                argument = "/".join(r.choice(NAMES[:4]) for _ in range(r.choice([1, 2])))
            recipe.append((kind, path, argument, look))
        return recipe

    def program(self) -> list[Op]:
        return [self.operation() for _ in range(self.random.randrange(5, self.profile.operations))]

    def operation(self) -> Op:
        r = self.random
        path = self.path()
        name = r.choices(
            [
                "open", "mkdir", "rmdir", "unlink", "rename", "link", "symlink", "mknod", "chmod", "chown", "utime",
                "setxattr", "removexattr", "truncate", "stat", "lstat", "listdir", "readlink", "getxattr", "listxattr",
                "access", "write", "read", "remount", "rotate", "rmtree",
            ],
            [14, 8, 6, 9, 12, 5, 4, 2, 4, 3, 4, 4, 2, 4, 4, 4, 5, 3, 2, 2, 2, 5, 6, 1, 1, 2],
        )[0]  # fmt: skip
        if name == "open":
            flags = r.choice([os.O_RDONLY, os.O_WRONLY, os.O_RDWR]) | os.O_NONBLOCK
            for flag, chance in (
                (os.O_CREAT, 0.6), (os.O_EXCL, 0.2), (os.O_TRUNC, 0.2), (os.O_APPEND, 0.1), (os.O_DIRECTORY, 0.07),
                (os.O_NOFOLLOW, 0.1), (os.O_PATH, 0.05), (os.O_TMPFILE, 0.03),
            ):  # fmt: skip
                if r.random() < chance:
                    flags |= flag
            return name, path, flags, r.choice([0o644, 0o600, 0o755, 0o4755]), self.content()
        if name in ("mkdir", "chmod"):
            return name, path, r.choice([0o755, 0o700, 0o2775, 0o1777, 0o4711, 0o644])
        if name == "rename":
            return name, path, self.path(), r.choices([0, 1, 2, 4, 8, 3], [20, 3, 4, 1, 0.3, 0.3])[0]
        if name == "link":
            return name, path, self.path(), r.random() < 0.1
        if name == "symlink":
            return name, r.choice(TARGETS), path
        if name == "mknod":
            nodes = [(stat.S_IFIFO, 0), (stat.S_IFCHR, os.makedev(1, 3)), (stat.S_IFCHR, 0), (stat.S_IFREG, 0)]
            mode, device = r.choice(nodes)
            return name, path, mode | 0o640, device
        if name == "chown":
            return name, path, r.choice([-1, 0, 1000]), r.choice([-1, 0, 1000]), r.random() < 0.5
        if name == "utime":
            return name, path, (OLD * 10**9 + r.randrange(10**15), OLD * 10**9 + r.randrange(10**15)), r.random() < 0.5
        if name == "setxattr":
            key = r.choice([*XATTRS, *SYSTEM_XATTRS])
            value = SYSTEM_XATTRS.get(key) or r.choice([b"", b"v", b"y"])
            return name, path, key, value, r.choice([0, 0, 1, 2]), r.random() < 0.7
        if name in ("removexattr", "getxattr"):
            return name, path, r.choice(XATTRS)
        if name == "truncate":
            return name, path, r.choice([0, 0, 1, 3000, 10000, -1])
        if name == "access":
            return name, path, r.choice([os.F_OK, os.R_OK, os.W_OK, os.X_OK])
        if name == "rmtree":  # what is left of one that fails depends on the order of names
            path = path.replace(".", "e").rstrip("/")
        if name == "write":
            return name, path, r.randrange(0, 6000), self.content()
        return name, path


# --- building layers ---------------------------------------------------------------------------------------------------


def build(directory: Path, recipe: list[Op], prefix: str, below: list[Path]) -> None:
    """Make a layer; what cannot be made (a name below a file) is left out.

    xattr whiteouts only where the directory merges: elsewhere the kernel lists them and then does not know them.
    """
    directory.mkdir()
    for kind, path, argument, look in recipe:
        target = directory / path
        if kind == "xwhiteout" and not (below and os.path.isdir((below[-1] / path).parent)):
            continue
        if any(map(os.path.islink, target.parents)) or os.path.lexists(target):
            continue
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        make_one(target, kind, argument, directory, prefix)
        dress(target, kind, look)
    # making children changed times, so they come last, the deepest first
    for kind, path, _, look in reversed(recipe):
        target = directory / path
        if kind in ("dir", "opaque") and not os.path.islink(target) and os.path.isdir(target):
            os.utime(target, (look[3], look[3]))


def make_one(target: Path, kind: str, argument: Any, root: Path, prefix: str) -> None:
    if kind == "file":
        with target.open("xb") as f:
            f.write((argument[0] * argument[1]).encode())
    elif kind == "sparse":
        with target.open("xb") as f:
            f.truncate(300_000)
            f.seek(200_000)
            f.write(b"data")
    elif kind == "dir":
        target.mkdir()
    elif kind == "opaque":
        target.mkdir()
        os.setxattr(target, prefix + "opaque", b"y")
    elif kind == "link":
        target.symlink_to(argument)
    elif kind == "whiteout":
        os.mknod(target, stat.S_IFCHR, 0)
    elif kind == "xwhiteout":
        if target.parent == root:  # the mark would be on the layer's root, where it may not be set by hand
            return
        if has_xattr(target.parent, prefix + "opaque") and os.getxattr(target.parent, prefix + "opaque") != b"x":
            return
        with target.open("xb"):
            pass
        os.setxattr(target, prefix + "whiteout", b"")
        os.setxattr(target.parent, prefix + "opaque", b"x")
    elif kind == "fifo":
        os.mkfifo(target)
    elif kind == "char":
        os.mknod(target, stat.S_IFCHR | 0o644, os.makedev(1, 3))
    elif kind == "hardlink":
        source = root / argument
        if not any(map(os.path.islink, (source, *source.parents))) and source.is_file():
            if has_xattr(source, prefix + "whiteout"):
                return
            os.link(source, target)


def has_xattr(path: Path, name: str) -> bool:
    return name in os.listxattr(path, follow_symlinks=False)


def dress(target: Path, kind: str, look: tuple[Any, ...]) -> None:
    mode, uid, gid, mtime, xattr = look
    if kind in ("whiteout", "xwhiteout") or not os.path.lexists(target):
        return
    os.chown(target, uid, gid, follow_symlinks=False)
    if kind != "link":
        target.chmod(mode if kind not in ("dir", "opaque") else mode | 0o700)
    if xattr and (kind in ("file", "dir", "opaque") or (xattr == "security.capability" and kind == "sparse")):
        if xattr == "security.capability" and kind in ("dir", "opaque"):
            return
        if xattr == "system.posix_acl_default" and kind == "file":
            return
        os.setxattr(target, xattr, SYSTEM_XATTRS.get(xattr, b"v"))
    os.utime(target, (mtime, mtime), follow_symlinks=False)


# --- running ----------------------------------------------------------------------------------------------------------


class KernelOs:
    """os, inside the merged mount."""

    def __init__(self, merged: Path) -> None:
        self.chroot = Chroot(merged)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        function = getattr(os, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            with self.chroot:
                return function(*args, **kwargs)

        return call

    def open_fd(self, path: str, flags: int, mode: int = 0o777) -> int:
        with self.chroot:
            return os.open(path, flags, mode)

    def rename(self, src: str, dst: str, *, flags: int = 0) -> None:
        with self.chroot:
            copyup.rename_at(-100, os.fsencode(src), -100, os.fsencode(dst), flags)

    def link(self, src: str, dst: str, *, follow_symlinks: bool = False) -> None:
        with self.chroot:
            here = os.open(".", os.O_PATH)
            try:
                os.link(src, dst, src_dir_fd=here, dst_dir_fd=here, follow_symlinks=follow_symlinks)
            finally:
                os.close(here)

    def rmtree(self, path: str) -> None:
        with self.chroot:
            if os.path.islink(path.rstrip("/")) and not path.endswith("/"):
                raise OSError(errno.ENOTDIR, "symlink")
            if not stat.S_ISDIR(os.lstat(path).st_mode):
                raise OSError(errno.ENOTDIR, "no directory")
            head, _, name = path.rpartition("/")  # real, or it would saw off the symlink it came by
            self.remove_all(os.path.join(os.path.realpath(head or "."), name))

    def remove_all(self, path: str) -> None:
        for entry in list(os.scandir(path)):
            if entry.is_dir(follow_symlinks=False):
                self.remove_all(entry.path)
            elif os.path.lexists(entry.path):  # else a whiteout that the kernel lists and does not know
                os.unlink(entry.path)
        os.rmdir(path)

    def close(self) -> None:
        self.chroot.close()


@dataclass
class Side:
    """One of the two that run the program, and how what it says is put into comparable form."""

    fs: Any
    began: float
    in_process: bool
    inodes: frozenset[int] | None = None  # of the lowers that both sides share; None: numbers are not looked at
    userxattr: bool = False

    def run(self, op: Op) -> Any:
        try:
            return self.act(*op)
        except OSError as e:
            return f"errno {errno.errorcode.get(e.errno or 0, e.errno)}"
        except ValueError as e:
            return f"ValueError {e}"

    def act(self, name: str, *args: Any) -> Any:
        fs = self.fs
        if name == "open":
            path, flags, mode, content = args
            fd = fs.open_fd(path, flags, mode)
            try:
                out: list[Any] = [stat.S_IFMT(os.fstat(fd).st_mode)]
                if flags & os.O_PATH or not stat.S_ISREG(os.fstat(fd).st_mode):
                    return out
                if flags & os.O_ACCMODE != os.O_RDONLY and content[1]:
                    out.append(os.write(fd, (content[0] * content[1]).encode()))
                if flags & os.O_ACCMODE != os.O_WRONLY:
                    os.lseek(fd, 0, 0)
                    out.append(hashlib.md5(os.read(fd, 1 << 20)).hexdigest())
                return out
            finally:
                os.close(fd)
        if name == "write":
            fd = fs.open_fd(args[0], os.O_WRONLY | os.O_NONBLOCK)
            try:
                data = (args[2][0] * args[2][1]).encode()
                return os.pwrite(fd, data, args[1]) if stat.S_ISREG(os.fstat(fd).st_mode) else "not a file"
            finally:
                os.close(fd)
        if name == "read":
            fd = fs.open_fd(args[0], os.O_RDONLY | os.O_NONBLOCK)
            try:
                if not stat.S_ISREG(os.fstat(fd).st_mode):
                    return "not a file"
                return hashlib.md5(os.read(fd, 1 << 20)).hexdigest(), os.fstat(fd).st_size
            finally:
                os.close(fd)
        if name in ("stat", "lstat"):
            return self.look(getattr(fs, name)(args[0]))
        if name == "listdir":
            return self.names(args[0])
        if name == "listxattr":
            return sorted(fs.listxattr(args[0], follow_symlinks=False))
        if name == "utime":
            return fs.utime(args[0], ns=args[1], follow_symlinks=args[2])
        if name == "chown":
            return fs.chown(*args[:3], follow_symlinks=args[3])
        if name == "setxattr":
            return fs.setxattr(*args[:4], follow_symlinks=args[4])
        if name in ("removexattr", "getxattr"):
            return getattr(fs, name)(*args, follow_symlinks=False)
        if name == "rename":
            return fs.rename(args[0], args[1], flags=args[2])
        if name == "link":
            return fs.link(args[0], args[1], follow_symlinks=args[2])
        return getattr(fs, name)(*args)

    def names(self, path: str) -> list[str]:
        out = []
        for name in self.fs.listdir(path):
            # The kernel lists some whiteouts of directories that do not merge, and then does not know them.
            try:
                self.fs.lstat(path.rstrip("/") + "/" + name if path != "/" else "/" + name)
            except FileNotFoundError:
                if self.in_process:
                    raise AssertionError(f"{path}/{name} is listed and not there") from None
                continue
            out.append(name)
        return sorted(out)

    def look(self, st: os.stat_result) -> tuple[Any, ...]:
        kind = stat.S_IFMT(st.st_mode)
        size = 0 if stat.S_ISDIR(kind) else st.st_size
        rdev = st.st_rdev if kind in (stat.S_IFCHR, stat.S_IFBLK) else 0
        mtime = "now" if st.st_mtime >= self.began - 5 else st.st_mtime_ns
        seen = oct(st.st_mode), st.st_uid, st.st_gid, size, rdev, mtime
        if self.inodes is None:
            return seen
        if kind not in (stat.S_IFREG, stat.S_IFDIR) and self.userxattr:
            return seen  # the kernel knows their origin only until it forgets the inode
        links = 0 if stat.S_ISDIR(kind) else st.st_nlink
        return *seen, links, st.st_ino if st.st_ino in self.inodes else "new"

    def tree(self) -> dict[str, Any]:
        """Everything there is: path -> what it looks like, content, xattrs."""
        out: dict[str, Any] = {}
        todo = ["/"]
        while todo:
            path = todo.pop()
            st = self.fs.lstat(path)
            entry: list[Any] = [*self.look(st)]
            if stat.S_ISLNK(st.st_mode):
                entry.append(self.fs.readlink(path))
            elif stat.S_ISREG(st.st_mode):
                fd = self.fs.open_fd(path, os.O_RDONLY)
                entry.append(hashlib.md5(os.read(fd, 1 << 20)).hexdigest())
                os.close(fd)
            elif stat.S_ISDIR(st.st_mode):
                todo.extend(path.rstrip("/") + "/" + name for name in self.names(path))
            keys = sorted(self.fs.listxattr(path, follow_symlinks=False))
            out[path] = (*entry, *((key, self.fs.getxattr(path, key, follow_symlinks=False)) for key in keys))
        return out


class Difference(AssertionError):
    """The two sides do not agree. `step`: the operation after which, None at the end."""

    def __init__(self, message: str, step: int | None) -> None:
        super().__init__(message)
        self.step = step


class Quirk(Exception):
    """The kernel takes a directory for not empty in which only xattr whiteouts are left, which it does not list
    (ovl_check_empty_dir never looks for them); overlaykit removes it. From here on the two sides are apart."""


@dataclass
class Case:
    """Layers and a program."""

    layers: list[list[Op]]
    program: list[Op]
    profile: Profile


def make_case(seed: int, profile: Profile) -> Case:
    maker = Maker(seed, profile)
    count = maker.random.randrange(1, profile.most_lowers + 1)
    return Case([maker.layer(i == count - 1) for i in range(count)], maker.program(), profile)


def fingerprint(directory: Path) -> dict[str, Any]:
    out = {}
    for top, dirs, files in os.walk(directory):
        for name in [".", *dirs, *files]:
            path = os.path.join(top, name)
            st = os.lstat(path)
            out[path] = (st.st_mode, st.st_uid, st.st_gid, st.st_size, st.st_mtime_ns, st.st_nlink, st.st_ino)
    return out


class Runner:
    """Both sides of one case, in a scratch directory."""

    def __init__(self, case: Case, base: Path) -> None:
        self.case, self.base = case, base
        self.began = time.time()
        self.lowers: dict[str, list[Path]] = {"k": [], "v": []}
        for i, recipe in enumerate(case.layers):
            build(base / f"lower{i}", recipe, case.profile.prefix, self.lowers["k"])
            for side in "kv":
                self.lowers[side].append(base / f"lower{i}")
        self.before = {i: fingerprint(lower) for i, lower in enumerate(self.lowers["k"])}
        self.inodes = frozenset(look[-1] for before in self.before.values() for look in before.values())
        self.generation = 0
        self.xattr_whiteouts = any(op[0] == "xwhiteout" for recipe in case.layers for op in recipe)
        (base / "merged").mkdir()
        self.fresh()

    def fresh(self) -> None:
        """New, empty uppers."""
        self.upper = {side: self.base / f"upper-{side}{self.generation}" for side in "kv"}
        self.work = {side: self.base / f"work-{side}{self.generation}" for side in "kv"}
        for side in "kv":
            self.upper[side].mkdir()
            self.work[side].mkdir()
            os.utime(self.upper[side], (OLD, OLD))

    def kernel(self, lowers: str, upper: str) -> Any:
        options = self.case.profile.mount_options()
        return mounted(self.lowers[lowers], self.upper[upper], self.work[upper], self.base / "merged", **options)

    def ours(self, lowers: str, upper: str) -> Overlay:
        return Overlay(self.lowers[lowers], self.upper[upper], self.work[upper], **self.case.profile.mount_options())

    def run(self) -> int:
        """The number of operations; Difference if the sides disagree."""
        program = list(enumerate(self.case.program))
        while program:
            with self.kernel("k", "k") as merged, self.ours("v", "v") as overlay:
                kernel = Side(KernelOs(merged), self.began, False, self.inodes, self.case.profile.userxattr)
                ours = Side(overlay, self.began, True, self.inodes, self.case.profile.userxattr)
                try:
                    again = self.some(program, kernel, ours)
                    self.compare(kernel.tree(), ours.tree(), "merged tree", None)
                finally:
                    kernel.fs.close()
            self.swap()
            if again == "rotate" and self.case.profile.rotate and len(self.lowers["k"]) < 8:
                for side in "kv":
                    self.lowers[side].append(self.upper[side])
                self.generation += 1
                self.fresh()
        for i, lower in enumerate(self.lowers["k"][: len(self.before)]):
            if fingerprint(lower) != self.before[i]:
                raise Difference(f"lower {i} was written to", None)
        return len(self.case.program)

    def some(self, program: list[tuple[int, Op]], kernel: Side, ours: Side) -> str:
        while program:
            step, op = program.pop(0)
            if op[0] in ("remount", "rotate"):
                return str(op[0])
            a, b = kernel.run(op), ours.run(op)
            if a == "errno ENOTEMPTY" and a != b and self.xattr_whiteouts:
                raise Quirk
            if a != b:
                raise Difference(f"step {step} {op}: kernel {a}, overlaykit {b}", step)
            leftovers = os.listdir(self.work["v"] / "work")
            if leftovers:
                raise Difference(f"step {step} {op}: left {leftovers} in work", step)
        return "end"

    def swap(self) -> None:
        """Each upper, read by the other side."""
        with self.kernel("v", "v") as merged:
            side = Side(KernelOs(merged), self.began, False, self.inodes, self.case.profile.userxattr)
            theirs = side.tree()
            side.fs.close()
        with self.ours("k", "k") as overlay:
            mine = Side(overlay, self.began, True, self.inodes, self.case.profile.userxattr).tree()
            plain = Side(overlay, self.began, True).tree()
        self.compare(theirs, mine, "uppers read by the other", None)
        if self.case.profile.index:  # of which a stack of layers knows nothing
            return
        with View([*self.lowers["k"], self.upper["k"]], userxattr=self.case.profile.userxattr) as view:
            viewed = Side(view, self.began, True).tree()
        self.compare(plain, viewed, "overlay and view", None)
        if self.case.profile.redirect_dir or self.case.profile.metacopy:
            return
        form = WhiteoutFormat.USERXATTR if self.case.profile.userxattr else WhiteoutFormat.OVERLAY
        layers = [*self.lowers["k"], self.upper["k"]]
        trees = [scan(layer, whiteouts=form) for layer in layers]
        with View(layers, trees=trees, userxattr=self.case.profile.userxattr) as view:
            self.compare(viewed, Side(view, self.began, True).tree(), "view without and with trees", None)

    @staticmethod
    def compare(kernel: dict[str, Any], ours: dict[str, Any], what: str, step: int | None) -> None:
        if kernel == ours:
            return
        lines = [
            f"  {path}\n    kernel     {kernel.get(path)}\n    overlaykit {ours.get(path)}"
            for path in sorted(kernel.keys() | ours.keys())
            if kernel.get(path) != ours.get(path)
        ]
        raise Difference(f"{what}:\n" + "\n".join(lines[:8]), step)


def run_case(case: Case) -> int:
    base = Path(tempfile.mkdtemp(dir=SCRATCH, prefix="fuzz-"))
    old = os.umask(0o022)
    try:
        return Runner(case, base).run()
    except Quirk:
        return 0
    finally:
        os.umask(old)
        shutil.rmtree(base, ignore_errors=True)


def differs(case: Case) -> str:
    try:
        run_case(case)
    except Difference as e:
        return str(e)
    except AssertionError as e:
        return f"assertion {e}"
    except Exception as e:
        return f"{type(e).__name__}: {e}"
    return ""


def shrink(case: Case) -> Case:
    """A smaller case that still differs: drops operations, layers and entries while it can."""
    budget = time.time() + 40

    def attempt(smaller: Case) -> bool:
        return time.time() < budget and bool(differs(smaller))

    changed = True
    while changed and time.time() < budget:
        changed = False
        size = max(1, len(case.program) // 2)
        while size >= 1:
            i = 0
            while i < len(case.program):
                smaller = Case(case.layers, case.program[:i] + case.program[i + size :], case.profile)
                if attempt(smaller):
                    case, changed = smaller, True
                else:
                    i += size
            size //= 2
        for n in range(len(case.layers)):
            size = max(1, len(case.layers[n]) // 2)
            while size >= 1:
                i = 0
                while i < len(case.layers[n]):
                    layers = [list(layer) for layer in case.layers]
                    del layers[n][i : i + size]
                    smaller = Case(layers, case.program, case.profile)
                    if attempt(smaller):
                        case, changed = smaller, True
                    else:
                        i += size
                size //= 2
        n = 0
        while len(case.layers) > 1 and n < len(case.layers):
            smaller = Case(case.layers[:n] + case.layers[n + 1 :], case.program, case.profile)
            if attempt(smaller):
                case, changed = smaller, True
            else:
                n += 1
    return case


def show(case: Case) -> str:
    lines = [f"lower {i}: {op}" for i, layer in enumerate(case.layers) for op in layer]
    text = "\n".join([*lines, *map(repr, case.program)])
    return text.replace("x" * 255, "xxx255").replace("y" * 255, "yyy255")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--redirect", action="store_true")
    parser.add_argument("--metacopy", action="store_true")
    parser.add_argument("--userxattr", action="store_true")
    parser.add_argument("--index", action="store_true")
    parser.add_argument("--operations", type=int, default=40)
    parser.add_argument("--most", type=int, default=1, help="differences after which to stop")
    args = parser.parse_args()
    profile = Profile(
        redirect_dir=args.redirect,
        metacopy=args.metacopy,
        userxattr=args.userxattr,
        index=args.index,
        operations=args.operations,
    )
    done = found = 0
    began = time.time()
    for seed in range(args.seed, args.seed + args.cases):
        case = make_case(seed, profile)
        try:
            done += run_case(case)
        except Exception as e:
            if not isinstance(e, AssertionError):
                import traceback

                traceback.print_exc(limit=-4)
            small = shrink(case)
            print(f"--- seed {seed}: {differs(small) or e}\n{show(small)}\n", flush=True)
            found += 1
            if found >= args.most:
                break
    print(f"{done} operations, {found} differences, {time.time() - began:.0f} s")
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
