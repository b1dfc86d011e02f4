"""Labels of volumes and containers, as they are given and as filters ask for them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from overlaykit.errors import InvalidReference


def check_labels(labels: Mapping[str, str]) -> None:
    """InvalidReference if one has no key, TypeError if one is no text."""
    if bad := next((pair for pair in labels.items() if not all(isinstance(part, str) for part in pair)), None):
        raise TypeError(f"a label is two texts, not {bad!r}")
    if "" in labels:
        raise InvalidReference(f"a label without a key: ={labels['']}", hint="write KEY=VALUE, or KEY")


def has_labels(labels: Mapping[str, str], wanted: Iterable[str]) -> bool:
    """Whether `labels` has each of `wanted`, "KEY" or "KEY=VALUE"."""
    pairs = [want.partition("=") for want in wanted]
    return all(key in labels and (not equals or labels[key] == value) for key, equals, value in pairs)
