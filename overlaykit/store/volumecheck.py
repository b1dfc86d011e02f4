"""What fsck looks at in the volumes: rows without a directory, directories without a row, halves, and forgotten mounts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

from overlaykit.errors import OverlaykitError
from overlaykit.overlay.mounttable import is_mounted
from overlaykit.store import drivers
from overlaykit.store.drivers import DATA
from overlaykit.store.lostfound import put_aside
from overlaykit.store.volume import Volume
from overlaykit.store.volumeleft import LOOSE, RESTING, USED
from overlaykit.store.volumes import STRAY

if TYPE_CHECKING:
    from overlaykit.store.store import Store

Problem = tuple[str, str, str, Callable[[], object] | None]  # kind, what, text, and how to mend it


def volume_problems(store: Store) -> Iterator[Problem]:
    """What is wrong with the volumes of `store`."""
    volumes = store.volume_store
    with store.leases.hold() as lease:
        held = store.leases.held(besides=lease)
    known = {volume.name: volume for volume in volumes.listed()}
    for volume in known.values():
        in_use = bool({f"{USED}{volume.name}", f"{RESTING}{volume.name}"} & held) or volumes.is_shown(volume.name)
        yield from _of_volume(store, volume, in_use=in_use)
    for path in sorted(volumes.folder.iterdir()):
        if path.name not in known and path.name != ".lock" and f"{LOOSE}{path.name}" not in held:
            text = "a directory that no volume has"
            yield "stray-volume", str(path), text, partial(put_aside, store.root, path, STRAY)


def _of_volume(store: Store, volume: Volume, *, in_use: bool) -> Iterator[Problem]:
    what = f"volume {volume.name}"
    try:
        driver = drivers.find(volume.driver)
    except OverlaykitError as e:
        yield "unknown-driver", what, f"{e}; install what brings it", None
        return
    stored = driver.stored(volume.record.options)
    if stored is not None and not (volume.directory / stored).is_dir():
        text = f"its directory {volume.directory / stored} is gone, and its files with it"
        yield "missing-volume", what, text, partial(_empty_again, volume) if stored == DATA else None
        return
    if not volume.directory.is_dir():
        yield "missing-volume", what, f"its directory {volume.directory} is gone", partial(_empty_again, volume)
        return
    if in_use:
        return
    if is_mounted(volume.directory / DATA):
        text = "it is mounted, and nobody uses it"
        yield "stale-mount", what, text, partial(store.volume_store.hide, [volume.name])
    elif volume.site().needs_settling():
        yield "half-filled-volume", what, "left by an operation that was killed", lambda: volume.mountpoint


def _empty_again(volume: Volume) -> None:
    """An empty one in its place: so containers that have it work again, and it can be removed."""
    (volume.directory / DATA).mkdir(mode=0o755, parents=True, exist_ok=True)
    (volume.directory / DATA).chmod(0o755)
