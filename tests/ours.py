"""overlaykit as the interop tests use it: its command line in a process of its own, and changes that can be made alike
in a container of ours, in a plain directory and in a container of Docker."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

StrPath = str | os.PathLike[str]
MAIN = "import sys; from overlaykit.cli import main; sys.exit(main())"


def command(root: StrPath, *args: StrPath, check: bool = True) -> subprocess.CompletedProcess[str]:
    """The finished command `overlaykit --root ROOT ARGS`; AssertionError with its output if it failed."""
    argv = [sys.executable, "-c", MAIN, "--root", os.fspath(root), *map(os.fspath, args)]
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=900, check=False)
    if check and done.returncode:
        raise AssertionError(f"overlaykit {shlex.join(argv[5:])}: {done.returncode}\n{done.stdout}{done.stderr}")
    return done


@contextmanager
def mounted(root: StrPath, container: str, target: Path) -> Iterator[Path]:
    """A container's tree, mounted by the kernel on the new folder `target`."""
    target.mkdir()
    command(root, "mount", container, target)
    try:
        yield target
    finally:
        command(root, "umount", container)


class Plain:
    """The functions of os on paths inside one directory: what an Overlay is compared with."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def inside(self, path: str) -> str:
        return f"{self.directory}{path}"

    def open(self, path: str, mode: str = "r", **options: Any) -> Any:
        return open(self.inside(path), mode, **options)

    def link(self, source: str, target: str) -> None:
        os.link(self.inside(source), self.inside(target))

    def rename(self, source: str, target: str) -> None:
        os.rename(self.inside(source), self.inside(target))

    def symlink(self, target: str, path: str) -> None:
        os.symlink(target, self.inside(path))

    def __getattr__(self, name: str) -> Callable[..., Any]:
        function = getattr(os, name)
        return lambda path, *args, **options: function(self.inside(path), *args, **options)


class Op(NamedTuple):
    """One change: what it is called here, and its arguments; the first is a path in the tree."""

    name: str
    args: tuple[Any, ...]


def op(name: str, *args: Any) -> Op:
    return Op(name, args)


def perform(fs: Any, operations: Sequence[Op]) -> None:
    """Make the changes through `fs`: an Overlay or a Plain."""
    for name, args in operations:
        path = args[0]
        match name:
            case "write" | "append":
                with fs.open(path, "wb" if name == "write" else "ab") as file:
                    file.write(args[1].encode())
            case "overwrite":
                with fs.open(path, "r+b") as file:
                    file.write(args[1].encode())
            case "rm":
                remove_tree(fs, path)
            case "touch":
                fs.utime(path, None)
            case "chown":
                fs.lchown(path, *args[1:])
            case "symlink":
                fs.symlink(args[1], path)
            case "mknod":
                fs.mknod(path, args[1], os.makedev(*args[2:]))
            case "mkdir" | "makedirs":
                getattr(fs, name)(path, 0o755)
            case _:
                getattr(fs, name)(*args)


def remove_tree(fs: Any, path: str) -> None:
    if fs.lstat(path).st_mode & 0o170000 == 0o040000:
        for name in fs.listdir(path):
            remove_tree(fs, f"{path}/{name}")
        fs.rmdir(path)
    else:
        fs.unlink(path)


def shell(operations: Sequence[Op]) -> str:
    """The same changes as a shell script for the container's busybox."""
    lines = ["set -e", "umask 022"]
    for name, args in operations:
        words = [shlex.quote(str(arg)) for arg in args]
        path = words[0]
        match name:
            case "write":
                lines.append(f"printf %s {words[1]} > {path}")
            case "append":
                lines.append(f"printf %s {words[1]} >> {path}")
            case "overwrite":
                lines.append(f"printf %s {words[1]} 1<> {path}")
            case "unlink":
                lines.append(f"rm {path}")
            case "rm":
                lines.append(f"rm -r {path}")
            case "makedirs":
                lines.append(f"mkdir -p {path}")
            case "chmod":
                lines.append(f"chmod {args[1]:o} {path}")
            case "chown":
                lines.append(f"chown -h {args[1]}:{args[2]} {path}")
            case "symlink":
                lines.append(f"ln -s {words[1]} {path}")
            case "link":
                lines.append(f"ln {path} {words[1]}")
            case "rename":
                lines.append(f"mv {path} {words[1]}")
            case "truncate":
                lines.append(f"truncate -s {args[1]} {path}")
            case "mkfifo" | "mkdir" | "rmdir" | "touch":
                lines.append(f"{name} {path}")
            case _:
                raise ValueError(f"{name} has no shell form")
    return "\n".join(lines)
