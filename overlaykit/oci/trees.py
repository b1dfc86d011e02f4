"""Trees of whatever a path or a value is: the functions on trees, for directories, tars, layers and images alike.

A directory is what lies in it; a tar (compressed or not) and a layer are the changeset that they say, whiteouts and all; an
image is what a container of it would see, whether it is in an OCI directory, in an archive or a value.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from overlaykit.oci.archive import NoImage, open_image
from overlaykit.oci.image import Image
from overlaykit.oci.layer import Layer, NamedStream
from overlaykit.tree import changes as changes_of
from overlaykit.tree import diff as diff_of
from overlaykit.tree import merge as merge_of
from overlaykit.tree import scan as scan_directory
from overlaykit.tree import squash as squash_of
from overlaykit.tree.changes import Change
from overlaykit.tree.table import StrPath, Tree
from overlaykit.tree.tarball import index_tar
from overlaykit.tree.whiteout import WhiteoutFormat

Source = Tree | Layer | Image | StrPath


def scan(source: Source | int, *, whiteouts: WhiteoutFormat = WhiteoutFormat.NONE, xattrs: bool = True) -> Tree:
    """The Tree of `source`: a layer, an image, the path of a directory, an image or a tar, or a directory's descriptor.

    whiteouts, xattrs: of directories, as `tree.scan` has them. Raises InvalidLayer, InvalidImage and IntegrityError for what
    is wrong with a source, OSError for what cannot be read.
    """
    if isinstance(source, Tree):
        return source
    if isinstance(source, Layer):
        return source.tree()
    if isinstance(source, Image):
        return merge_of([layer.tree() for layer in source.layers])
    if isinstance(source, int):
        return scan_directory(source, whiteouts=whiteouts, xattrs=xattrs)
    path = Path(source)
    if path.is_dir() and not (path / "oci-layout").exists():
        return scan_directory(path, whiteouts=whiteouts, xattrs=xattrs)
    try:
        return scan(open_image(path))
    except NoImage:
        pass
    with NamedStream(open(path, "rb", buffering=0), what=os.fspath(path)) as stream:
        tree = index_tar(stream)
        stream.drain()
        return tree


def merge(sources: Sequence[Source]) -> Tree:
    """What `sources`, bottom first, show on top of one another: a tree without whiteouts. Raises as `scan` does."""
    return merge_of([scan(source) for source in sources])


def squash(sources: Sequence[Source]) -> Tree:
    """One layer that does what `sources`, bottom first, do one after another; its whiteouts stay. Raises as `scan` does."""
    return squash_of([scan(source) for source in sources])


def diff(lower: Source, upper: Source) -> Tree:
    """The changeset that leads from `lower` to `upper`: what differs in anything but content. Raises as `scan` does.

    InvalidLayer also if one of them has whiteouts. `compare` looks into the files as well.
    """
    return diff_of(scan(lower), scan(upper))


def changes(lower: Source, changeset: Source, *, edited: Collection[str] = ()) -> Iterator[Change]:
    """What `changeset` does to `lower`, a line a path, as docker diff says it. Raises as `scan` does.

    edited: paths of files whose content is known to differ, although the size is the same.
    """
    return changes_of(scan(lower), scan(changeset), edited=edited)
