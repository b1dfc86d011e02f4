"""Which containers `ps --filter` lists."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from overlaykit.cli.filters import parsed
from overlaykit.errors import InvalidReference, NotFound
from overlaykit.store.containerrecords import Record
from overlaykit.store.labels import has_labels

if TYPE_CHECKING:
    from overlaykit.oci import Image
    from overlaykit.store import Store

FILTERS = ("ancestor", "id", "label", "name", "status", "volume")
STATES = ("created", "restarting", "running", "removing", "paused", "exited", "dead")  # here all are created


def selected(records: Iterable[Record], filters: Iterable[str], store: Callable[[], Store]) -> list[Record]:
    """Those of the containers that pass. store: opens it, for filters that records cannot answer.

    InvalidReference for a filter that is not understood.
    """
    wanted = parsed(filters, FILTERS, {"status": STATES})
    for key in ("id", "name"):
        for value in wanted.get(key, ()):
            _pattern(f"{key}={value}", value)
    ancestors = [image for name in wanted.get("ancestor", ()) if (image := _named(store(), name)) is not None]

    def image_of(record: Record) -> Image:
        return store().container(record.id).image

    def passes(record: Record) -> bool:
        if not has_labels(record.config.labels or {}, wanted.get("label", ())):
            return False
        points = store().container(record.id).mounts if "volume" in wanted else ()
        mounts = {text for point in points for text in (point.volume, point.spec.target)}
        names = (record.name, f"/{record.name}")  # Docker takes both
        return (
            ("status" not in wanted or "created" in wanted["status"])
            and ("id" not in wanted or any(re.match(value, record.id) for value in wanted["id"]))
            and ("name" not in wanted or any(re.search(value, name) for value in wanted["name"] for name in names))
            and ("volume" not in wanted or any(value in mounts for value in wanted["volume"]))
            and (
                "ancestor" not in wanted or any(_stands_on(store().container(record.id).image, image) for image in ancestors)
            )
        )

    return [record for record in records if passes(record)] if wanted else list(records)


def _pattern(text: str, value: str) -> None:
    try:
        re.compile(value)
    except re.error as e:
        raise InvalidReference(f"--filter {text}: no regular expression: {e}") from None


def _named(store: Store, name: str) -> Image | None:
    """An image, None if there is none: Docker lists no container then, and says nothing."""
    try:
        return store.image(name)
    except NotFound:
        return None


def _stands_on(image: Image, ancestor: Image) -> bool:
    """Whether `image` is `ancestor` or was made from it: its layers and its history begin with all of that one's."""
    layers, history = list(ancestor.diff_ids), list(ancestor.history)
    return list(image.diff_ids)[: len(layers)] == layers and list(image.history)[: len(history)] == history
