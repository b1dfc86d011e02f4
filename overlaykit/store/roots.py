"""Where stores are."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from overlaykit.errors import NotFound

if TYPE_CHECKING:
    from pathlib import Path


def default_root() -> Path:
    """$OVERLAYKIT_ROOT, else /var/lib/overlaykit for root and $XDG_DATA_HOME/overlaykit for everyone else."""
    from pathlib import Path

    return Path(default_folder())


def default_folder() -> str:
    """The same, for who has no need of a Path. NotFound if there is no home directory to have it in."""
    if named := os.environ.get("OVERLAYKIT_ROOT"):
        return named
    if os.geteuid() == 0:
        return "/var/lib/overlaykit"
    if data := os.environ.get("XDG_DATA_HOME"):
        return os.path.join(data, "overlaykit")
    home = os.path.expanduser("~")
    if home == "~":
        raise NotFound("no home directory to have a store in", hint="say where it is: --root DIR")
    return os.path.join(home, ".local/share/overlaykit")
