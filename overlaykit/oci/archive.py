"""Images in files: docker-archives, OCI archives, OCI layout directories, as `docker save`, podman, skopeo, umoci and
buildkit write them.

    docker-archive   a tar with manifest.json; layers ID/layer.tar (Docker to 24), SHA256.tar (podman, skopeo)
    OCI archive      a tar of an OCI layout; Docker from 25 on writes one with a manifest.json beside it
    OCI directory    an OCI layout

The tar may be compressed as a whole, and so may each layer. Nothing is unpacked to disk: members are read where they
are.
"""

from __future__ import annotations

import os
import re
import stat
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from overlaykit.errors import DigestMismatch, InvalidImage, InvalidLayer, NotFound
from overlaykit.oci.digest import Digest, VerifyingReader, blob_path, shown
from overlaykit.oci.documents import IMAGE_NAME, MAX_DOCUMENT, REF_NAME, Descriptor, parse_index
from overlaykit.oci.image import Blobs, Image, find_image
from overlaykit.oci.layer import Layer, MemberLayer
from overlaykit.oci.layout import MAX_INDEX, Layout, StrPath
from overlaykit.oci.members import Members
from overlaykit.oci.mutate import image_of
from overlaykit.oci.platforms import Platform
from overlaykit.oci.reference import Reference
from overlaykit.oci.streams import SNIFF, compression_of, decompressed, is_tar_header

if TYPE_CHECKING:
    import io

ACCEPTED = "accepted are docker-archives (docker save), OCI archives and OCI layout directories"
Named = tuple[tuple[str, ...], Image]

_HEX_NAME = re.compile(r"(?:.*/)?([0-9a-f]{64})(?:\.json)?\Z")


class NoImage(InvalidImage):
    """The file is something else. What calls itself an image and is damaged is an InvalidImage, and no more."""


class Archive:
    """The images in a file or directory. Its file stays open until `close`, or until nobody holds an image of it."""

    def __init__(self, path: StrPath, *, platform: Platform | None = None, max_size: int | None = None) -> None:
        """What is in `path`. InvalidImage, in one line, if that is no image.

        platform  which image of an index: this machine's
        max_size  bytes that a compressed archive may unpack to
        """
        self.path = Path(path)
        self._members: Members | None = None
        if self.path.is_dir():
            self.images = _directory_images(self.path, platform)
            return
        members = self._members = _open_members(self.path, max_size)
        try:
            self.images = _member_images(members, platform)
        except BaseException:
            members.close()
            raise

    def close(self) -> None:
        if self._members is not None:
            self._members.close()

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def image(self, name: str | None = None) -> Image:
        """The image of that name, or the only one there is. NotFound says which there are."""
        if name is None:
            if len(self.images) == 1:
                return self.images[0][1]
            raise NotFound(f"{self.path} has {len(self.images)} images", hint=f"name one of them: {self._names()}")
        wanted = {name}
        try:
            reference = Reference.parse(name).tagged
            wanted |= {str(reference), reference.familiar}
        except ValueError:
            pass
        for names, image in self.images:
            if wanted & set(names):
                return image
        raise NotFound(f"{self.path} has no image {shown(name)}", hint=f"it has {self._names()}")

    def _names(self) -> str:
        return ", ".join(names[0] if names else image.id.short for names, image in self.images) or "none"


def open_images(
    path: StrPath, *, platform: Platform | None = None, max_size: int | None = None
) -> list[tuple[tuple[str, ...], Image]]:
    """The images in the file or directory `path`, each with its names as they stand there. InvalidImage if it is none.

    The file is closed when the last of the images goes; `Archive` says when.
    """
    return Archive(path, platform=platform, max_size=max_size).images


def open_image(
    path: StrPath, *, name: str | None = None, platform: Platform | None = None, max_size: int | None = None
) -> Image:
    """The image in the file or directory `path`: the only one, or the one called `name`. InvalidImage, NotFound."""
    return Archive(path, platform=platform, max_size=max_size).image(name)


# --- OCI layouts ------------------------------------------------------------------------------------------------------


class _MemberBlobs:
    """The blobs of an OCI layout in a tar."""

    def __init__(self, members: Members) -> None:
        self._members = members

    def open_blob(self, digest: str) -> io.RawIOBase:
        try:
            return self._members.open(blob_path(Digest(digest)))
        except NotFound:
            raise NotFound(f"{self._members.what} has no blob {digest}") from None

    def read(self, blob: Descriptor | str) -> bytes:
        digest, size = (blob.digest, blob.size) if isinstance(blob, Descriptor) else (Digest(blob), None)
        with VerifyingReader(self.open_blob(digest), digest, size, what=f"{self._members.what}: blob") as reader:
            data = reader.read(MAX_DOCUMENT + 1)
            reader.drain()
        if len(data) > MAX_DOCUMENT:
            raise InvalidImage(f"{self._members.what}: blob {digest}: more than {MAX_DOCUMENT:,} bytes, no document")
        return data


def _directory_images(path: Path, platform: Platform | None) -> list[Named]:
    if not (path / "oci-layout").exists():
        if (path / "manifest.json").exists():
            raise InvalidImage(f"{path} is no image: what skopeo calls dir:, or an unpacked docker-archive; {ACCEPTED}")
        looks = "a directory without a file oci-layout"
        raise InvalidImage(f"{path} is no image: {looks}; {ACCEPTED}", hint=_import_hint(path))
    layout = Layout(path)
    return _listed(layout, layout.raw_index(), f"{path}/index.json", platform)


def _member_images(members: Members, platform: Platform | None) -> list[Named]:
    if "index.json" in members and "oci-layout" in members:
        try:
            raw = members.read("index.json", limit=MAX_INDEX)
            images = _listed(_MemberBlobs(members), raw, f"{members.what}: index.json", platform)
            for _, image in images:
                for layer in image.layers:
                    members.find(blob_path(layer.digest))
            return images
        except (InvalidImage, NotFound):
            # Docker 25's index.json lists manifests without their layers, and nothing at all for an image saved by its
            # id (moby's image/tarexport/save.go): its manifest.json is whole.
            if "manifest.json" not in members:
                raise
    if "manifest.json" in members:
        return _docker_images(members, platform)
    raise _no_image(members)


def _listed(blobs: Blobs, raw_index: bytes, what: str, platform: Platform | None) -> list[Named]:
    """The images that an index.json lists, with all names of each."""
    names: dict[Digest, list[str]] = {}
    first: dict[Digest, Descriptor] = {}
    for descriptor in parse_index(raw_index, what=what).manifests:
        if descriptor.is_attestation:
            continue
        first.setdefault(descriptor.digest, descriptor)
        annotations = descriptor.annotations or {}
        name = annotations.get(IMAGE_NAME) or annotations.get(REF_NAME)
        known = names.setdefault(descriptor.digest, [])
        if name and name not in known:
            known.append(name)
    if not first:
        raise InvalidImage(f"{what} lists no image")
    return [(tuple(names[digest]), find_image(blobs, d, platform=platform)) for digest, d in first.items()]


# --- docker-archives --------------------------------------------------------------------------------------------------


class _DockerEntry(msgspec.Struct, rename="pascal"):
    """One image in manifest.json (moby's image/tarexport, manifestItem)."""

    config: str
    layers: tuple[str, ...] | None = None
    repo_tags: tuple[str, ...] | None = None


class DockerArchiveImage(Image):
    """An image in a docker-archive, which has no manifest of its own: one is made, of OCI's form."""

    def __init__(self, members: Members, entry: _DockerEntry) -> None:
        self._members, self._entry = members, entry

    @cached_property
    def _built(self) -> Image:
        return image_of(self.raw_config(), self.layers)

    def raw_manifest(self) -> bytes:
        return self._built.raw_manifest()

    def raw_config(self) -> bytes:
        return self._config

    @cached_property
    def _config(self) -> bytes:
        name = self._entry.config
        raw = self._members.read(name, limit=MAX_DOCUMENT)
        # Everybody names the config by its digest, so that an id that people were given can be held to it.
        named = _HEX_NAME.match(name)
        actual = Digest.of(raw)
        if named is not None and named[1] != actual.encoded:
            expected = Digest(f"sha256:{named[1]}")
            raise DigestMismatch(
                f"{self._members.what}: config: expected {expected}, read {actual}", expected=expected, actual=actual
            )
        return raw

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        listed, said = len(self._entry.layers or ()), len(self.diff_ids)
        if listed != said:
            raise InvalidImage(f"{self._members.what}: manifest.json lists {listed} layers, the config {said} diff_ids")
        return tuple(self.layer(i) for i in range(listed))

    def layer(self, i: int) -> Layer:
        name = (self._entry.layers or ())[i]
        member = self._members.find(name)
        return MemberLayer(partial(self._members.open, name), diff_id=self.diff_ids[i], size=member.size)


def _docker_images(members: Members, platform: Platform | None) -> list[Named]:
    raw = members.read("manifest.json", limit=MAX_INDEX)
    what = f"{members.what}: manifest.json"
    try:
        entries = msgspec.json.decode(raw, type=tuple[_DockerEntry, ...])
    except (ValueError, RecursionError) as e:
        raise NoImage(f"{what}: {e}") from e
    if not entries:
        raise InvalidImage(f"{what} lists no image")
    images: list[Named] = []
    for entry in entries:
        image = DockerArchiveImage(members, entry)
        try:
            _ = image.layers  # that all of it is there, is said now and not when a layer is first read
        except NotFound as e:
            raise InvalidImage(f"{e}, which manifest.json lists") from None
        if platform is None or image.platform.matches(platform):
            images.append((tuple(dict.fromkeys(entry.repo_tags or ())), image))
    if not images:
        raise NotFound(f"{members.what} has no image for {platform}")
    return images


# --- files ------------------------------------------------------------------------------------------------------------


def _open_members(path: Path, max_size: int | None) -> Members:
    """The members of the tar in the file `path`, which is unpacked to an unnamed temporary file if it is compressed."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise NoImage(f"{path} is no image: neither a regular file nor a directory; {ACCEPTED}")
        start = os.pread(fd, SNIFF, 0)
        compression = compression_of(start)
        if compression != "none":
            plain = _spooled(path, max_size)
            os.close(fd)
            fd = plain
            start = os.pread(fd, SNIFF, 0)
        if not is_tar_header(start):
            raise NoImage(f"{path} is no image: {_looks(start, compression)}; {ACCEPTED}")
        found = os.dup(fd)
    finally:
        os.close(fd)
    try:
        return Members(found, str(path))
    except InvalidImage as e:  # of a tar that may be anything
        raise NoImage(str(e), hint=e.hint) from e


def _spooled(path: Path, max_size: int | None) -> int:
    import tempfile  # only here: few archives are compressed as a whole

    done = 0
    with tempfile.TemporaryFile(buffering=0) as out, open(path, "rb", buffering=0) as file:
        try:
            for piece in decompressed(file, what=str(path)):
                done += len(piece)
                if max_size is not None and done > max_size:
                    raise InvalidImage(f"{path}: unpacks to more than the {max_size:,} bytes allowed")
                view = memoryview(piece)
                while view:
                    view = view[out.write(view) :]
        except InvalidLayer as e:
            raise InvalidImage(str(e)) from e
        return os.dup(out.fileno())


def _looks(start: bytes, compression: str) -> str:
    if not start:
        return "an empty file" if compression == "none" else f"{compression} data of an empty file"
    kinds = {
        b"\x7fELF": "a program",
        b"PK\x03\x04": "a zip file",
        b"hsqs": "a squashfs file system",
        b"{": "a JSON document",
        b"[": "a JSON document",
        b"!<arch>": "an ar archive or .deb package",
        b"#!": "a script",
    }
    looks = next((what for magic, what in kinds.items() if start.startswith(magic)), "no tar archive")
    return looks if compression == "none" else f"{compression} data of {looks}"


def _no_image(members: Members) -> NoImage:
    names, path = set(members), members.what
    if "repositories" in names:
        looks = "an archive of Docker before 1.10, without manifest.json"
    elif names & {"index.json", "oci-layout"}:
        looks = "an OCI archive that lacks " + ("oci-layout" if "index.json" in names else "index.json")
    elif any(name.split("/")[0] in ("bin", "etc", "usr", "lib", "sbin", "var") for name in names):
        looks = "a tar of a root file system"
        return NoImage(f"{path} is no image: {looks}; {ACCEPTED}", hint=_import_hint(path))
    else:
        looks = f"a tar of {len(names):,} members without manifest.json or index.json"
    return NoImage(f"{path} is no image: {looks}; {ACCEPTED}")


def _import_hint(path: StrPath) -> str:
    return f"to make an image of a root file system: overlaykit import {path} NAME:TAG"


__all__ = ["ACCEPTED", "Archive", "DockerArchiveImage", "NoImage", "open_image", "open_images"]
