"""--format beside Docker's own: the JSON that `docker inspect` prints, through our templates and through Go's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import peers
import pytest

from overlaykit.cli.templates import InvalidTemplate, Template
from overlaykit.errors import OverlaykitError

SAME = [
    "{{.Name}}",
    "{{.State.Status}} {{.State.Running}} {{.State.Pid}}",
    "{{json .GraphDriver.Data}}",
    "{{.GraphDriver.Data}}",
    "{{json .Config.Cmd}} {{.Config.Cmd}} {{json .Config.Labels}} {{.Config.Labels}}",
    "{{json .Mounts}} {{len .Mounts}}{{json .Config.Env}}",
    "{{range .Config.Env}}[{{.}}]{{end}}",
    "{{range $i, $e := .Config.Env}}{{$i}}={{$e}};{{end}}",
    "{{range $e := .Config.Env}}{{$e}} of {{$.Name}};{{end}}",
    "{{range $name, $value := .Config.Labels}}{{$name}}={{$value}};{{else}}none{{end}}",
    "{{range .Mounts}}{{.Source}}{{else}}no mounts{{end}}",
    "{{if .State.Running}}up{{else}}down{{end}}",
    '{{if eq .State.Status "running"}}up{{else if eq .State.Status "created" "exited"}}new{{else}}other{{end}}',
    '{{if and .Name (not .State.Running)}}a{{end}}{{if or .State.Running (eq .Driver "overlay2")}}b{{end}}',
    '{{index .Config.Labels "com.example.a"}}|{{index .Config.Labels "none"}}|{{index .Config.Cmd 1}}',
    '{{(index .Config.Env 0) | upper}} {{"x" | printf "%s-%s" "y"}}',
    "{{with .Config.User}}user {{.}}{{else}}nobody{{end}}{{with $x := .Driver}}{{$x}}{{.}}{{end}}",
    '{{split .Name "o" | json}} {{lower "ABC"}} {{upper "abc"}} {{len .Name}} {{truncate .Name 3}} {{pad "x" 1 2}}|',
    "  {{- .Driver -}}  \n  {{- /* not shown */ -}} {{.Path}}",
    '{{$x := .Driver}}{{$x}}{{println $x 1}}{{print 1 2 "a"}}',
    '{{printf "%q %v %d %10s|%-10s|%%" .Driver .State.Pid 7 .Path .Path}}',
    "{{`raw \\n`}} {{true}} {{not true}}",
    "{{ne 1 2}} {{lt 1 2}} {{le 2 2}} {{gt 1 2}} {{ge 1 2}}",
    '{{json "<a&b>"}} {{json .Config.Tty}} {{json .State.Pid}} {{json nil}}',
    "no action at all",
    "{{.Id}}\\t{{.Image}}\t{{.Id}}",
    "{{.HostConfig.ShmSize}} {{.RestartCount}}",
    '{{range .Config.Cmd}}{{if eq . "b"}}B{{else}}{{.}}{{end}}{{end}}',
]
REFUSED = [
    "{{.Nope}}",
    "{{.State.Nope}}",
    "{{.Name.Nope}}",
    "{{.Name",
    "{{if .Name}}",
    "{{end}}",
    "{{else}}",
    "{{if .Name}}a{{else}}b{{else}}c{{end}}",
    "{{nosuch .Name}}",
    "{{(.Name}}",
    "{{$undefined}}",
    "{{range .Driver}}{{end}}",
    "{{index .Config.Cmd 99}}",
    '{{.Name "argument"}}',
    "{{}}",
    '{{"unclosed}}',
]


class Inspected(NamedTuple):
    docker: peers.Docker
    container: str
    facts: dict[str, Any]


@pytest.fixture(scope="module")
def inspected(docker: peers.Docker, small_rootfs: Path) -> Iterator[Inspected]:
    docker("import", small_rootfs, "small:format")
    options = ["--label", "com.example.b=2", "--label", "com.example.a=<1>", "--env", "A=1", "--env", "B=x y"]
    container = docker("create", *options, "small:format", "a", "b", "c").strip()
    yield Inspected(docker, container, json.loads(docker("inspect", container))[0])
    docker("rm", container)


@pytest.mark.parametrize("template", SAME)
def test_a_template_gives_what_docker_gives(template: str, inspected: Inspected) -> None:
    expected = inspected.docker("inspect", "--format", template, inspected.container)
    assert Template(template).render(inspected.facts) + "\n" == expected


@pytest.mark.parametrize("template", REFUSED)
def test_what_docker_refuses_is_refused(template: str, inspected: Inspected) -> None:
    assert inspected.docker.run("inspect", "--format", template, inspected.container, check=False).returncode != 0
    with pytest.raises(OverlaykitError, match=r"^template: "):
        Template(template).render(inspected.facts)


@pytest.mark.parametrize("word", ["define", "template", "block", "break"])
def test_what_is_beyond_the_subset_is_refused_by_name(word: str) -> None:
    with pytest.raises(InvalidTemplate, match=f"{word} is not supported"):
        Template(f'{{{{{word} "x"}}}}')


def test_blocks_nested_without_end_are_no_traceback() -> None:
    with pytest.raises(InvalidTemplate, match="nested too deep"):
        Template("{{if 1}}" * 5000)


def test_a_header_names_the_fields() -> None:
    titles = {"ID": "IMAGE ID", "Size": "SIZE"}
    assert Template("{{.ID}}\t{{upper .Size}}\t{{json .ID}}").header(titles) == "IMAGE ID\tSIZE\tIMAGE ID"
