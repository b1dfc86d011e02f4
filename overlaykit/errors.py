"""Every error that overlaykit raises of its own. The class says what the caller can do, the message what happened with
both values, the hint what to try. File system failures are not here: they stay OSError, with errno and path."""

from __future__ import annotations


class OverlaykitError(Exception):
    """Something overlaykit refuses or found broken. `hint` says what to try; `exit_code` is the command line's."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "", **values: object) -> None:
        super().__init__(message)
        self.hint = hint
        self.__dict__.update(values)


class InvalidReference(OverlaykitError, ValueError):
    """A name, tag or digest that is not one."""


class InvalidLayer(OverlaykitError, ValueError):
    """A tar, whiteout or changeset that breaks the format: truncated, bad checksum, bare ".wh."."""


class UnsafePath(InvalidLayer):
    """A path that would leave the root."""


class InvalidImage(OverlaykitError, ValueError):
    """A file or directory that is no image, or whose documents do not fit together."""


class IntegrityError(OverlaykitError):
    """Bytes that are not what their descriptor promised."""


class DigestMismatch(IntegrityError):
    """Another digest than expected: see `.expected` and `.actual`."""

    expected: str
    actual: str


class SizeMismatch(IntegrityError):
    """Another size than expected: see `.expected` and `.actual` (bytes)."""

    expected: int
    actual: int


class NotFound(OverlaykitError, LookupError):
    """No such image, layer, snapshot, container or volume."""


class AlreadyExists(OverlaykitError):
    """The name or key is taken."""


class InUse(OverlaykitError):
    """It has children, is mounted, is open elsewhere, or a container needs it."""


class Unsupported(OverlaykitError):
    """The kernel, the file system or this version cannot do it; the message says which feature."""
