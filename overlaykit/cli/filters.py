"""--filter KEY=VALUE, as Docker has it. Of one key any value will do, of labels all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from overlaykit.errors import InvalidReference

TRUTH = {"true": True, "1": True, "false": False, "0": False}  # what dangling= may say


def parsed(filters: Iterable[str], known: Sequence[str], choices: Mapping[str, Iterable[str]]) -> dict[str, list[str]]:
    """The values of each key. InvalidReference for a key that is not `known`, or a value that is none of its `choices`."""
    wanted: dict[str, list[str]] = {}
    for text in filters:
        key, equals, value = text.partition("=")
        if not equals or key not in known or (key in choices and value not in choices[key]):
            usual = "".join(f"; {key}={next(iter(values))}" for key, values in choices.items())
            raise InvalidReference(f"--filter {text}: not understood", hint=f"there are {', '.join(known)}{usual}")
        wanted.setdefault(key, []).append(value)
    return wanted
