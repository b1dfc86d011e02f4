"""Who may import whom. The folders are the ideas, and this table is what keeps them apart."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

TOP = Path(__file__).parent.parent
PACKAGE = TOP / "overlaykit"
FILES = sorted(PACKAGE.rglob("*.py"))

# A folder, and the folders it may import; errors and lazily may be imported by all and import nothing.
MAY_IMPORT = {
    "errors": set(),
    "lazily": set(),
    "sizes": set(),
    "_ext": set(),
    "tree": {"_ext"},
    "overlay": {"tree", "_ext"},
    "oci": {"overlay", "tree"},
    "registry": {"oci"},
    "store": {"overlay", "oci", "registry", "tree"},
    "bench": {"store", "overlay", "oci", "tree", "sizes"},
    "build": {"store", "overlay", "oci", "tree"},
    "runtime": {"store", "overlay", "oci", "tree"},
    "cli": {"bench", "build", "runtime", "store", "overlay", "oci", "registry", "tree", "sizes"},
}

# A library, and the folders or files that may import it.
HOMES = {
    "numpy": {"tree", "overlay", "bench", "store/layercheck.py"},  # which compares Trees with what is on disk
    "xxhash": {"tree/fingerprint.py"},
    "zstandard": {"oci/layer.py", "oci/streams.py"},
    "isal": {"oci/layer.py", "oci/streams.py"},
    "urllib3": {"registry"},
    "click": {"cli"},
    "rich": {"cli"},
    "matplotlib": {"bench"},
}

CIMPORTS = {"libc", "posix", "cpython.exc"}  # and the headers beside the kernels


def imported(file: Path) -> Iterator[str]:
    """The full names of all that a module imports, also inside functions and for type checking only."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: line {node.lineno}: a relative import"
            assert node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def folder_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_a_module_imports_only_what_lies_below_it(file: Path) -> None:
    own = folder_of(file)
    if own in ("__init__", "__main__"):
        return  # the public names come from everywhere
    assert own in MAY_IMPORT, f"a folder that the import rule does not know: {own}"
    for name in imported(file):
        root, _, rest = name.partition(".")
        folder = rest.split(".")[0]
        if root == "overlaykit":
            # `import overlaykit` itself would load everything; only the command line is above everything.
            assert folder in MAY_IMPORT or own == "cli", f"{name} in {own}/"
            allowed = MAY_IMPORT[own] | {own, "errors", "lazily"}
            assert folder not in MAY_IMPORT or folder in allowed, f"{own}/ may not import {name}"


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_each_library_has_one_home(file: Path) -> None:
    inside = file.relative_to(PACKAGE).as_posix()
    for name in imported(file):
        homes = HOMES.get(name.split(".")[0])
        if homes is not None:
            assert inside in homes or folder_of(file) in homes, f"{inside} may not import {name}"


@pytest.mark.parametrize("kernel", sorted((TOP / "ext").glob("*.px[dy]")), ids=lambda f: f.name)
def test_kernels_share_nothing_but_headers(kernel: Path) -> None:
    headers = {header.stem for header in (TOP / "ext").glob("*.pxd")}
    for line in kernel.read_text().splitlines():
        found = re.match(r"\s*(?:from\s+([\w.]+)\s+cimport|cimport\s+([\w.]+))", line)
        if found:
            module = found[1] or found[2]
            assert module in headers | CIMPORTS or module.split(".")[0] in CIMPORTS, f"{kernel.name} cimports {module}"


def test_a_header_has_a_name_of_its_own() -> None:
    stems = [path.stem for path in (TOP / "ext").glob("*.px[dy]")]
    assert len(stems) == len(set(stems))
