"""What writing to a container's writable layer costs, next to a volume: workloads, targets, and a way to measure them.

    with bench.Bench("/dev/shm") as suite:
        results = suite.run(targets=[*bench.TARGETS, mine])

A Workload is a loop over a few file operations (Files); a Target makes an empty writable layer over given lower files, in
whatever way it has. Both are plain values, so that others can add theirs.
"""

from overlaykit.bench.files import Files, in_process, on_host
from overlaykit.bench.method import Missing, Result
from overlaykit.bench.results import compare, load, save
from overlaykit.bench.suite import Bench
from overlaykit.bench.tables import tables
from overlaykit.bench.targets import HOST, TARGETS, Scene, Target
from overlaykit.bench.workload import Workload
from overlaykit.bench.workloads import WORKLOADS

__all__ = [
    "HOST",
    "TARGETS",
    "WORKLOADS",
    "Bench",
    "Files",
    "Missing",
    "Result",
    "Scene",
    "Target",
    "Workload",
    "compare",
    "in_process",
    "load",
    "on_host",
    "save",
    "tables",
]
