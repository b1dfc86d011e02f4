"""How much a tree holds, as `ls -l` and Docker count it: what files and symlinks say they are long, and no blocks."""

from __future__ import annotations

import numpy as np

from overlaykit.tree.table import Kind, Tree


def apparent_size(tree: Tree) -> int:
    """Bytes of content of all files, one with several names once, and of the targets of symlinks. Directories, whiteouts
    and devices count nothing. As moby's pkg/directory does it."""
    _, first = np.unique(tree.hardlink, return_index=True)
    once = tree.hardlink < 0
    once[first] = True
    files = int(tree.size[once & (tree.kind == Kind.FILE)].sum())
    targets = tree.link[once & (tree.kind == Kind.SYMLINK)]
    return files + int(tree.links.lengths[targets[targets >= 0]].sum())
