"""What is to be mounted where in a container, and the ways in which that is written down:

-v [SOURCE:]TARGET[:OPTIONS]          an absolute SOURCE is bound, and made if it is missing; another names a volume
--mount type=volume,src=S,dst=T,...   says what it means: a missing source of a bind is an error
--tmpfs TARGET[:OPTIONS]              an empty directory in memory, for as long as the container is open, mounted or runs
"""

from __future__ import annotations

import csv
import posixpath
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from overlaykit.errors import InvalidReference, Unsupported
from overlaykit.overlay.mount import PROPAGATION

VOLUME, BIND, TMPFS = "volume", "bind", "tmpfs"
VOLUME_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]{1,254}\Z")

# The options of -v in groups, of each of which one may be given. moby's volume/mounts/linux_parser.go
MODES = ({"ro", "rw"}, {"z", "Z"}, set(PROPAGATION), {"nocopy"}, {"consistent", "cached", "delegated"})
TMPFS_FLAGS = {"rw", "ro", "suid", "nosuid", "dev", "nodev", "exec", "noexec"}
TMPFS_SIZE = re.compile(r"[0-9]+([kmgtKMGT]i?)?[bB]?\Z")
TMPFS_VALUES = {"size": TMPFS_SIZE, "nr_inodes": TMPFS_SIZE, "mode": re.compile("[0-7]{1,4}\\Z")}
TMPFS_VALUES |= dict.fromkeys(("uid", "gid"), re.compile(r"[0-9]{1,9}\Z"))


@dataclass(frozen=True, slots=True, kw_only=True)
class MountSpec:
    """One mount as it was asked for. source: a volume's name, "" for an anonymous one, or a path of the host.

    copy     fill it with the image's files if it is empty; None: a volume, but no bind
    subpath  the directory or file in the volume to show
    create   make a bind's source if it is missing
    driver   of a volume that is made; "": local, or whatever one that is there has
    options  of the volume's driver; of a tmpfs: size, mode, uid, gid, nr_inodes, and flags such as noexec
    mode     as Docker shows it
    text     as -v or --tmpfs had it, "" if it was neither
    listed   it was spelled out, as --mount has it: `inspect` lists it under HostConfig.Mounts
    """

    type: str = VOLUME
    source: str = ""
    target: str
    read_only: bool = False
    copy: bool | None = None
    subpath: str = ""
    propagation: str = ""
    create: bool = False
    driver: str = ""
    labels: dict[str, str] = field(default_factory=dict)
    options: dict[str, str] = field(default_factory=dict)
    mode: str = ""
    text: str = ""
    listed: bool = False

    @property
    def fills(self) -> bool:
        """Whether it is filled with the image's files if it is empty."""
        return self.type == VOLUME if self.copy is None else self.copy

    def checked(self, given: str) -> MountSpec:
        """The spec, if it makes sense; `given` is what it was read from. InvalidReference."""
        if not self.target:
            raise InvalidReference(f"{given}: no target", hint="a mount needs an absolute path in the container")
        if not posixpath.isabs(self.target):
            raise InvalidReference(f"{given}: {self.target} is not absolute", hint="the path in the container begins with /")
        target = posixpath.normpath("/" + self.target.lstrip("/"))
        if target == "/":
            raise InvalidReference(f"{given}: nothing can be mounted over the container's /")
        if "\0" in self.source + self.target + self.subpath:
            raise InvalidReference(f"{given!r}: a NUL in a path")
        if self.type == VOLUME and self.source:
            check_volume_name(self.source)
        if self.type == BIND and not posixpath.isabs(self.source):
            raise InvalidReference(f"{given}: the source of a bind is an absolute path, not {self.source!r}")
        if self.type == TMPFS:
            self._check_tmpfs(given)
        if posixpath.isabs(self.subpath) or ".." in self.subpath.split("/"):
            raise InvalidReference(f"{given}: the subpath leaves the volume: {self.subpath}")
        return replace(self, target=target)

    def _check_tmpfs(self, given: str) -> None:
        if self.source or self.subpath or self.copy:
            raise InvalidReference(f"{given}: a tmpfs has no source, and begins empty")
        for key, value in self.options.items():
            known = TMPFS_VALUES.get(key)
            if not (known.match(value) if known else key in TMPFS_FLAGS and not value):
                hint = f"there are {', '.join(sorted(TMPFS_VALUES))} with a value, and {', '.join(sorted(TMPFS_FLAGS))}"
                raise InvalidReference(f"{given}: no option of a tmpfs: {f'{key}={value}'.rstrip('=')!r}", hint=hint)


def check_volume_name(name: str) -> str:
    """`name`, if a volume may be called so. InvalidReference."""
    if not VOLUME_NAME.match(name):
        hint = (
            "2 to 255 letters, digits, '_', '.' and '-', the first a letter or digit; a host directory is an absolute path"
        )
        raise InvalidReference(f"{name!r} cannot name a volume", hint=hint)
    return name


def parse_volume(text: str) -> MountSpec:
    """The spec that `-v TEXT` means. InvalidReference."""
    parts = text.split(":")
    mode = parts[2] if len(parts) == 3 else ""
    if not all(parts[:2]) or len(parts) > 3 or (len(parts) == 2 and _is_mode(parts[1])):
        raise InvalidReference(f"-v {text}: not understood", hint="write [SOURCE:]TARGET[:OPTIONS], as in data:/srv:ro")
    if len(parts) == 3 and not _is_mode(mode):
        raise InvalidReference(f"-v {text}: invalid mode {mode!r}", hint="such as ro, nocopy or rslave, joined by commas")
    options = set(mode.split(","))
    source, target = ("", parts[0]) if len(parts) == 1 else (parts[0], parts[1])
    bind = posixpath.isabs(source)
    propagation = next(iter(options & set(PROPAGATION)), "")
    if propagation and not bind:
        raise InvalidReference(f"-v {text}: invalid mode {mode!r}", hint="a volume has no propagation")
    if bind and options & MODES[3]:
        raise InvalidReference(f"-v {text}: invalid mode {mode!r}", hint="nocopy is for volumes")
    return MountSpec(
        type=BIND if bind else VOLUME,
        source=source,
        target=target,
        read_only="ro" in options,
        copy=False if "nocopy" in options else None,
        propagation=propagation,
        create=bind,
        mode=mode or ("z" if source and not bind else ""),  # Docker's, with SELinux or without
        text=text if source else "",
    ).checked(f"-v {text}")


def parse_tmpfs(text: str) -> MountSpec:
    """The spec that `--tmpfs TEXT` means. InvalidReference."""
    target, _, words = text.partition(":")
    pairs = [word.partition("=") for word in words.split(",") if word]
    options = {key: value for key, _, value in pairs}
    return MountSpec(type=TMPFS, target=target, options=options, read_only="ro" in options, text=text).checked(
        f"--tmpfs {text}"
    )


def _is_mode(mode: str) -> bool:
    options = mode.split(",")
    known = all(any(option in group for group in MODES) for option in options)
    return known and all(sum(option in group for option in options) <= 1 for group in MODES)


def _flag(value: str) -> bool:
    if value.lower() not in ("", "1", "t", "true", "0", "f", "false"):
        raise ValueError(value)
    return value.lower() in ("", "1", "t", "true")


def _text(value: str) -> str:
    return value


KEYS: dict[str, tuple[str, Callable[[str], object]]] = {
    "type": ("type", _text),
    "source": ("source", _text),
    "src": ("source", _text),
    "target": ("target", _text),
    "dst": ("target", _text),
    "destination": ("target", _text),
    "readonly": ("read_only", _flag),
    "ro": ("read_only", _flag),
    "consistency": ("", _text),
    "bind-propagation": ("propagation", _text),
    "bind-copy": ("copy", _flag),
    "volume-nocopy": ("copy", lambda value: not _flag(value)),
    "volume-subpath": ("subpath", _text),
    "volume-driver": ("driver", _text),
    "volume-label": ("labels", _text),
    "volume-opt": ("options", _text),
    "tmpfs-size": ("options", _text),
    "tmpfs-mode": ("options", _text),
}
BARE = {"readonly", "ro", "volume-nocopy", "bind-copy"}  # which need no value


def parse_mount(text: str) -> MountSpec:
    """The spec that `--mount TEXT` means. InvalidReference; Unsupported for a type that there is not."""
    rows = list(csv.reader([text]))
    values: dict[str, object] = {}
    labels: dict[str, str] = {}
    options: dict[str, str] = {}
    keys = set()
    for part in rows[0] if rows else []:
        key, equals, value = part.partition("=")
        key = key.lower()
        if key not in KEYS and equals:
            raise InvalidReference(f"--mount {text}: no key {key!r}", hint=f"there are {', '.join(sorted(KEYS))}")
        if key not in KEYS or (not equals and key not in BARE):
            raise InvalidReference(f"--mount {text}: {part!r} is no key=value")
        keys.add(key)
        name, read = KEYS[key]
        if name in ("labels", "options"):
            pair = f"{key.removeprefix('tmpfs-')}={value}" if key.startswith("tmpfs-") else value
            inner, _, content = pair.partition("=")
            (labels if name == "labels" else options)[inner] = content
            continue
        try:
            values[name] = read(value)
        except ValueError:
            raise InvalidReference(f"--mount {text}: {key} is true or false, not {value!r}") from None
    values.pop("", None)
    kind = str(values.get("type", VOLUME)).lower()
    if kind not in (VOLUME, BIND, TMPFS):
        raise Unsupported(f"--mount {text}: type {kind!r}", hint="overlaykit knows volume, bind and tmpfs")
    for other in (VOLUME, BIND, TMPFS):
        if other != kind and any(key.startswith(f"{other}-") for key in keys):
            raise InvalidReference(f"--mount {text}: {other}-* options do not go with type {kind}")
    if (propagation := values.get("propagation", "")) and propagation not in PROPAGATION:
        raise InvalidReference(f"--mount {text}: no propagation {propagation!r}", hint=", ".join(PROPAGATION))
    if kind == VOLUME and values.get("read_only") and not values.get("source"):
        raise InvalidReference(f"--mount {text}: an anonymous volume is not read-only", hint="nobody could write to it ever")
    values |= {"listed": True, "type": kind, "labels": labels, "options": options, "mode": "z" if kind == VOLUME else ""}
    spec = {"target": ""} | values
    return MountSpec(**spec).checked(f"--mount {text}")  # type: ignore[arg-type]
