"""Commands about everything: inspect, info."""

from __future__ import annotations

from dataclasses import asdict

import click

from overlaykit import __version__
from overlaykit.cli import completion
from overlaykit.cli.output import json_option, print_inspected, print_json, with_store
from overlaykit.overlay import probe
from overlaykit.store import Store


@click.command("inspect")
@click.argument("names", nargs=-1, required=True, metavar="NAME...", shell_complete=completion.both)
@click.option("--type", "kind", type=click.Choice(["container", "image", "volume"]), help="Look among these only.")
@click.option("-f", "--format", "form", metavar="TEMPLATE", help="Print each by a template, as Docker does, or json.")
@click.option("-s", "--size", is_flag=True, help="How much containers hold too: SizeRw, SizeRootFs.")
@with_store
def inspect_command(store: Store, names: tuple[str, ...], kind: str | None, form: str | None, size: bool) -> None:
    """Print all there is to know about containers, images and volumes, as JSON with Docker's field names.

    \b
    overlaykit inspect box | jq '.[0].GraphDriver.Data.LowerDir'
    overlaykit inspect box --format '{{json .GraphDriver.Data}}'
    overlaykit inspect --size box --format '{{.SizeRw}}'
    """
    ask = {
        "container": lambda name: store.container(name).inspect(size=size),
        "image": store.inspect_image,
        "volume": lambda name: store.volume(name).inspect(),
        "": lambda name: store.inspect(name, size=size),
    }
    print_inspected(names, ask[kind or ""], form)


@click.command("info")
@json_option
@with_store
def info_command(store: Store, as_json: bool) -> None:
    """Say where the store is, what is in it, and what this system can do.

    \b
    overlaykit info
    """
    features = probe(store.root / "ingest")
    facts = {
        "version": __version__,
        "root": str(store.root),
        "images": len(store.images()),
        "containers": len(store.containers()),
        "unpacked_layers": sum(1 for _ in store.snapshots.walk("committed")),
        "whiteout_format": store.snapshots.whiteouts.value,
        "system": asdict(features),
    }
    if as_json:
        print_json(facts)
    else:
        for name, value in (facts | asdict(features)).items():
            if name != "system":
                click.echo(f"{name.replace('_', ' ')}: {value}")
