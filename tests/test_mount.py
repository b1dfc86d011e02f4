"""Mounts as values, and as the kernel makes them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from kernel_overlay import needs_kernel_overlay

from overlaykit.errors import InUse, Unsupported
from overlaykit.overlay import Mount, Overlay, bind_mount, mount, mount_fuse, overlay_mount, probe, unmount


def test_lowers_are_turned_round_for_the_kernel() -> None:
    spec = overlay_mount(["/bottom", "/middle", "/top"], "/u", "/w", "/m", label="demo")
    assert spec == Mount("overlay", "demo", "/m", ("lowerdir=/top:/middle:/bottom", "upperdir=/u", "workdir=/w"))
    assert spec.command() == [
        "mount", "-t", "overlay", "demo", "-o", "lowerdir=/top:/middle:/bottom,upperdir=/u,workdir=/w", "/m"
    ]  # fmt: skip


def test_data_layers_stand_behind_two_colons() -> None:
    assert overlay_mount(["/a", "/b"], None, None, data=["/d", "/e"]).options == ("lowerdir=/b:/a::/e::/d",)


def test_options_say_what_the_overlay_was_opened_with(tmp_path: Path) -> None:
    for name in ("l", "u", "w"):
        (tmp_path / name).mkdir()
    with Overlay([tmp_path / "l"], tmp_path / "u", tmp_path / "w", userxattr=True) as overlay:
        assert "userxattr" in overlay.mount_spec("/m").options


def test_a_read_only_overlay_needs_two_lowers() -> None:
    with pytest.raises(ValueError, match="two lowers"):
        overlay_mount(["/only"], None, None)


def test_bind_mount_is_a_value_too() -> None:
    assert bind_mount("/src", "/dst", read_only=True).command() == ["mount", "/src", "-o", "rbind,ro", "/dst"]


def test_probe_leaves_nothing_behind(tmp_path: Path) -> None:
    features = probe(tmp_path)
    assert features.overlay in (True, False)
    assert list(tmp_path.iterdir()) == []


@needs_kernel_overlay
@pytest.mark.parametrize("odd", ["plain", "with:colon", "with,comma", "with\\backslash", "with space", "a:b,c\\d e"])
def test_paths_with_the_kernels_own_separators_mount(tmp_path: Path, odd: str) -> None:
    base = tmp_path / odd
    for name in ("low", "low2", "up", "work", "merged"):
        (base / name).mkdir(parents=True)
    (base / "low" / "f").write_text("below")
    with Overlay([base / "low", base / "low2"], base / "up", base / "work") as overlay:
        spec = overlay.mount_spec(base / "merged")
    mount(spec)
    try:
        assert (base / "merged" / "f").read_text() == "below"
    finally:
        unmount(base / "merged")


@needs_kernel_overlay
def test_more_options_than_a_page_mount(tmp_path: Path) -> None:
    lowers = []
    for i in range(60):
        lower = tmp_path / f"{i:03}-{'x' * 100}"
        lower.mkdir()
        (lower / f"file{i}").touch()
        lowers.append(lower)
    merged = tmp_path / "merged"
    merged.mkdir()
    spec = mount(overlay_mount(lowers, None, None, merged))
    try:
        assert len(",".join(spec.options)) > 4096
        assert len(os.listdir(merged)) == 60
    finally:
        unmount(merged)


@needs_kernel_overlay
def test_mount_hands_over_and_the_next_overlay_sees_it(tmp_path: Path) -> None:
    for name in ("l", "u", "w", "m"):
        (tmp_path / name).mkdir()
    overlay = Overlay([tmp_path / "l"], tmp_path / "u", tmp_path / "w")
    overlay.write_bytes("/ours", b"1")
    overlay.mount(tmp_path / "m")
    try:
        assert (tmp_path / "m" / "ours").read_bytes() == b"1"
        (tmp_path / "m" / "theirs").write_bytes(b"2")
        assert overlay.closed
    finally:
        unmount(tmp_path / "m")
    with Overlay([tmp_path / "l"], tmp_path / "u", tmp_path / "w") as again:
        assert sorted(again.listdir()) == ["ours", "theirs"]


@needs_kernel_overlay
def test_bind_mounts_take_their_flags(tmp_path: Path) -> None:
    for name in ("src", "dst"):
        (tmp_path / name).mkdir()
    mount(bind_mount(tmp_path / "src", tmp_path / "dst", read_only=True))
    try:
        with pytest.raises(OSError, match="Read-only"):
            (tmp_path / "dst" / "f").touch()
    finally:
        unmount(tmp_path / "dst")


@needs_kernel_overlay
def test_a_refusal_carries_the_kernels_words(tmp_path: Path) -> None:
    for name in ("l", "u", "m"):
        (tmp_path / name).mkdir()
    with pytest.raises(OSError) as caught:
        mount(overlay_mount([tmp_path / "l"], tmp_path / "u", tmp_path / "missing", tmp_path / "m"))
    assert caught.value.filename == str(tmp_path / "m") or caught.value.filename == str(tmp_path / "missing")


@needs_kernel_overlay
@pytest.mark.skipif(not shutil.which("fuse-overlayfs") or not os.path.exists("/dev/fuse"), reason="no fuse-overlayfs")
def test_fuse_overlayfs_shows_the_same(tmp_path: Path) -> None:
    for name in ("l", "u", "w", "m"):
        (tmp_path / name).mkdir()
    (tmp_path / "l" / "gone").touch()
    with Overlay([tmp_path / "l"], tmp_path / "u", tmp_path / "w") as overlay:
        overlay.unlink("gone")
        overlay.write_bytes("new", b"x")
        spec = overlay.mount_spec(tmp_path / "m")
    try:
        mount_fuse(spec)
    except Unsupported as e:
        pytest.skip(str(e))
    try:
        assert os.listdir(tmp_path / "m") == ["new"]
    finally:
        unmount(tmp_path / "m")


def test_work_and_upper_must_fit_together(tmp_path: Path) -> None:
    for name in ("l", "u", "u/inner", "w"):
        (tmp_path / name).mkdir()
    with pytest.raises(Unsupported, match="one must not be in the other"):
        Overlay([tmp_path / "l"], tmp_path / "u", tmp_path / "u" / "inner")
    other = Path("/dev/shm")
    if other.stat().st_dev != tmp_path.stat().st_dev:
        work = other / f"overlaykit-{os.getpid()}"
        work.mkdir()
        try:
            with pytest.raises(Unsupported, match="different file systems"):
                Overlay([tmp_path / "l"], tmp_path / "u", work)
        finally:
            work.rmdir()
    first = Overlay([tmp_path / "l"], tmp_path / "u", tmp_path / "w")
    with pytest.raises(InUse, match="has a writer"):
        Overlay([tmp_path / "l"], tmp_path / "u", tmp_path / "w")
    first.close()
    Overlay([tmp_path / "l"], tmp_path / "u", tmp_path / "w").close()


@needs_kernel_overlay
def test_a_mount_that_is_refused_says_which_directory_is_wrong(tmp_path: Path) -> None:
    """Whatever was missing, the error named the mount point, which was there."""
    for name in ("lower", "upper", "work", "merged", "disk"):
        (tmp_path / name).mkdir()
    (tmp_path / "file").touch()
    whole = {name: tmp_path / name for name in ("lower", "upper", "work", "merged")}

    def attempt(lowers: int = 1, **changed: Path) -> None:
        at = whole | changed
        mount(overlay_mount([at["lower"]] * lowers, at["upper"], at["work"], at["merged"]))

    for name in whole:
        for wrong, error in ((tmp_path / f"no {name}, ok", FileNotFoundError), (tmp_path / "file", NotADirectoryError)):
            with pytest.raises(error) as caught:
                attempt(**{name: wrong})
            assert caught.value.filename == str(wrong)
    for changed, words in (
        ({"work": tmp_path / "upper"}, "one must not be in the other"),
        ({"lower": tmp_path / "upper"}, "one must not be in the other"),
        ({"work": tmp_path / "disk"}, "on different file systems"),
    ):
        mount(Mount("tmpfs", "none", str(tmp_path / "disk")))
        try:
            with pytest.raises(Unsupported, match=words):
                attempt(**changed)
        finally:
            unmount(tmp_path / "disk")
    with pytest.raises(Unsupported, match="501 lower layers, and the kernel takes 500"):
        attempt(lowers=501)
