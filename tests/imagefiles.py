"""Image files made of nothing but the standard library, whole and damaged: OCI layouts and archives, docker archives.

An image here is {file name: content}; the forms differ in the names, `write` puts them on disk as a directory or a tar.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import random
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Files = dict[str, bytes]
OCI = "application/vnd.oci.image"
MTIME = 1_700_000_000  # seconds


def digest(raw: bytes) -> str:
    return "sha256:" + hashlib.sha256(raw).hexdigest()


def blob(raw: bytes) -> str:
    """Where an OCI layout keeps `raw`."""
    return "blobs/" + digest(raw).replace(":", "/")


def to_json(document: object) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode()


def layer(files: Mapping[str, bytes | None]) -> bytes:
    """An uncompressed layer: files by their content, directories as None."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.mtime, info.mode = MTIME, 0o644
            if content is None:
                info.type, info.mode = tarfile.DIRTYPE, 0o755
            else:
                info.size = len(content)
            tar.addfile(info, io.BytesIO(content or b""))
    return out.getvalue()


NOISE = random.Random(1).randbytes(100_000)  # bytes that gzip cannot shrink: most of an archive is a layer's content
LAYERS = (
    layer({"etc": None, "etc/motd": b"welcome\n", "etc/noise": NOISE, "etc/old": b"old\n"}),
    layer({"etc/.wh.old": b"", "etc/new": NOISE[::-1]}),
)


def config(layers: Sequence[bytes]) -> dict[str, Any]:
    """An image config for uncompressed `layers`."""
    return {
        "created": "2023-11-14T22:13:20Z",
        "architecture": "amd64",
        "os": "linux",
        "config": {"Cmd": ["/bin/sh"], "Env": ["PATH=/bin"]},
        "rootfs": {"type": "layers", "diff_ids": [digest(raw) for raw in layers]},
        "history": [{"created": "2023-11-14T22:13:20Z", "created_by": f"layer {i}"} for i in range(len(layers))],
    }


def oci(layers: Sequence[bytes] = LAYERS, *, tag: str = "1", changed: Mapping[str, Any] | None = None) -> Files:
    """An OCI layout of gzip layers. changed: keys of the manifest's first layer descriptor to give other values."""
    blobs = [gzip.compress(raw, mtime=0) for raw in layers]
    document = to_json(config(layers))
    manifest = {
        "schemaVersion": 2,
        "mediaType": f"{OCI}.manifest.v1+json",
        "config": descriptor(document, "config.v1+json"),
        "layers": [descriptor(raw, "layer.v1.tar+gzip") for raw in blobs],
    }
    manifest["layers"][0].update(changed or {})
    raw_manifest = to_json(manifest)
    entry = descriptor(raw_manifest, "manifest.v1+json")
    entry["annotations"] = {"org.opencontainers.image.ref.name": tag}
    index = {"schemaVersion": 2, "mediaType": f"{OCI}.index.v1+json", "manifests": [entry]}
    files = {"oci-layout": to_json({"imageLayoutVersion": "1.0.0"}), "index.json": to_json(index)}
    return files | {blob(raw): raw for raw in [document, raw_manifest, *blobs]}


def descriptor(raw: bytes, kind: str) -> dict[str, Any]:
    return {"mediaType": f"{OCI}.{kind}", "digest": digest(raw), "size": len(raw)}


def docker_20(layers: Sequence[bytes] = LAYERS, *, tag: str = "damaged:1", config_of: Sequence[bytes] = ()) -> Files:
    """What `docker save` wrote up to version 24: a folder for each layer. config_of: what the config speaks of."""
    document = to_json(config(config_of or layers))
    name = digest(document).removeprefix("sha256:") + ".json"
    folders = [digest(raw + b"v1").removeprefix("sha256:") for raw in layers]
    files: Files = {}
    for folder, raw in zip(folders, layers, strict=True):
        files |= {f"{folder}/VERSION": b"1.0", f"{folder}/json": to_json({"id": folder}), f"{folder}/layer.tar": raw}
    manifest = [{"Config": name, "RepoTags": [tag], "Layers": [f"{folder}/layer.tar" for folder in folders]}]
    return files | {name: document, "manifest.json": to_json(manifest)}


def docker_25(layers: Sequence[bytes] = LAYERS, *, tag: str = "damaged:1", config_of: Sequence[bytes] = ()) -> Files:
    """What `docker save` writes since version 25: an OCI layout of plain layers with a manifest.json beside it."""
    document = to_json(config(config_of or layers))
    manifest = to_json(
        {
            "schemaVersion": 2,
            "mediaType": f"{OCI}.manifest.v1+json",
            "config": descriptor(document, "config.v1+json"),
            "layers": [descriptor(raw, "layer.v1.tar") for raw in layers],
        }
    )
    entry = descriptor(manifest, "manifest.v1+json")
    entry["annotations"] = {"io.containerd.image.name": f"docker.io/library/{tag}"}
    entry["annotations"]["org.opencontainers.image.ref.name"] = tag.partition(":")[2]
    names = {"Config": blob(document), "RepoTags": [tag], "Layers": [blob(raw) for raw in layers]}
    files = {blob(raw): raw for raw in [document, manifest, *layers]}
    files["index.json"] = to_json({"schemaVersion": 2, "mediaType": f"{OCI}.index.v1+json", "manifests": [entry]})
    return files | {"manifest.json": to_json([names]), "oci-layout": to_json({"imageLayoutVersion": "1.0.0"})}


def write(path: Path, files: Files, *, form: str) -> Path:
    """`files` on disk at `path`: form "dir", "tar" or "tar.gz". The path."""
    if form == "dir":
        for name, content in files.items():
            target = path / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
        return path
    # The archive's own names are files of any mode; a layer's folder has no entry, and needs none.
    raw = layer(files)
    path.write_bytes(gzip.compress(raw, mtime=0) if form == "tar.gz" else raw)
    return path


def replace_json(files: Files, name: str, change: Mapping[str, Any]) -> Files:
    """`files` with keys of a JSON object changed, and nothing else: digests of it no longer fit."""
    return files | {name: to_json(json.loads(files[name]) | change)}


def largest(files: Files) -> str:
    """The name of the largest file: a layer."""
    return max(files, key=lambda name: len(files[name]))


def flip(raw: bytes, at: int) -> bytes:
    """`raw` with one bit of byte `at` turned."""
    return raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :]
