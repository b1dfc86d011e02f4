"""What results depend on: processor, kernel, memory, file system, versions."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any


def filesystem(place: Path) -> str:
    """The type of the file system of `place`: "tmpfs", "ext4"; proc(5), mountinfo."""
    place, best, kind = Path(os.path.realpath(place)), "", "unknown"
    for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
        front, _, back = line.partition(" - ")
        target = re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), front.split()[4])
        if place.is_relative_to(target) and len(target) >= len(best):
            best, kind = target, back.split()[0]
    return kind


def machine(place: Path) -> dict[str, Any]:
    """The facts, for the head of a report."""
    cpu = re.search(r"^(?:model name|Hardware|cpu)\s*: *(.+)", Path("/proc/cpuinfo").read_text(), re.M)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": cpu[1] if cpu else platform.machine(),
        "cpus": len(os.sched_getaffinity(0)),
        "memory": memory,
        "kernel": platform.release(),
        "filesystem": filesystem(place),
        "user": "root" if os.geteuid() == 0 else "not root",
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("docker", "fuse-overlayfs", "fio", "git", "cc") if shutil.which(name)},
    }


def summary(facts: dict[str, Any]) -> str:
    """The facts that matter most in one line; those of somebody else's file may be missing."""
    told = {name: facts.get(name, "unknown") for name in ("cpus", "cpu", "kernel", "filesystem", "user", "python")}
    return "{cpus} x {cpu}, Linux {kernel}, {filesystem}, {user}, Python {python}".format_map(told)


def version(program: str) -> str:
    """The first line of `program --version` with a digit in it."""
    run = subprocess.run([program, "--version"], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    return next((line.strip() for line in run.stdout.splitlines() if re.search(r"\d", line)), "unknown")
