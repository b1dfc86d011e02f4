"""A mount of other namespaces, seen in ours: a child process goes there, and hands it over as a descriptor."""

from __future__ import annotations

import ctypes
import os
import pickle
import socket
from collections.abc import Callable
from pathlib import Path

from overlaykit.bench.isolate import map_ids, unshare
from overlaykit.overlay import Mount, mount
from overlaykit.overlay.mount import AT_FDCWD, MOVE_MOUNT_F_EMPTY_PATH, SYS_MOVE_MOUNT, call, libc
from overlaykit.overlay.probe import CLONE_NEWNS, CLONE_NEWUSER

SYS_OPEN_TREE = 428  # the same on every architecture
OPEN_TREE_CLONE, OPEN_TREE_CLOEXEC = 1, os.O_CLOEXEC


def attach(make: Callable[[], int], target: Path) -> None:
    """Mount on `target` what `make()`, run in a child process, gives a descriptor of. Its OSError is raised here."""
    ours, theirs = socket.socketpair()
    with ours:
        child = os.fork()
        if child == 0:
            try:
                socket.send_fds(theirs, [b"-"], [make()])
            except OSError as e:
                theirs.send(pickle.dumps(e))
            finally:
                os._exit(0)
        theirs.close()
        message, fds, _, _ = socket.recv_fds(ours, 4096, 1)
        os.waitpid(child, 0)
    if not fds:
        raise pickle.loads(message) if message else RuntimeError("the process that was to mount ended before it did")
    try:
        call(SYS_MOVE_MOUNT, fds[0], b"", AT_FDCWD, os.fsencode(target), MOVE_MOUNT_F_EMPTY_PATH)
    finally:
        os.close(fds[0])


def root_of(pid: int) -> int:
    """The root directory of process `pid` as a mount of its own. For a child of ours: it stays in that namespace."""
    namespace = os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY)
    if libc().setns(namespace, CLONE_NEWNS) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return tree(Path("/"))


def as_user(what: Mount) -> int:
    """`what`, mounted in a user namespace of its own, where root is nobody to the rest. For a child of ours."""
    ids = os.geteuid(), os.getegid()
    unshare(CLONE_NEWUSER | CLONE_NEWNS)
    map_ids(*ids)
    mount(what)
    return tree(Path(what.target))


def tree(place: Path) -> int:
    """A descriptor of the mount at `place`, copied."""
    return call(SYS_OPEN_TREE, AT_FDCWD, os.fsencode(place), OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC)
