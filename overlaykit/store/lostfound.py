"""ROOT/lost+found: what nobody can explain is never deleted. It moves there, with a note beside it.

lost+found/NAME-TIME         what was called NAME
lost+found/NAME-TIME.json    {"was": where it was in the root, "why": what was wrong with it}
lost+found/KIND-NAME.json    what a row or an entry said that had to go
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from overlaykit.oci.durable import sync_directory


def put_aside(root: Path, path: Path, why: str, *, was: Path | None = None) -> None:
    """Move `path`, which is in the store at `root`, to lost+found. Nothing if it is not there.

    was: where it was until just now, if that is another place.
    """
    if not os.path.lexists(path):
        return
    before = was or path
    target = _folder(root) / f"{before.name}-{time.time_ns():x}"
    note(root, target.name, {"was": str(before.relative_to(root)), "why": why})
    os.rename(path, target)
    sync_directory(target.parent)


def note(root: Path, name: str, about: object) -> None:
    """Write down in lost+found what is no longer anywhere else."""
    (_folder(root) / f"{name}.json").write_text(json.dumps(about, indent=2, default=str))


def _folder(root: Path) -> Path:
    folder = root / "lost+found"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder
