"""The driver local: a directory in the store, or what mount(8) mounts when it is told Docker's options.

    type, device, o     as in `mount -t TYPE -o O DEVICE`: tmpfs, a bind (type none, o bind), nfs, cifs, any file system

As with Docker the kernel is asked without a helper, so an address in addr=NAME is looked up here.
"""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path

from overlaykit.errors import InvalidReference, Unsupported
from overlaykit.store.drivers import DATA, Mounting, Options, program, run

KNOWN = ("type", "o", "device", "size")
ASKING = {"type": ("device",), "device": ("type",), "o": ("device", "type")}  # moby's volume/local/local_unix.go
NETWORK = ("nfs", "nfs4", "cifs", "smb3")


class Local(Mounting):
    """Files of the store's own file system, without options; mounted with them."""

    def create(self, directory: Path, options: Options) -> None:
        for name in options:
            if name not in KNOWN:
                raise InvalidReference(f"driver local has no option {name!r}", hint=f"there are {', '.join(KNOWN)}")
        if "size" in options:
            hint = "for a tmpfs: type=tmpfs, device=tmpfs, o=size=64m"
            raise Unsupported("driver local limits no volume's size: there is no quota for a directory", hint=hint)
        for name, others in ASKING.items():
            for other in others:
                if name in options and other not in options:
                    raise InvalidReference(f"driver local: option {name} goes with {other}")

    def stored(self, options: Options) -> str | None:
        return None if options else DATA

    def mounts(self, options: Options) -> bool:
        return bool(options)

    def mount(self, directory: Path, options: Options) -> None:
        kind, device, words = options["type"], options["device"], options.get("o", "")
        if os.geteuid() != 0:
            raise Unsupported(f"only root can mount {device}", hint="volumes without options need no root")
        if "bind" in words.split(",") and not os.path.exists(device):
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), device)
        if kind in NETWORK:
            words = ",".join(_looked_up(word) for word in words.split(","))
        flags = ["-o", words] if words else []
        code, said = run([program("mount"), "-i", "-n", "-t", kind, *flags, "--", device, directory / DATA])
        if code and f" {kind}\n" not in f" {Path('/proc/filesystems').read_text()}".replace("\t", " ") and kind != "none":
            raise Unsupported(f"{device} cannot be mounted: this kernel has no file system {kind}", hint=f"modprobe {kind}")
        if code:
            raise OSError(errno.EIO, said.removeprefix(f"mount: {directory / DATA}: "), device)


def _looked_up(word: str) -> str:
    key, equals, host = word.partition("=")
    if key != "addr" or not equals:
        return word
    try:
        return f"addr={socket.gethostbyname(host)}"
    except OSError as e:
        raise OSError(errno.EHOSTUNREACH, f"{e.strerror or e}", host) from None
