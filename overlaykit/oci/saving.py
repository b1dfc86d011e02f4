"""Images into files: docker-archive, OCI archive, OCI directory. The same images give the same bytes.

A docker-archive here is what Docker from 25 on writes, an OCI layout with a manifest.json beside it, which Docker
before that, podman and skopeo load as well. Nothing half done is ever to be seen under the name asked for.
"""

from __future__ import annotations

import io
import os
import secrets
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import BinaryIO, Final

from msgspec.structs import replace

from overlaykit.errors import Unsupported
from overlaykit.oci.digest import Digest, Reader, VerifyingReader, Writable, blob_path, copy_stream
from overlaykit.oci.documents import IMAGE_NAME, OCI_INDEX, REF_NAME, Descriptor, Index, canonical
from overlaykit.oci.durable import sync_directory, whole_file
from overlaykit.oci.image import Image
from overlaykit.oci.layer import PlainLayer, compression_named
from overlaykit.oci.layout import LAYOUT_VERSION, Layout, StrPath, name_of
from overlaykit.oci.mutate import with_layers
from overlaykit.oci.reference import Reference
from overlaykit.tree.tarwrite import Whole

BLOCK, RECORD = 512, 20 * 512  # bytes: what members begin at, and what a tar's size is a multiple of
FORMATS: Final = ("docker-archive", "oci-archive", "oci-dir")
Blob = tuple[Descriptor, Callable[[], Reader]]


def save(image: Image, path: StrPath | BinaryIO, *, format: str = "docker-archive", names: Iterable[str] = ()) -> None:
    """Write `image`, under `names`, to the file or directory `path`; an archive also to an open binary file.

    format: one of FORMATS. An OCI directory that exists gets the image added; any other file gives way.
    Unsupported for another format, InvalidReference for a name that is none.
    """
    save_images([(tuple(names), image)], path, format=format)


def save_images(
    images: Sequence[tuple[Sequence[str], Image]], path: StrPath | BinaryIO, *, format: str = "docker-archive"
) -> None:
    """Write several images, each with its names, to one file or directory. See `save`."""
    if format not in FORMATS:
        raise Unsupported(f"format {format!r}", hint=f"one of {', '.join(FORMATS)}")
    parsed = [([Reference.parse(name).tagged for name in names], image) for names, image in images]
    if format == "docker-archive":
        parsed = [(references, _for_docker(image)) for references, image in parsed]
    if format == "oci-dir":
        if not isinstance(path, str | os.PathLike):
            raise Unsupported("an OCI directory into an open file", hint="give a path, or format oci-archive")
        _save_directory(parsed, Path(path))
    elif isinstance(path, str | os.PathLike):
        with whole_file(path) as out:
            _write_archive(parsed, out, docker=format == "docker-archive")
    else:
        _write_archive(parsed, path, docker=format == "docker-archive")


# --- what is written --------------------------------------------------------------------------------------------------


def _blobs(images: Sequence[tuple[list[Reference], Image]]) -> dict[Digest, Blob]:
    """Every blob of the images once: layers bottom first, then config and manifest, so that what is named is there."""
    out: dict[Digest, Blob] = {}
    for _, image in images:
        for layer in image.layers:
            out.setdefault(layer.digest, (layer.descriptor, layer.compressed))
        out.setdefault(image.id, (image.manifest.config, partial(_document, image.raw_config(), image.manifest.config)))
        out.setdefault(image.digest, (image.descriptor, partial(_document, image.raw_manifest(), image.descriptor)))
    return out


def _for_docker(image: Image) -> Image:
    """`image` as every `docker load` takes it: Docker 20.10 reads plain layers and gzip, but not zstd."""
    layers = [PlainLayer(layer) if compression_named(layer.media_type) == "zstd" else layer for layer in image.layers]
    return image if layers == [*image.layers] else with_layers(image, layers)


def _document(raw: bytes, descriptor: Descriptor) -> Reader:
    return VerifyingReader(io.BytesIO(raw), descriptor.digest, descriptor.size, what="document")


def _entries(images: Sequence[tuple[list[Reference], Image]], *, whole_names: bool) -> list[Descriptor]:
    """The entries of index.json: one for each name, or one without.

    Docker and containerd put the tag into ref.name and the whole name beside it, and umoci can address nothing but a
    tag; podman puts the whole name there, and loads under it. Where two images have one tag, only the whole name
    tells.
    """
    tags = Counter(reference.tag for references, _ in images for reference in references)
    out = []
    for references, image in images:
        for reference in references:
            short = not whole_names and reference.tag is not None and tags[reference.tag] == 1
            ref_name = reference.tag if short and reference.tag else str(reference)
            out.append(replace(image.descriptor, annotations={REF_NAME: ref_name, IMAGE_NAME: str(reference)}))
        if not references:
            out.append(image.descriptor)
    return out


def _docker_manifest(images: Sequence[tuple[list[Reference], Image]]) -> bytes:
    return canonical(
        [
            {
                "Config": blob_path(image.id),
                "RepoTags": [r.familiar for r in references] or None,
                "Layers": [blob_path(layer.digest) for layer in image.layers],
            }
            for references, image in images
        ]
    )


# --- archives ---------------------------------------------------------------------------------------------------------


def _write_archive(images: Sequence[tuple[list[Reference], Image]], out: BinaryIO, *, docker: bool) -> None:
    blobs = _blobs(images)
    index = Index(schema_version=2, media_type=OCI_INDEX, manifests=tuple(_entries(images, whole_names=not docker)))
    tar = _TarWriter(out)
    for folder in ["blobs", *sorted({f"blobs/{digest.algorithm}" for digest in blobs})]:
        tar.add_directory(folder)
    for digest, (descriptor, opened) in blobs.items():
        tar.add_file(blob_path(digest), descriptor.size, opened)
    tar.add_bytes("index.json", canonical(index))
    if docker:
        tar.add_bytes("manifest.json", _docker_manifest(images))
    tar.add_bytes("oci-layout", canonical({"imageLayoutVersion": LAYOUT_VERSION}))
    tar.finish()


class _TarWriter:
    """Writes a tar of files that are nobody's and of no time, which is why it is always the same."""

    def __init__(self, out: Writable) -> None:
        self._out = Whole(out)
        self._at = 0

    def add_directory(self, name: str) -> None:
        self._header(name + "/", 0, b"5", 0o755)

    def add_bytes(self, name: str, data: bytes) -> None:
        self._header(name, len(data))
        self._content(data)

    def add_file(self, name: str, size: int, opened: Callable[[], Reader]) -> None:
        """A member whose content is a verified stream, which therefore has that size."""
        self._header(name, size)
        with closing(opened()) as source:
            self._at += copy_stream(source, self._out)
        self._pad(BLOCK)

    def finish(self) -> None:
        self._write(bytes(2 * BLOCK))
        self._pad(RECORD)

    def _header(self, name: str, size: int, kind: bytes = b"0", mode: int = 0o644) -> None:
        import tarfile  # which takes longer to import than all of this package's own modules

        info = tarfile.TarInfo(name)
        info.size, info.type, info.mode = size, kind, mode
        self._write(info.tobuf(tarfile.PAX_FORMAT))

    def _content(self, data: bytes) -> None:
        self._write(data)
        self._pad(BLOCK)

    def _pad(self, unit: int) -> None:
        self._write(bytes(-self._at % unit))

    def _write(self, data: bytes) -> None:
        self._out.write(data)
        self._at += len(data)


# --- directories ------------------------------------------------------------------------------------------------------


def _save_directory(images: Sequence[tuple[list[Reference], Image]], path: Path) -> None:
    target = Path(os.path.realpath(path))
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        _fill(Layout(target), images)
        return
    temporary = target.with_name(f".{target.name[:200]}.{secrets.token_hex(8)}.tmp")
    try:
        _fill(Layout.create(temporary, mode=0o777), images)
        (temporary / "ingest").rmdir()  # nobody else writes here: others get a layout and nothing besides
        (temporary / "lock").unlink()
        os.rename(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_directory(target.parent)


def _fill(layout: Layout, images: Sequence[tuple[list[Reference], Image]]) -> None:
    for descriptor, opened in _blobs(images).values():
        if not layout.verify(descriptor):
            with layout.ingest(descriptor) as writer, closing(opened()) as source:
                copy_stream(source, writer)
                writer.commit()
    entries = _entries(images, whole_names=False)
    named = {name_of(d) for d in entries} - {None}

    def with_images(there: tuple[Descriptor, ...]) -> list[Descriptor]:
        return [*(d for d in there if name_of(d) not in named and d not in entries), *entries]

    layout.edit(with_images)


__all__ = ["FORMATS", "save", "save_images"]
