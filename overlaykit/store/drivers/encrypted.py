"""The driver encrypted: the store keeps what gocryptfs encrypts, names and contents, and shows it while it is used.

    passfile=FILE          the passphrase is the first line of FILE
    passcommand=COMMAND    or of what COMMAND prints, which a shell runs
    passfd=N               or of what can be read from descriptor N of whoever first uses the volume

The store has these options, and never the passphrase; it goes to gocryptfs through a pipe. VOLUME/cipher is what may be
copied to places that are not trusted.
"""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path

from overlaykit.errors import InvalidReference
from overlaykit.store.drivers import DATA, Mounting, Options, need_fuse, program, run

WAYS = ("passfile", "passcommand", "passfd")
CIPHER = "cipher"
LONGEST = 2000  # bytes of a passphrase; gocryptfs takes 2048
WRONG = 12  # gocryptfs's exit code for a passphrase that is not the one


class Encrypted(Mounting):
    """Files that are encrypted at rest."""

    def create(self, directory: Path, options: Options) -> None:
        _check(options)
        tool = program("gocryptfs")
        (directory / CIPHER).mkdir(mode=0o700)
        code, said = run([tool, "-init", "-q", "--", directory / CIPHER], input=passphrase(options))
        if code:
            raise OSError(errno.EIO, f"gocryptfs -init: {said or code}", str(directory / CIPHER))

    def stored(self, options: Options) -> str | None:
        return CIPHER

    def mount(self, directory: Path, options: Options) -> None:
        need_fuse()
        # As root all users of a container are to reach their files, and setuid and devices work as in a plain directory.
        root = ["-allow_other", "-suid", "-dev"] if os.geteuid() == 0 else []
        argv: list[str | Path] = [program("gocryptfs"), "-q", *root, "--", directory / CIPHER, directory / DATA]
        code, said = run(argv, input=passphrase(options))
        if code == WRONG:
            raise OSError(errno.EKEYREJECTED, "the passphrase is not the one that it was created with", str(directory))
        if code:
            raise OSError(errno.EIO, f"gocryptfs: {said or code}", str(directory / DATA))


def _check(options: Options) -> None:
    given = [name for name in options if name in WAYS]
    if len(options) != 1 or len(given) != 1:
        raise InvalidReference(
            f"driver encrypted wants one option that says where its passphrase is, not {', '.join(options) or 'none'}",
            hint="passfile=FILE, passcommand=COMMAND or passfd=N",
        )
    (name, value) = next(iter(options.items()))
    if name == "passfd" and not value.isdecimal():
        raise InvalidReference(f"passfd={value}: a descriptor is a number")
    if name == "passfile" and not os.path.isabs(value):
        raise InvalidReference(f"passfile={value}: not an absolute path")


def passphrase(options: Options) -> bytes:
    """The passphrase and a newline, from where the options say. OSError; InvalidReference for an empty or too long one."""
    _check(options)
    ((name, value),) = options.items()
    if name == "passcommand":
        done = subprocess.run(["/bin/sh", "-c", value], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=False)
        if done.returncode:
            raise OSError(errno.EACCES, f"it exited with {done.returncode}", f"passcommand {value.split()[0]}")
        text = done.stdout
    elif name == "passfd":
        try:
            text = os.read(int(value), LONGEST + 2)
        except OSError as e:
            e.filename = f"passfd {value}"
            raise
    else:
        with open(value, "rb") as file:
            text = file.read(LONGEST + 2)
    line = text.split(b"\n", 1)[0]
    if not line or len(line) > LONGEST:
        raise InvalidReference(f"{name}={value}: no passphrase of 1 to {LONGEST} bytes in its first line")
    return line + b"\n"
