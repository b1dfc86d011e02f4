"""Which images `images` lists: those of a NAME, which may be a pattern, and those that pass --filter."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

from overlaykit.cli.filters import TRUTH, parsed
from overlaykit.errors import InvalidReference
from overlaykit.oci import Reference
from overlaykit.store import Store, StoredImage
from overlaykit.store.labels import has_labels

FILTERS = ("before", "dangling", "label", "reference", "since")


def listed(store: Store, name: str | None, filters: Iterable[str]) -> list[tuple[StoredImage, str]]:
    """The images that pass, the newest first, each with one of its names, "" if it has none. InvalidReference, NotFound."""
    wanted = parsed(filters, FILTERS, {"dangling": TRUTH})
    before, since = ([store.image(text).config.created or "" for text in wanted.get(key, ())] for key in ("before", "since"))
    patterns = wanted.get("reference", [])

    def passes(image: StoredImage) -> bool:
        created = image.config.created or ""
        return (
            has_labels(dict(image.runtime.labels or {}), wanted.get("label", ()))
            and all(created < time for time in before)
            and all(created > time for time in since)
            and all(TRUTH[text] == (not image.names) for text in wanted.get("dangling", ()))
        )

    return [
        (image, tag)
        for image in store.images()
        if passes(image)
        for tag in image.tags or [""]
        if (name is None or _is_called(tag, name)) and (not patterns or any(_is_called(tag, text) for text in patterns))
    ]


def _is_called(tag: str, wanted: str) -> bool:
    """Whether an image's name is `wanted`, or in that repository, or fits that pattern, in which no * stands for a slash."""
    if not tag:
        return False
    if _fits(tag, wanted) or _fits(tag.rpartition(":")[0], wanted):
        return True
    try:
        name = Reference.parse(wanted)
    except InvalidReference:
        if not set(wanted) & set("*?["):
            raise
        return False
    found = Reference.parse(tag)
    return found.name == name.name and name.tag in (None, found.tag)


def _fits(name: str, pattern: str) -> bool:
    parts, patterns = name.split("/"), pattern.split("/")
    return len(parts) == len(patterns) and all(map(fnmatchcase, parts, patterns))
