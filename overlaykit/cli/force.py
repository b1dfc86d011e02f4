"""What -f spares: questions before much is removed, and errors about what is not there."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import click

from overlaykit.cli import complain
from overlaykit.errors import NotFound


def confirmed(question: str) -> bool:
    """Whether the user says yes. To say nothing, at the end of a file or a pipe, is to say no."""
    try:
        return click.confirm(question, err=True)
    except click.Abort as e:
        if not isinstance(e.__context__, EOFError):
            raise  # Ctrl-C
        return False


@contextmanager
def forgiven(*, when: bool) -> Iterator[None]:
    """NotFound is said, and nothing else comes of it."""
    try:
        yield
    except NotFound as e:
        if not when:
            raise
        sys.stdout.flush()
        complain(f"{e} ({e.hint})" if e.hint else str(e))
