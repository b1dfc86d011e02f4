"""References: how people name images. `[registry[:port]/]repository[:tag][@digest]`.

The grammar is that of distribution's reference package, with Docker's short forms: `debian` is
`docker.io/library/debian:latest` written out. `str()` gives the whole name, `familiar` the short one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from overlaykit.errors import InvalidReference
from overlaykit.oci.digest import Digest, shown

DEFAULT_REGISTRY = "docker.io"
DEFAULT_TAG = "latest"
MAX_NAME = 255  # characters of registry and repository together (distribution/reference, NameTotalLengthMax)

_LABEL = r"(?:[a-zA-Z0-9]|[a-zA-Z0-9][a-zA-Z0-9-]*[a-zA-Z0-9])"
_REGISTRY = re.compile(rf"(?:{_LABEL}(?:\.{_LABEL})*|\[[0-9a-fA-F:]+\])(?::[0-9]+)?\Z")
_REPOSITORY = re.compile(r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*\Z")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}\Z")
_HEX_ID = re.compile(r"[0-9a-f]{64}\Z")


@dataclass(frozen=True, slots=True)
class Reference:
    """A whole name: where nothing was said, `registry` is docker.io; `tag` and `digest` stay None."""

    registry: str
    repository: str
    tag: str | None = None
    digest: Digest | None = None

    @staticmethod
    def parse(text: str) -> Reference:
        """The reference that `text` writes, short forms brought to whole ones. InvalidReference says what is wrong."""
        if len(text) > MAX_NAME + 1 + 128 + 1 + 136:
            raise InvalidReference(f"{shown(text)}: {len(text):,} characters are too long for an image name")
        rest, at, digest_text = text.partition("@")
        try:
            digest = Digest(digest_text) if at else None
        except InvalidReference as e:
            raise InvalidReference(f"{shown(text)}: {e}") from None
        tag: str | None = None
        before, colon, after = rest.rpartition(":")
        if colon and "/" not in after:  # else the colon is a port's
            rest, tag = before, after
            if not _TAG.match(tag):
                raise InvalidReference(
                    f"{shown(text)}: {shown(tag)} is no tag",
                    hint="a tag has 1 to 128 letters, digits, '_', '.' and '-', and begins with neither '.' nor '-'",
                )
        registry, repository = _split(rest)
        _check_name(text, registry, repository)
        return Reference(registry, repository, tag, digest)

    @property
    def name(self) -> str:
        """Registry and repository."""
        return f"{self.registry}/{self.repository}"

    @property
    def familiar(self) -> str:
        """As people write it and Docker prints it: without docker.io/ and library/ where they go without saying."""
        short = self.name
        if self.registry == DEFAULT_REGISTRY:
            short = self.repository.removeprefix("library/") if self.repository.count("/") == 1 else self.repository
        return short + self._suffix

    @property
    def tagged(self) -> Reference:
        """The same with the tag `latest` where it says neither tag nor digest."""
        return self if self.tag or self.digest else replace(self, tag=DEFAULT_TAG)

    @property
    def _suffix(self) -> str:
        return (f":{self.tag}" if self.tag else "") + (f"@{self.digest}" if self.digest else "")

    def __str__(self) -> str:
        return self.name + self._suffix


def _split(name: str) -> tuple[str, str]:
    """Registry and repository of `name`: the first part is a registry if it could be nothing else."""
    first, slash, rest = name.partition("/")
    if slash and (any(c in first for c in ".:[") or first == "localhost" or first != first.lower()):
        registry, repository = first, rest
    else:
        registry, repository = DEFAULT_REGISTRY, name
    if registry == "index.docker.io":
        registry = DEFAULT_REGISTRY
    if registry == DEFAULT_REGISTRY and "/" not in repository:
        repository = f"library/{repository}"
    return registry, repository


def _check_name(text: str, registry: str, repository: str) -> None:
    if not text:
        raise InvalidReference("an empty image name", hint="write NAME[:TAG], such as debian:bookworm")
    if not _REGISTRY.match(registry):
        raise InvalidReference(f"{shown(text)}: {shown(registry)} is no registry", hint="write host[:port]/name")
    bare = repository.removeprefix("library/") if registry == DEFAULT_REGISTRY else ""
    if _HEX_ID.match(bare):
        raise InvalidReference(f"{shown(text)} is an image id and not a name", hint="a name may not be 64 hex digits")
    if not _REPOSITORY.match(repository):
        hint = "a name has lower-case letters and digits, with '.', '_', '-' between them and '/' between its parts"
        raise InvalidReference(f"{shown(text)}: {shown(bare or repository)} is no image name", hint=hint)
    if len(registry) + 1 + len(repository) > MAX_NAME:
        raise InvalidReference(f"{shown(text)}: a name has {MAX_NAME} characters at most")
