"""Mounts as values, and the system calls that make them. The only place where the order of layers is turned round: the
kernel's lowerdir= has the highest first.

An overlay is mounted through fsopen and fsconfig (Linux 6.5 on takes a layer a call, lowerdir+, so that nothing has to fit
one page), else through mount(2). Where the kernel refuses, an installed fuse-overlayfs may do it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import stat
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

from overlaykit.errors import Unsupported
from overlaykit.overlay.workdir import check_apart, check_together
from overlaykit.tree.table import StrPath

# mount(2) and umount2(2); linux/mount.h
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE, MS_SLAVE, MS_SHARED = 32, 4096, 16384, 1 << 18, 1 << 19, 1 << 20
MNT_DETACH = 2
FLAGS = {
    "ro": MS_RDONLY, "nosuid": MS_NOSUID, "nodev": MS_NODEV, "noexec": MS_NOEXEC, "bind": MS_BIND,
    "rbind": MS_BIND | MS_REC, "remount": MS_REMOUNT,
}  # fmt: skip
PROPAGATION = {
    "private": MS_PRIVATE, "rprivate": MS_PRIVATE | MS_REC, "slave": MS_SLAVE, "rslave": MS_SLAVE | MS_REC,
    "shared": MS_SHARED, "rshared": MS_SHARED | MS_REC,
}  # fmt: skip
SYS_MOVE_MOUNT, SYS_FSOPEN, SYS_FSCONFIG, SYS_FSMOUNT = 429, 430, 431, 432  # the same on every architecture
FSOPEN_CLOEXEC, FSMOUNT_CLOEXEC, MOVE_MOUNT_F_EMPTY_PATH = 1, 1, 4
FSCONFIG_SET_FLAG, FSCONFIG_SET_STRING, FSCONFIG_CMD_CREATE = 0, 1, 6
MOUNT_ATTRS = {"ro": 1, "nosuid": 2, "nodev": 4, "noexec": 8}
AT_FDCWD = -100
MAX_LOWERS = 500  # fs/overlayfs/params.h, OVL_MAX_STACK
PAGE = 4096  # bytes that mount(2) takes of options, the terminating NUL included


@dataclass(frozen=True, slots=True)
class Mount:
    """One mount: what `mount -t type -o options source target` takes. Commas, colons and backslashes in the paths of
    `options` are escaped as that command wants them."""

    type: str
    source: str
    target: str
    options: tuple[str, ...] = ()

    def at(self, target: StrPath) -> Mount:
        return replace(self, target=os.fspath(target))

    def command(self) -> list[str]:
        """The words of the mount(8) command."""
        kind = [] if self.type == "bind" else ["-t", self.type]
        options = ["-o", ",".join(self.options)] if self.options else []
        return ["mount", *kind, self.source, *options, self.target]


def escape(path: str, special: str = "\\:,") -> str:
    return "".join("\\" + c if c in special else c for c in path)


def unescape(value: str) -> list[str]:
    """The paths in a lowerdir= value. Two colons, which set data-only layers apart, leave an empty one between."""
    out, current, chars = [], "", iter(value)
    for c in chars:
        if c == "\\":
            current += next(chars, "")
        elif c == ":":
            out.append(current)
            current = ""
        else:
            current += c
    return [*out, current]


def overlay_mount(
    lowers: Sequence[StrPath],
    upper: StrPath | None,
    work: StrPath | None,
    target: StrPath = "",
    *,
    data: Sequence[StrPath] = (),
    label: str = "overlay",
    userxattr: bool = False,
    redirect_dir: bool = False,
    metacopy: bool = False,
    index: bool = False,
    volatile: bool = False,
) -> Mount:
    """The overlay of `lowers` (bottom first) and `upper`; without upper it is read-only. `label` is the source column."""
    if upper is None and len(lowers) < 2:
        raise ValueError("a read-only overlay needs two lowers; mount one as a bind mount")
    stack = ":".join(escape(os.fspath(lower)) for lower in reversed(lowers))
    stack += "".join("::" + escape(os.fspath(layer)) for layer in reversed(data))
    options = [f"lowerdir={stack}"]
    if upper is not None:
        if work is None:
            raise ValueError("an upper needs a work directory")
        # In upperdir and workdir a colon stands for itself.
        options += [
            f"upperdir={escape(os.fspath(upper), chr(92) + ',')}",
            f"workdir={escape(os.fspath(work), chr(92) + ',')}",
        ]
    wanted = {
        "userxattr": userxattr, "redirect_dir=on": redirect_dir, "metacopy=on": metacopy, "index=on": index,
        "volatile": volatile,
    }  # fmt: skip
    options += [option for option, on in wanted.items() if on]
    return Mount("overlay", label, os.fspath(target), tuple(options))


def bind_mount(source: StrPath, target: StrPath, *, read_only: bool = False, recursive: bool = True) -> Mount:
    """Directory or file `source` of the host at `target`."""
    options = ("rbind" if recursive else "bind", *(("ro",) if read_only else ()))
    return Mount("bind", os.fspath(source), os.fspath(target), options)


# --- system calls -----------------------------------------------------------------------------------------------------


@cache
def libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def call(number: int, *args: object) -> int:
    """syscall(2). OSError."""
    values = [ctypes.c_long(a) if isinstance(a, int) else a for a in args]
    result = int(libc().syscall(ctypes.c_long(number), *values))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def mount_old(source: str, target: str, kind: str | None, flags: int, data: str) -> None:
    """mount(2). OSError with the target."""
    encoded = [None if s is None else os.fsencode(s) for s in (source, target, kind, data)]
    if libc().mount(encoded[0], encoded[1], encoded[2], ctypes.c_ulong(flags), encoded[3]) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), target)


def mount_new(mount: Mount) -> None:
    """fsopen, fsconfig, fsmount, move_mount. OSError; ENOSYS on a kernel or in a sandbox without them."""
    try:
        fd = mount_detached(mount)
        try:
            call(SYS_MOVE_MOUNT, fd, b"", AT_FDCWD, os.fsencode(mount.target), MOVE_MOUNT_F_EMPTY_PATH)
        finally:
            os.close(fd)
    except OSError as e:
        e.filename = mount.target
        raise


def mount_detached(mount: Mount) -> int:
    """A descriptor of the root of a new file system that is mounted nowhere: it goes when nobody has it open. OSError."""
    fs = call(SYS_FSOPEN, os.fsencode(mount.type), FSOPEN_CLOEXEC)
    try:
        attributes = 0
        call(SYS_FSCONFIG, fs, FSCONFIG_SET_STRING, b"source", os.fsencode(mount.source), 0)
        for option in mount.options:
            key, equals, value = option.partition("=")
            if key in MOUNT_ATTRS:
                attributes |= MOUNT_ATTRS[key]
            elif key == "lowerdir":
                kind, paths = "lowerdir+", unescape(value)
                for path in paths:
                    if not path:
                        kind = "datadir+"
                        continue
                    call(SYS_FSCONFIG, fs, FSCONFIG_SET_STRING, kind.encode(), os.fsencode(path), 0)
            elif equals:
                # The kernel takes the escapes out of upperdir and workdir itself, and of lowerdir+ it does not.
                call(SYS_FSCONFIG, fs, FSCONFIG_SET_STRING, key.encode(), os.fsencode(value), 0)
            else:
                call(SYS_FSCONFIG, fs, FSCONFIG_SET_FLAG, key.encode(), None, 0)
        call(SYS_FSCONFIG, fs, FSCONFIG_CMD_CREATE, None, None, 0)
        return call(SYS_FSMOUNT, fs, FSMOUNT_CLOEXEC, attributes)
    except OSError as e:
        note = kernel_messages(fs)
        if note:
            e.add_note(note)
        raise
    finally:
        os.close(fs)


def kernel_messages(fs: int) -> str:
    """What the kernel has to say about a mount that it refused."""
    out = []
    try:
        while message := os.read(fs, 4096):
            out.append(os.fsdecode(message).strip())
    except OSError:  # ENODATA: no more
        pass
    return "\n".join(out)


# --- mounting ---------------------------------------------------------------------------------------------------------


def mount(what: Mount, target: StrPath | None = None) -> Mount:
    """Mount `what` (at `target`, if given) and give it as it was mounted. OSError as the kernel's."""
    if target is not None:
        what = what.at(target)
    if not what.target:
        raise ValueError("a mount needs a target")
    if what.type == "overlay":
        mount_overlay(what)
        return what
    flags, extra, propagation = 0, [], 0
    for option in what.options:
        if option in PROPAGATION:
            propagation |= PROPAGATION[option]
        elif option in FLAGS:
            flags |= FLAGS[option]
        else:
            extra.append(option)
    kind = None if flags & MS_BIND else what.type
    mount_old(what.source, what.target, kind, flags & ~MS_RDONLY if flags & MS_BIND else flags, ",".join(extra))
    try:
        if flags & MS_BIND and flags & ~(MS_BIND | MS_REC):  # a bind mount takes its flags only afterwards
            mount_old("none", what.target, None, flags & ~MS_REC | MS_REMOUNT, "")
        if propagation:
            mount_old("none", what.target, None, propagation, "")
    except OSError:
        unmount(what.target)
        raise
    return what


def mount_overlay(what: Mount) -> None:
    try:
        _mount_overlay(what)
    except (OSError, Unsupported) as e:
        reason = trouble(what)
        if reason is None or isinstance(e, PermissionError):
            raise
        raise reason from e


def trouble(what: Mount) -> Exception | None:
    """What is wrong with the directories of an overlay, of which the kernel says no more than a number; None: nothing."""
    options = dict(option.partition("=")[::2] for option in what.options)
    lowers = [path for path in unescape(options.get("lowerdir", "")) if path]
    upper, work = (re.sub(r"\\(.)", r"\1", options.get(key, "")) for key in ("upperdir", "workdir"))
    for path in filter(None, (*lowers, upper, work, what.target)):
        try:
            if not stat.S_ISDIR(os.stat(path).st_mode):
                return NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
        except OSError as e:
            return e
    try:
        if upper and work:
            check_apart(lowers, upper, work)
            check_together(upper, work)
    except Unsupported as e:
        return e
    if len(lowers) > MAX_LOWERS:
        return Unsupported(f"{len(lowers)} lower layers, and the kernel takes {MAX_LOWERS}", hint="squash layers")
    return None


def _mount_overlay(what: Mount) -> None:
    try:
        mount_new(what)
        return
    except OSError as e:
        # No such calls, or a kernel before 6.5, which does not know lowerdir+
        if e.errno not in (errno.ENOSYS, errno.EINVAL, errno.EPERM):
            raise
        first = e
    options = [o for o in what.options if o not in FLAGS]
    flags = 0
    for option in what.options:
        flags |= FLAGS.get(option, 0)
    data = ",".join(options)
    if len(os.fsencode(data)) >= PAGE:
        raise Unsupported(
            f"{what.target}: {len(data)} bytes of mount options, and this kernel takes {PAGE - 1}",
            hint="use shorter paths, squash layers, or a kernel from 6.5 on",
        ) from first
    try:
        mount_old(what.source, what.target, "overlay", flags, data)
    except OSError as e:
        for note in getattr(first, "__notes__", ()):
            e.add_note(note)
        raise


def mount_fuse(what: Mount, target: StrPath | None = None) -> Mount:
    """Mount an overlay through the installed fuse-overlayfs. Unsupported without it, or if it fails."""
    program = shutil.which("fuse-overlayfs")
    if program is None:
        raise Unsupported("fuse-overlayfs is not installed", hint="apt install fuse-overlayfs")
    if target is not None:
        what = what.at(target)
    known = ("lowerdir=", "upperdir=", "workdir=")
    options = ",".join(o for o in what.options if o.startswith(known))
    done = subprocess.run([program, "-o", options, what.target], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise Unsupported(f"fuse-overlayfs cannot mount {what.target}: {done.stderr.strip() or done.returncode}")
    return replace(what, type="fuse.fuse-overlayfs")


def set_read_only(target: StrPath) -> None:
    """Let nobody change anything through the mount at `target` from now on; what is mounted in it stays as it is."""
    mount_old("none", os.fspath(target), None, MS_BIND | MS_REMOUNT | MS_RDONLY, "")


def unmount(target: StrPath, *, lazy: bool = False) -> None:
    """umount2(2). lazy: out of sight now, gone when the last user is."""
    if libc().umount2(os.fsencode(target), MNT_DETACH if lazy else 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), os.fspath(target))
