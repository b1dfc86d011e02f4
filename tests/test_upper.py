"""Uppers with redirects and metacopies, as the kernel leaves them: their changeset does what the mount showed."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import pytest
from kernel_overlay import mounted, needs_kernel_overlay
from treetext import text

from overlaykit.errors import InvalidLayer
from overlaykit.overlay.upper import UpperLayer
from overlaykit.tree import Kind, merge, scan

FOLDERS = ("a", "b", "a/c", "a/c/e", "b/x")


def fill(folder: Path, rnd: random.Random) -> Path:
    for path in FOLDERS:
        (folder / path).mkdir(parents=True, exist_ok=True)
        for name in "fg":
            if rnd.random() < 0.7:
                (folder / path / f"{name}{rnd.randint(0, 2)}").write_text(str(rnd.random()))
    return folder


def change(root: Path, rnd: random.Random) -> None:
    """One random change of the tree at `root`; one that the kernel refuses changes nothing."""
    folders = [root, *(p for p in sorted(root.rglob("*")) if p.is_dir())]
    files = [p for p in sorted(root.rglob("*")) if p.is_file()] or folders
    folder, file, home = rnd.choice(folders), rnd.choice(files), rnd.choice(folders)
    try:
        match rnd.choice(["rename", "rename", "move", "chmod", "chmod folder", "write", "remove", "make", "remove folder"]):
            case "rename":
                folder.rename(home / f"n{rnd.randint(0, 3)}")
            case "move":
                file.rename(home / f"n{rnd.randint(0, 3)}")
            case "chmod":
                file.chmod(0o600)
            case "chmod folder":
                folder.chmod(0o700)
            case "write":
                with file.open("a") as out:
                    out.write("more")
            case "remove":
                file.unlink()
            case "make":
                (home / "a").mkdir()
            case "remove folder" if folder != root:
                shutil.rmtree(folder)
    except OSError:
        pass


def read(descriptor: int) -> str:
    with open(descriptor) as file:
        return file.read()


@needs_kernel_overlay
def test_the_changeset_of_a_kernel_upper_shows_what_the_mount_showed(tmp_path: Path) -> None:
    redirects = metacopies = 0
    for seed in range(60):
        rnd = random.Random(seed)
        base = tmp_path / str(seed)
        lowers = [fill(base / name, rnd) for name in ("l0", "l1")]
        upper, work, merged = (base / name for name in ("upper", "work", "merged"))
        for folder in (upper, work, merged):
            folder.mkdir()
        with mounted(lowers, upper, work, merged, redirect_dir=True, metacopy=True):
            for _ in range(12):
                change(merged, rnd)
            expected = scan(merged)
            content = {e.path: (merged / e.path).read_text() for e in expected if e.kind == Kind.FILE}
        marks = [set(x) for x in scan(upper).xattr_sets]
        redirects += sum("trusted.overlay.redirect" in m for m in marks)
        metacopies += sum("trusted.overlay.metacopy" in m for m in marks)
        stack = [(lower, scan(lower)) for lower in lowers]
        found = UpperLayer(upper, stack)
        assert text(merge([*(tree for _, tree in stack), found.tree])) == text(expected), f"seed {seed}"
        opened = found.contents(found.tree)
        for row, entry in enumerate(found.tree):
            if entry.kind == Kind.FILE:
                assert read(opened(row)) == content[entry.path], f"seed {seed}: {entry.path}"
        shutil.rmtree(base)
    assert min(redirects, metacopies) > 20  # or this tested nothing


@pytest.mark.skipif(os.geteuid() != 0, reason="trusted xattrs need root")
def test_a_redirect_to_nowhere_is_an_error_that_names_both_ends(tmp_path: Path) -> None:
    (tmp_path / "upper/d").mkdir(parents=True)
    (tmp_path / "lower").mkdir()
    os.setxattr(tmp_path / "upper/d", "trusted.overlay.redirect", b"/gone")
    with pytest.raises(InvalidLayer, match="'d': a redirect to /gone"):
        UpperLayer(tmp_path / "upper", [(tmp_path / "lower", scan(tmp_path / "lower"))])
