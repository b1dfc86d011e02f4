"""Real peers for the tests: docker, podman, skopeo, umoci and Debian's tools, each on roots of its own.

A peer that is not there skips the test and says why. In CI (CI=true) it fails instead: there a skip would hide that
nothing was compared. Nothing here touches a daemon, a store or a configuration that the machine has already.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

import pytest

StrPath = str | os.PathLike[str]
IN_CI = os.environ.get("CI", "") not in ("", "0", "false")
ROOM = 3 << 30  # bytes a daemon's folder should have: three unpacked bookworms and their archives


def unavailable(reason: str) -> NoReturn:
    """Skip the running test, or fail it in CI, where everything has to be there."""
    if IN_CI:
        pytest.fail(f"CI must have everything that tests need: {reason}", pytrace=False)
    pytest.skip(reason)


def peer(name: str) -> str:
    """The path of the program `name`, also from the sbin folders; without it the test is skipped (in CI: fails)."""
    found = shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/local/sbin:/usr/sbin:/sbin")
    if found is None:
        unavailable(f"{name} is not installed")
    return found


def need_root(why: str) -> None:
    """Go on as root only."""
    if os.geteuid() != 0:
        unavailable(f"root only: {why}")


def run(
    *argv: StrPath,
    check: bool = True,
    env: Mapping[str, str] | None = None,
    stdin: StrPath | None = None,
    timeout: float = 900,
) -> subprocess.CompletedProcess[str]:
    """The finished program argv[0] (looked up by `peer`), its output as text; AssertionError with both if it failed."""
    command = [peer(os.fspath(argv[0])), *map(os.fspath, argv[1:])]
    # A sanitizer that is loaded into this process is none of the peer's business.
    inherited = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    with open(stdin or os.devnull, "rb") as source:
        done = subprocess.run(
            command,
            stdin=source,
            capture_output=True,
            text=True,
            errors="surrogateescape",
            env=inherited | dict(env or {}),
            timeout=timeout,
            check=False,
        )
    if check and done.returncode:
        raise AssertionError(f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
    return done


# --- places -----------------------------------------------------------------------------------------------------------


def takes_overlay(folder: Path) -> bool:
    """Whether the kernel's overlay accepts `folder` for its upper and work."""
    with tempfile.TemporaryDirectory(dir=folder) as probe:
        for name in ("lower", "upper", "work", "merged"):
            Path(probe, name).mkdir()
        options = ",".join(f"{kind}dir={probe}/{kind}" for kind in ("lower", "upper", "work"))
        mount = ["mount", "-t", "overlay", "overlay", "-o", options, f"{probe}/merged"]
        if subprocess.run(mount, capture_output=True, check=False).returncode:
            return False
        subprocess.run(["umount", f"{probe}/merged"], check=True)
        return True


@contextmanager
def new_folder(parent: Path, label: str) -> Iterator[Path]:
    """A new folder whose path podman takes in a reference: mkdtemp's names may end with "_", which no reference does."""
    folder = parent / f"overlaykit-{label}-{secrets.token_hex(4)}"
    folder.mkdir(0o700)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


@contextmanager
def overlay_place(label: str) -> Iterator[Path]:
    """A new folder that can hold a daemon's overlay storage, in memory if there is room; gone afterwards."""
    need_root("overlay mounts of a peer")
    for parent in (Path("/dev/shm"), Path(tempfile.gettempdir())):
        if parent.is_dir() and shutil.disk_usage(parent).free > ROOM and takes_overlay(parent):
            break
    else:
        unavailable("no folder with 3 GiB free that the kernel's overlay takes as upper")
    with new_folder(parent, label) as place:
        try:
            yield place
        finally:
            end_processes(place)  # of a mount that is gone too: its program may have something to write yet
            unmount_below(place)


def unmount_below(place: Path) -> None:
    """Take away every mount at or under `place`, the innermost first."""
    with open("/proc/self/mountinfo") as table:
        targets = [line.split()[4].encode().decode("unicode_escape") for line in table]
    for target in reversed(targets):
        if target == str(place) or target.startswith(f"{place}/"):
            subprocess.run(["umount", "-l", target], capture_output=True, check=False)


def end_processes(place: Path, timeout: float = 60) -> None:
    """Kill what was left behind: every process whose command line names something under `place`."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        left = []
        for entry in Path("/proc").iterdir():
            # A process can end between the listing and the reading.
            with suppress(OSError):
                if entry.name.isdigit() and f"{place}/".encode() in (entry / "cmdline").read_bytes():
                    left.append(int(entry.name))
        if not left:
            return
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


# --- peers with a store of their own ----------------------------------------------------------------------------------


class Docker:
    """A dockerd of our own with the overlay2 driver; `docker("run", ...)` gives what the command printed."""

    def __init__(self, place: Path, *, start_timeout: float = 300) -> None:
        self.place, self.data_root, self.log = place, place / "data", place / "log"
        config = place / "daemon.json"
        config.write_text("{}")  # or dockerd would read the machine's
        command = [
            # Also when pytest is killed: nobody else would end it.
            *(peer("setpriv"), "--pdeathsig", "TERM", peer("dockerd"), "--config-file", config),
            *("--data-root", self.data_root, "--exec-root", place / "exec", "--pidfile", place / "pid"),
            *("--host", f"unix://{place}/sock", "--storage-driver", "overlay2"),
            # Containers run with --network none: no bridge, no firewall rules, no sysctls on the machine.
            *("--bridge=none", "--iptables=false", "--ip-forward=false", "--ip-masq=false"),
        ]
        with self.log.open("wb") as log:
            self.daemon = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self.env = {"DOCKER_HOST": f"unix://{place}/sock", "DOCKER_CONFIG": str(place / "client")}
        deadline = time.monotonic() + start_timeout
        while run("docker", "version", check=False, env=self.env).returncode:
            if self.daemon.poll() is not None or time.monotonic() > deadline:
                self.stop()
                unavailable(f"dockerd does not start here: {self.log.read_text(errors='replace')[-600:]}")
            time.sleep(0.1)

    def __call__(self, *args: StrPath, check: bool = True, stdin: StrPath | None = None) -> str:
        return self.run(*args, check=check, stdin=stdin).stdout

    def run(self, *args: StrPath, check: bool = True, stdin: StrPath | None = None) -> subprocess.CompletedProcess[str]:
        """The finished docker command, for its exit code and stderr too."""
        return run("docker", *args, check=check, stdin=stdin, env=self.env)

    @contextmanager
    def tree(self, image: str) -> Iterator[Path]:
        """The tree of an image as Docker unpacked it. No container's: there a layer in between adds names."""
        data = json.loads(self("image", "inspect", "--format", "{{json .GraphDriver.Data}}", image))
        layers = [data["UpperDir"], *filter(None, data.get("LowerDir", "").split(":"))]
        if len(layers) == 1:
            yield Path(layers[0])
            return
        target = Path(tempfile.mkdtemp(dir=self.place))
        run("mount", "-t", "overlay", "overlay", "-o", f"ro,lowerdir={':'.join(layers)}", target)
        try:
            yield target
        finally:
            run("umount", target)

    def stop(self) -> None:
        """End dockerd and every container. Safe to call twice."""
        # dockerd would give each of them ten seconds to end by itself.
        if running := self("ps", "--quiet", check=False).split():
            self("kill", *running, check=False)
        self.daemon.terminate()
        try:
            self.daemon.wait(30)
        except subprocess.TimeoutExpired:
            self.daemon.kill()
            self.daemon.wait()


class Podman:
    """podman on a store of its own; `podman("load", ...)` gives what the command printed. settings: --storage-opt's."""

    def __init__(self, place: Path, *settings: str) -> None:
        self.place = place
        self.options = [
            *("--root", place / "root", "--runroot", place / "run", "--tmpdir", place / "tmp"),
            *("--storage-driver", "overlay", "--cgroup-manager", "cgroupfs", "--events-backend", "none"),
            *(f"--storage-opt={setting}" for setting in settings),
        ]
        # Else all podmans of root share one lock file, and each new one frees what the others had taken of it.
        config = place / "containers.conf"
        config.write_text('[engine]\nlock_type = "file"\n')
        self.env = {"CONTAINERS_CONF": str(config)}
        self("info")

    def __call__(self, *args: StrPath, check: bool = True, stdin: StrPath | None = None) -> str:
        return run("podman", *self.options, *args, check=check, stdin=stdin, env=self.env).stdout

    @contextmanager
    def tree(self, image: str) -> Iterator[Path]:
        """The tree of an image as podman unpacked it."""
        try:
            yield Path(self("image", "mount", image).strip())
        finally:
            self("image", "umount", image)


@contextmanager
def docker_daemon() -> Iterator[Docker]:
    """A running dockerd; processes, mounts and files are gone afterwards."""
    peer("docker")
    with overlay_place("docker") as place:
        docker = Docker(place)
        try:
            yield docker
        finally:
            docker.stop()


@contextmanager
def podman_store(*settings: str) -> Iterator[Podman]:
    """podman with an empty store; mounts and files are gone afterwards. settings: what its --storage-opt takes."""
    peer("podman")
    with overlay_place("podman") as place:
        yield Podman(place, *settings)


# --- peers without one ------------------------------------------------------------------------------------------------


def skopeo_copy(source: str, target: str, *options: str) -> None:
    """skopeo copy SOURCE TARGET, in skopeo's transport:path notation."""
    run("skopeo", "--insecure-policy", "copy", "--quiet", *options, source, target)


def umoci_unpack(layout: StrPath, tag: str, bundle: Path) -> Path:
    """The root filesystem that umoci unpacks from LAYOUT:TAG (an OCI directory) into the new folder `bundle`."""
    run("umoci", "unpack", "--image", f"{os.fspath(layout)}:{tag}", bundle)
    return bundle / "rootfs"


QUOTA_INIT = """\
#!/bin/sh
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t tmpfs tmp /mnt
{busybox} insmod {modules}/$(uname -r)/kernel/fs/overlayfs/overlay.ko
mkdir /mnt/tmp /mnt/xfs
mount -t xfs -o prjquota /dev/ubda /mnt/xfs || halt -f
export QUOTA_PLACE=/mnt/xfs TMPDIR=/mnt/tmp PYTHONPATH={path} PATH={programs} HOME=/mnt
cd {folder}
{python} -m pytest -q -p no:cacheprovider --color=no {file} 2>&1
echo "finished with $?"
umount /mnt/xfs
halt -f
"""
UML_MODULES = "/usr/lib/uml/modules"


def with_quota(file: Path, scratch: Path) -> None:
    """Run the tests in `file` on xfs with project quota, which few kernels have: in user-mode Linux, a kernel that is a
    program, on this machine's files. AssertionError with what it printed if one fails."""
    image, init = scratch / "xfs", scratch / "init"
    with image.open("wb") as out:
        out.truncate(512 << 20)
    run("mkfs.xfs", "-q", image)
    words = {"busybox": peer("busybox"), "modules": UML_MODULES, "python": sys.executable, "file": file.name}
    words |= {"folder": file.parent, "path": os.pathsep.join([str(file.parent.parent), os.environ.get("PYTHONPATH", "")])}
    init.write_text(QUOTA_INIT.format(**words, programs=os.environ["PATH"]))
    init.chmod(0o755)
    kernel = ("linux.uml", "mem=768M", f"ubd0={image}", "root=none", "rootfstype=hostfs", "rootflags=/", "rw")
    # Also when pytest is killed: nobody else would end it.
    done = run("setpriv", "--pdeathsig", "KILL", *kernel, f"init={init}", "con=null", "con0=null,fd:1", "quiet", check=False)
    if "finished with" not in done.stdout:
        unavailable(f"user-mode Linux does not start here: {(done.stdout + done.stderr)[-600:]}")
    assert "finished with 0" in done.stdout, done.stdout + done.stderr


def debian_rootfs(tar: Path, *, suite: str = "bookworm") -> None:
    """Write Debian's smallest root filesystem to `tar`; the test is skipped where the packages cannot be had."""
    need_root("mmdebstrap keeps owners")
    peer("mmdebstrap")
    part = tar.with_name(f"{tar.stem}.part.tar")  # mmdebstrap takes the form from the suffix
    done = run("mmdebstrap", "--quiet", "--variant=minbase", suite, part, check=False, timeout=900)
    if done.returncode:
        unavailable(f"mmdebstrap: {done.stderr[-600:]}")
    part.rename(tar)
