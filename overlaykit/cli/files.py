"""Commands about a container's files: ls, cat, put, write."""

from __future__ import annotations

import os
import posixpath
import shutil
import stat
import sys
import time
from typing import Any, BinaryIO

import click

from overlaykit.cli import completion
from overlaykit.cli.output import json_option, print_json, shown, with_store
from overlaykit.overlay import Overlay, View
from overlaykit.overlay.mounted import Mounted
from overlaykit.store import Store


@click.command("ls")
@click.argument("container", shell_complete=completion.containers)
@click.argument("path", default="/")
@click.option("-l", "--long", "is_long", is_flag=True, help="Mode, owner, size and time too.")
@json_option
@with_store
def ls_command(store: Store, container: str, path: str, is_long: bool, as_json: bool) -> None:
    """List a directory of a container.

    \b
    overlaykit ls box /etc
    """
    with store.container(container).view() as view:
        path, names = (path, sorted(view.listdir(path))) if view.isdir(path) else ("", [path])
        if not path:
            view.lstat(names[0])  # or it is not there at all
        if as_json:
            print_json([_facts(view, path, name) for name in names])
            return
        for name in names:
            click.echo(_long(view, posixpath.join(path, name)) + shown(name) if is_long else shown(name))


def _facts(view: View | Mounted, path: str, name: str) -> dict[str, Any]:
    st = view.lstat(posixpath.join(path, name))
    return {
        "name": name,
        "mode": stat.filemode(st.st_mode),
        "uid": st.st_uid,
        "gid": st.st_gid,
        "size": st.st_size,
        "mtime_ns": st.st_mtime_ns,
    }


def _long(view: View | Mounted, path: str) -> str:
    st = view.lstat(path)
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(st.st_mtime))
    return f"{stat.filemode(st.st_mode)} {st.st_uid:>5} {st.st_gid:>5} {st.st_size:>10} {when} "


@click.command("cat")
@click.argument("container", shell_complete=completion.containers)
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
@with_store
def cat_command(store: Store, container: str, paths: tuple[str, ...]) -> None:
    """Print files of a container.

    \b
    overlaykit cat box /etc/os-release
    """
    with store.container(container).view() as view:
        for path in paths:
            with view.open(path, "rb") as file:
                shutil.copyfileobj(file, sys.stdout.buffer, 1 << 20)
    sys.stdout.buffer.flush()


@click.command("put")
@click.argument("container", shell_complete=completion.containers)
@click.argument("file", type=click.Path(exists=True, dir_okay=False))
@click.argument("path")
@with_store
def put_command(store: Store, container: str, file: str, path: str) -> None:
    """Copy a file of the host into a container, with its permissions; into PATH if that is a directory.

    \b
    overlaykit put box app.py /srv/
    """
    with store.container(container).fs as fs, open(file, "rb") as source:
        target = posixpath.join(path, os.path.basename(file)) if path.endswith("/") or fs.isdir(path) else path
        _write(fs, target, source)
        fs.chmod(target, stat.S_IMODE(os.fstat(source.fileno()).st_mode))


@click.command("write")
@click.argument("container", shell_complete=completion.containers)
@click.argument("path")
@click.option("-a", "--append", is_flag=True, help="Add to what the file has.")
@with_store
def write_command(store: Store, container: str, path: str, append: bool) -> None:
    """Write standard input to a file of a container.

    \b
    echo hello | overlaykit write box /etc/motd
    """
    with store.container(container).fs as fs:
        _write(fs, path, sys.stdin.buffer, "ab" if append else "wb")


def _write(fs: Overlay | Mounted, path: str, source: BinaryIO, mode: str = "wb") -> None:
    try:
        with fs.open(path, mode) as out:
            shutil.copyfileobj(source, out, 1 << 20)
    except OSError as e:
        e.filename = e.filename or path  # a write that fails does not say of what
        raise
