"""`ps` in all its forms: whatever is asked for, and however, the same containers and the same words."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import ours
import pytest
import rootfs

from overlaykit import cli
from overlaykit.cli.output import Row, ago
from overlaykit.cli.templates import Template
from overlaykit.errors import OverlaykitError

FIELDS = ("Command", "CreatedAt", "ID", "Image", "Labels", "Names", "RunningFor", "State", "Status")
OPTIONS = ("", "--no-trunc", "--size", "--no-trunc --size", "--filter label=stage", "--filter name=second", "--filter id=x")
Ps = Callable[..., list[str]]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with three containers, made so long ago that their age stays the same for the whole test."""
    place = tmp_path_factory.mktemp("ps")
    store = place / "store"
    rootfs.write(place / "rootfs.tar")
    ours.command(store, "import", place / "rootfs.tar", "base:1", "-c", 'ENTRYPOINT ["/bin/sh"]', "-c", 'CMD ["-c", "true"]')
    ours.command(store, "create", "--name", "first", "base:1")
    ours.command(store, "create", "--name", "second", "-l", "stage=test", "-l", "a", "base:1", "naïve and quite", "long")
    ours.command(store, "create", "--name", "third", "-l", "stage=other", "--entrypoint", "", "base:1")
    ours.command(store, "put", "second", place / "rootfs.tar", "/var/log/more")
    with closing(sqlite3.connect(store / "store.db")) as db, db:
        for number, name in enumerate(("first", "second", "third")):
            created = time.time_ns() - int((10 - 3 * number) * 3600.5 * 1e9)
            db.execute("UPDATE containers SET created = ? WHERE name = ?", (created, name))
    return store


@pytest.fixture
def ps(root: Path, capsys: pytest.CaptureFixture[str]) -> Ps:
    """The lines that `ps` prints."""

    def ps(*options: str) -> list[str]:
        assert cli.main(["--root", str(root), "ps", *options]) == 0
        return capsys.readouterr().out.splitlines()

    return ps


@pytest.mark.parametrize("options", OPTIONS)
def test_all_forms_say_the_same(options: str, ps: Ps) -> None:
    given = options.split()
    fields = (*FIELDS, "Size") if "--size" in given else FIELDS
    whole = [json.loads(line) for line in ps("--format", "json", *given)]
    assert ps("--format", "{{json .}}", *given) == ps("--format", "json", *given)
    for field in fields:
        assert ps("--format", f"{{{{.{field}}}}}", *given) == [each[field] for each in whole], field
    together = "|".join(f"{{{{.{field}}}}}" for field in fields)
    assert ps("--format", together, *given) == ["|".join(each[field] for field in fields) for each in whole]
    usual = ["ID", "Image", "Command", "RunningFor", "Names", *(["Size"] if "--size" in given else [])]
    table = "table " + r"\t".join(f"{{{{.{field}}}}}" for field in usual)
    header, *rows = ps(*given)
    assert ps("--format", table, *given) == ps("--all", "--format", "table", *given) == [header, *rows]
    titles = ("CONTAINER ID", "IMAGE", "COMMAND", "CREATED", "NAMES", "SIZE")
    starts = [header.index(title) for title in titles[: len(usual)]]
    cells = [[row[a:b].rstrip() for a, b in zip(starts, [*starts[1:], None], strict=True)] for row in rows]
    assert cells == [[each[field] for field in usual] for each in whole]
    assert ps("--quiet", *given) == [each["ID"] for each in whole]
    told = json.loads("\n".join(ps("--json", *given)))
    assert [(each["name"], each["image"]) for each in told] == [(each["Names"], each["Image"]) for each in whole]
    assert [("size_rw" in each) for each in told] == ["--size" in given] * len(told)


def test_it_says_what_inspect_says(root: Path, ps: Ps) -> None:
    names = ps("--format", "{{.Names}}")
    assert names == ["third", "second", "first"]
    told = json.loads(ours.command(root, "inspect", "--size", *names).stdout)
    lines = ps("--no-trunc", "--format", '{{.ID}}|{{.Command}}|{{.CreatedAt}}|{{.Labels}}|{{.Label "stage"}}')
    for line, each in zip(lines, told, strict=True):
        config, created = each["Config"], datetime.fromisoformat(each["Created"])
        labels = config.get("Labels") or {}
        command = " ".join([*(config.get("Entrypoint") or ()), *(config.get("Cmd") or ())])
        pairs = ",".join(f"{key}={value}" for key, value in sorted(labels.items()))
        assert line == "|".join(
            [each["Id"], f'"{command}"', f"{created:%Y-%m-%d %H:%M:%S} +0000 UTC", pairs, labels.get("stage", "")]
        )
    assert ps("--format", "{{.RunningFor}}") == ["4 hours ago", "7 hours ago", "10 hours ago"]
    assert ps("--format", "{{.Command}}")[1] == '"/bin/sh naïve and q…"'
    held = json.loads("\n".join(ps("--size", "--json")))
    assert [(each["size_rw"], each["size_root_fs"]) for each in held] == [(e["SizeRw"], e["SizeRootFs"]) for e in told]


def test_a_template_that_fails_prints_nothing(root: Path) -> None:
    """As with Docker: half of a list would look like all of it."""
    done = ours.command(root, "ps", "--format", '{{.Names}}{{if eq .Names "first"}}{{.Nope}}{{end}}', check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert "there is no .Nope" in done.stderr


def test_a_field_that_cannot_be_worked_out_is_no_field_that_is_not_there() -> None:
    row = Row({}, {"There": lambda value: value["x"]})
    with pytest.raises(KeyError, match="x"):
        Template("{{.There}}").render(row)
    with pytest.raises(OverlaykitError, match=r"there is no \.Other in <\.Other>"):
        Template("{{.Other}}").render(row)
    with pytest.raises(OverlaykitError, match=r"there is no \.Deep in <\.A\.Deep>"):
        Template("{{.A.Deep}}").render({"A": "text"})


def test_an_age_is_told_in_dockers_words() -> None:
    """go-units, HumanDuration: hours are rounded, all others cut off."""
    hour, day = 3600, 86400
    said = {45.9 * 60: "45 minutes", 46 * 60: "About an hour", 1.4 * hour: "About an hour", 1.6 * hour: "2 hours"}
    said |= {47.4 * hour: "47 hours", 47.6 * hour: "48 hours", 2.9 * day: "2 days", 13.9 * day: "13 days"}
    said |= {14.1 * day: "2 weeks", 59 * day: "8 weeks", 61 * day: "2 months", 729 * day: "24 months", 731 * day: "2 years"}
    now = datetime.now(UTC)
    for seconds, words in said.items():
        assert ago(now - timedelta(seconds=seconds)) == f"{words} ago", seconds
