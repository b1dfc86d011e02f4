"""What benchmarks share: input by size, made once a session, in memory where there is room; how results are noted.

pytest benchmarks --benchmark-only                      measures: 1,000, 100,000 and 1,000,000 entries
pytest benchmarks --benchmark-only --sizes 1000,100000  only these
pytest                                                  runs each once on 1,000 entries, to see that it works
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import measuring
import pytest
import synthetic

sys.path.append(str(Path(__file__).parent.parent / "tests"))  # the references live there

SIZES = (1_000, 100_000, 1_000_000)
SMOKE = (1_000,)
IN_MEMORY = Path("/dev/shm")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--sizes", help="input sizes of the benchmarks (entries), with commas: 1000,100000")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    # pyproject.toml disables benchmarks, so that plain `pytest` is quick; who asks for nothing else means to measure.
    config.addinivalue_line("markers", "at_most(size): input larger than this would say nothing more")
    if config.getoption("benchmark_only", default=False):
        config.option.benchmark_enable = True


def measures(config: pytest.Config) -> bool:
    return bool(config.getoption("benchmark_enable", default=False))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "size" in metafunc.fixturenames:
        chosen = metafunc.config.getoption("--sizes")
        sizes = [int(s) for s in chosen.split(",")] if chosen else SIZES if measures(metafunc.config) else SMOKE
        most = metafunc.definition.get_closest_marker("at_most")
        metafunc.parametrize("size", [s for s in sizes if most is None or s <= most.args[0]], scope="session")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One size after another, so that the input of only one is there at a time."""
    mine = [item for item in items if item.path.name.startswith("bench_")]
    others = [item for item in items if item not in set(mine)]
    mine.sort(key=lambda item: item.callspec.params.get("size", 0) if hasattr(item, "callspec") else 0)
    items[:] = others + mine


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if measuring.bars:
        terminalreporter.section("bars: medians of interleaved rounds")
        for line in measuring.bars:
            terminalreporter.write_line(line)


# --- input --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def scratch() -> Iterator[Path]:
    """A directory in memory if there is one, removed at the end."""
    place = IN_MEMORY if os.access(IN_MEMORY, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="overlaykit-bench-", dir=place) as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def stack(size: int, scratch: Path) -> Iterator[synthetic.Stack]:
    """Ten layers with `size` entries in all."""
    folder = scratch / f"lists-{size}"
    folder.mkdir()
    yield synthetic.stack(size, folder)
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def files(size: int, scratch: Path) -> Iterator[synthetic.Files]:
    """Files with content: `size` of them, but no more than 100,000 (1 GB); beyond that each is used several times."""
    folder = scratch / f"files-{size}"
    yield synthetic.files(min(size, 100_000), folder)
    shutil.rmtree(folder)
