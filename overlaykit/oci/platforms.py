"""Platforms: which system an image is for. Written `os/architecture[/variant]`, as Docker and containerd do.

Names follow Go's GOOS and GOARCH (image-spec image-index.md, "platform"); what people and machines call them
otherwise is brought to those first (as containerd's platforms package does).
"""

from __future__ import annotations

import os
import re

from msgspec import Struct, field, structs

from overlaykit.errors import InvalidReference

ARCHITECTURES = {
    "x86_64": ("amd64", None),
    "x86-64": ("amd64", None),
    "i386": ("386", None),
    "i486": ("386", None),
    "i586": ("386", None),
    "i686": ("386", None),
    "aarch64": ("arm64", None),
    "armhf": ("arm", "v7"),
    "armv7l": ("arm", "v7"),
    "armv7": ("arm", "v7"),
    "armel": ("arm", "v6"),
    "armv6l": ("arm", "v6"),
    "armv5tel": ("arm", "v5"),
    "ppc64el": ("ppc64le", None),
    "mips64el": ("mips64le", None),
    "mipsel": ("mipsle", None),
    "loongarch64": ("loong64", None),
}
# What a word that stands alone may be (go tool dist list); between slashes anything that looks like one is taken.
SYSTEM = re.compile(
    r"(aix|android|darwin|dragonfly|freebsd|illumos|ios|js|linux|netbsd|openbsd|plan9|solaris|wasip1|windows|zos)\Z", re.I
)
ARCHITECTURE = re.compile(
    r"(386|amd64|arm|armbe|arm64|loong64|mips|mipsle|mips64|mips64le|ppc64|ppc64le|riscv64|s390x|sparc64|wasm)\Z"
)
PART = re.compile(r"[A-Za-z0-9_-]{1,64}\Z")
DEFAULT_VARIANT = {"amd64": "v1", "arm64": "v8", "arm": "v7"}  # what no variant means


class Platform(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A system: `os`, `architecture`, and for some a `variant` of it."""

    architecture: str = ""
    os: str = ""
    variant: str | None = None
    os_version: str | None = field(name="os.version", default=None)
    os_features: tuple[str, ...] | None = field(name="os.features", default=None)
    features: tuple[str, ...] | None = None

    def __str__(self) -> str:
        return "/".join(filter(None, (self.os, self.architecture, self.variant)))

    @staticmethod
    def parse(text: str) -> Platform:
        """The platform that `text` names: "linux/arm64", "linux/arm/v7", or an architecture or a system alone."""
        parts = text.split("/")
        known = len(parts) <= 3 and all(PART.match(part) for part in parts)
        if known and len(parts) == 1:
            if SYSTEM.match(text):
                return structs.replace(Platform.host(), os=text.lower())
            parts = ["linux", *parts]
            known = ARCHITECTURE.match(Platform(architecture=text).normalised().architecture) is not None
        if not known:
            raise InvalidReference(f"{text!r} is no platform", hint="write os/architecture[/variant], such as linux/arm64")
        return Platform(os=parts[0], architecture=parts[1], variant=parts[2] if len(parts) == 3 else None).normalised()

    @staticmethod
    def host() -> Platform:
        """The platform of this machine."""
        system = os.uname()
        return Platform(os=system.sysname.lower(), architecture=system.machine).normalised()

    def normalised(self) -> Platform:
        """The same platform under the names Go has for it, with no variant where it is the usual one."""
        architecture, variant = self.architecture.lower(), self.variant.lower() if self.variant else None
        architecture, implied = ARCHITECTURES.get(architecture, (architecture, None))
        variant = variant or implied
        if variant and variant.isdigit():
            variant = f"v{variant}"
        if architecture == "arm":
            variant = variant or DEFAULT_VARIANT["arm"]  # containerd writes arm's out, and leaves out the others'
        elif variant == DEFAULT_VARIANT.get(architecture):
            variant = None
        return structs.replace(self, os=self.os.lower(), architecture=architecture, variant=variant)

    def rank(self, wanted: Platform) -> int | None:
        """How well an image for this platform runs on `wanted`: 0 is best, None not at all.

        A machine of one variant runs those below it too (arm/v7 runs arm/v6, amd64/v3 runs amd64).
        """
        mine, theirs = self.normalised(), wanted.normalised()
        if (mine.os, mine.architecture) != (theirs.os, theirs.architecture):
            return None
        have, want = _level(mine), _level(theirs)
        if have is None or want is None:
            return 0 if mine.variant == theirs.variant else None
        return want - have if have <= want else None

    def matches(self, wanted: Platform) -> bool:
        """Whether an image for this platform runs on `wanted`."""
        return self.rank(wanted) is not None


def _level(platform: Platform) -> int | None:
    """The number of a variant such as v7; None if it has none to compare."""
    variant = platform.variant or DEFAULT_VARIANT.get(platform.architecture, "v0")
    return int(variant[1:]) if variant[:1] == "v" and variant[1:].isdecimal() and len(variant) < 5 else None
