"""Changes of a config in the words of a Dockerfile, as `docker commit --change` and `docker import --change` take them:
CMD ENTRYPOINT ENV EXPOSE LABEL ONBUILD STOPSIGNAL USER VOLUME WORKDIR."""

from __future__ import annotations

import json
import posixpath
import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from msgspec import ValidationError, convert, to_builtins
from msgspec.structs import replace

from overlaykit.errors import InvalidImage, InvalidReference
from overlaykit.oci import RuntimeConfig
from overlaykit.store.labels import check_labels

SHELL = ("/bin/sh", "-c")
# A quoted or escaped part stays as it is; $NAME and ${NAME} are the environment's.
VARIABLE = re.compile(r"'[^']*'|\\.|\$(?:(\w+)|\{(\w+)\})")
PORT = re.compile(r"\d{1,5}(?:-\d{1,5})?(?:/(?:tcp|udp|sctp))?\Z")


def apply_changes(config: RuntimeConfig, lines: Iterable[str]) -> RuntimeConfig:
    """`config` after the instructions in `lines`, in their order. InvalidImage names the line that is none."""
    for line in lines:
        word, _, rest = line.strip().partition(" ")
        change = CHANGES.get(word.upper())
        if change is None:
            raise InvalidImage(f"{line!r}: not a change of a config", hint=f"one of {', '.join(CHANGES)}")
        if not rest.strip():
            raise InvalidImage(f"{line!r}: {word.upper()} of what?")
        try:
            config = replace(config, **change(config, rest.strip()))
        except ValueError as e:  # shlex: a quotation without an end
            raise InvalidImage(f"{line!r}: {e}") from None
    return config


def overridden(
    config: RuntimeConfig,
    labels: Mapping[str, str] | None = None,
    env: Mapping[str, str | None] | None = None,
    command: Sequence[str] = (),
    entrypoint: Sequence[str] | None = None,
    workdir: str | None = None,
    user: str | None = None,
) -> RuntimeConfig:
    """`config` as a container has it: labels and environment by key, and with an entrypoint of its own none of its CMD.

    InvalidReference for a label or a variable without a key, and for a workdir that is not absolute. TypeError for what
    could not be read again once it is written down.
    """
    values: dict[str, Any] = {}
    for words in (command, entrypoint):
        if isinstance(words, str):
            raise TypeError(f"a list of words is wanted, not {words!r}, which would be taken letter by letter")
    if labels:
        check_labels(labels)
        values["labels"] = {**(config.labels or {}), **labels}
    if env:
        for key, value in env.items():
            if not key or "=" in key or "\0" in f"{key}{value}":
                raise InvalidReference(f"{key!r}: no name of a variable, or a NUL in its value")
        changed = {**environment(config), **env}
        values["env"] = tuple(f"{key}={value}" for key, value in changed.items() if value is not None)
    if entrypoint is not None:
        values |= {"entrypoint": tuple(entrypoint), "cmd": None}
    if command:
        values["cmd"] = tuple(command)
    if workdir and not posixpath.isabs(workdir):
        raise InvalidReference(f"workdir {workdir}: not an absolute path")
    if workdir is not None:
        values["working_dir"] = workdir
    if user is not None:
        values["user"] = user
    try:
        return convert(to_builtins(replace(config, **values), enc_hook=str), RuntimeConfig)
    except ValidationError as e:
        raise TypeError(f"in what a container is to run: {e}") from None


def environment(config: RuntimeConfig) -> dict[str, str]:
    return dict(pair.partition("=")[::2] for pair in config.env or ())


def _expanded(config: RuntimeConfig, text: str) -> str:
    known = environment(config)
    return VARIABLE.sub(lambda m: known.get(m[1] or m[2], "") if m[1] or m[2] else m[0], text)


def _exec_form(text: str) -> tuple[str, ...] | None:
    """The words of a JSON array of strings; None for anything else, which is a line for a shell."""
    try:
        words = json.loads(text)
    except ValueError:
        return None
    return tuple(words) if isinstance(words, list) and all(isinstance(word, str) for word in words) else None


def _command(config: RuntimeConfig, text: str) -> tuple[str, ...]:
    words = _exec_form(text)
    return words if words is not None else (*(config.shell or SHELL), text)


def _pairs(config: RuntimeConfig, text: str) -> dict[str, str]:
    """KEY=VALUE KEY="two words", or the old form KEY VALUE of one pair."""
    words = shlex.split(_expanded(config, text))
    if words and "=" not in words[0]:
        key, _, value = _expanded(config, text).partition(" ")
        if not value:
            raise ValueError(f"{key} has no value")
        return {key: value.strip()}
    if bad := next((word for word in words if word.find("=") < 1), None):
        raise ValueError(f"{bad} is no KEY=VALUE")
    return dict(word.partition("=")[::2] for word in words)


def _cmd(config: RuntimeConfig, text: str) -> dict[str, Any]:
    return {"cmd": _command(config, text)}


def _entrypoint(config: RuntimeConfig, text: str) -> dict[str, Any]:
    return {"entrypoint": _command(config, text)}


def _env(config: RuntimeConfig, text: str) -> dict[str, Any]:
    return {"env": tuple(f"{k}={v}" for k, v in (environment(config) | _pairs(config, text)).items())}


def _label(config: RuntimeConfig, text: str) -> dict[str, Any]:
    return {"labels": {**(config.labels or {}), **_pairs(config, text)}}


def _expose(config: RuntimeConfig, text: str) -> dict[str, Any]:
    ports: dict[str, dict[str, Any]] = {}
    for word in shlex.split(_expanded(config, text)):
        if not PORT.match(word):
            raise ValueError(f"{word} is no port: write 80, 53/udp or 8000-8010")
        numbers, _, protocol = word.partition("/")
        first, _, last = numbers.partition("-")
        for port in range(int(first), int(last or first) + 1):
            ports[f"{port}/{protocol or 'tcp'}"] = {}
    return {"exposed_ports": {**(config.exposed_ports or {}), **ports}}


def _volume(config: RuntimeConfig, text: str) -> dict[str, Any]:
    paths = _exec_form(text) or shlex.split(_expanded(config, text))
    return {"volumes": {**(config.volumes or {}), **{path: {} for path in paths}}}


def _workdir(config: RuntimeConfig, text: str) -> dict[str, Any]:
    return {"working_dir": posixpath.normpath(posixpath.join("/", config.working_dir or "", _expanded(config, text)))}


def _user(config: RuntimeConfig, text: str) -> dict[str, Any]:
    return {"user": _expanded(config, text)}


def _stopsignal(config: RuntimeConfig, text: str) -> dict[str, Any]:
    return {"stop_signal": _expanded(config, text)}


def _onbuild(config: RuntimeConfig, text: str) -> dict[str, Any]:
    return {"on_build": (*(config.on_build or ()), text)}


CHANGES: dict[str, Callable[[RuntimeConfig, str], dict[str, Any]]] = {
    "CMD": _cmd,
    "ENTRYPOINT": _entrypoint,
    "ENV": _env,
    "EXPOSE": _expose,
    "LABEL": _label,
    "ONBUILD": _onbuild,
    "STOPSIGNAL": _stopsignal,
    "USER": _user,
    "VOLUME": _volume,
    "WORKDIR": _workdir,
}
