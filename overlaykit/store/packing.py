"""New layers: from what a writable layer holds, from a directory of the host, from a tar that somebody has."""

from __future__ import annotations

import logging
import os
from datetime import UTC, datetime
from pathlib import Path

from overlaykit.errors import Unsupported
from overlaykit.oci import BlobLayer, BlobWriter, Compression, Descriptor, Digest, Layout
from overlaykit.oci.layer import LayerWriter
from overlaykit.store.leases import Lease
from overlaykit.tree import Losses, Tree, write_tar
from overlaykit.tree.tarwrite import Content

logger = logging.getLogger(__name__)


class LeasedLayout(Layout):
    """The store's layout for one operation: what it adds is under its lease before it can be seen."""

    def __init__(self, root: Path, lease: Lease) -> None:
        self.root, self.lease = root, lease  # the store has looked whether it is one

    def ingest(self, expected: Descriptor | Digest | None = None, *, media_type: str = "") -> BlobWriter:
        return _LeasedWriter(self, expected, media_type=media_type)


class _LeasedWriter(BlobWriter):
    def commit(self) -> Descriptor:
        assert isinstance(self._layout, LeasedLayout)
        self._layout.lease.add(self.digest)
        return super().commit()


def pack(
    layout: Layout,
    tree: Tree,
    content: Content,
    *,
    compression: Compression | str = "gzip",
    losses: Losses | None = None,
) -> BlobLayer:
    """The layer of `tree` (a changeset is one), whose files `content` opens. What a layer cannot carry goes to `losses`.

    The same input gives the same layer; SOURCE_DATE_EPOCH bounds its times.
    """
    with LayerWriter(layout, compression) as out:
        write_tar(tree, content, out, source_date_epoch=source_date_epoch(), losses=losses)
        return out.commit()


def says_nothing(changeset: Tree) -> bool:
    """Whether a layer of `changeset` would change nothing."""
    return len(changeset) == 0 or (len(changeset) == 1 and changeset.entry(0).flags != 0 and not changeset.is_changeset)


def report(what: str, losses: Losses, *, level: int = logging.WARNING) -> None:
    """Log what could not be kept."""
    if losses:
        more = f", and {len(losses) - 1:,} more" if len(losses) > 1 else ""
        logger.log(level, "%s: not everything could be kept: %s%s", what, losses[0], more)


# --- time -------------------------------------------------------------------------------------------------------------


def source_date_epoch() -> int | None:
    """Seconds since 1970 that $SOURCE_DATE_EPOCH says (reproducible-builds.org), None without it."""
    text = os.environ.get("SOURCE_DATE_EPOCH")
    if not text:
        return None
    if not text.isdecimal():
        raise Unsupported(f"SOURCE_DATE_EPOCH={text!r} is no number of seconds")
    return int(text)


def now() -> str:
    """The time for a new document, RFC 3339: $SOURCE_DATE_EPOCH if there is one."""
    epoch = source_date_epoch()
    when = datetime.now(UTC) if epoch is None else datetime.fromtimestamp(epoch, UTC)
    return when.isoformat().replace("+00:00", "Z")
