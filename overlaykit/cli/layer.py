"""Commands about layers: diff, blame, waste, squash, rebase. Layers are counted from the bottom, which is number 0."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from dataclasses import asdict
from typing import Any

import click

from overlaykit.cli import completion
from overlaykit.cli.image import compression_option, facts
from overlaykit.cli.output import json_option, no_trunc_option, print_json, print_table, shortened, shown, size, with_store
from overlaykit.oci import History
from overlaykit.store import Store, StoredImage
from overlaykit.tree import Change
from overlaykit.tree.blame import Reason, Waste
from overlaykit.tree.table import first_names

CREATED_BY = 45  # characters


@click.command("diff")
@click.argument("one", metavar="CONTAINER|A", shell_complete=completion.both)
@click.argument("other", metavar="[B]", required=False, shell_complete=completion.both)
@click.option("--content", is_flag=True, help="Read all files of one size, whatever their times say.")
@click.option("--exit-code", is_flag=True, help="Exit with 1 if there is a difference.")
@json_option
@with_store
def diff_command(store: Store, one: str, other: str | None, content: bool, exit_code: bool, as_json: bool) -> None:
    """List what a container changed against its image, or what is different between A and B: A added, C changed, D deleted.

    A and B: a container, an image, IMAGE#N (the image up to its layer N, 0 at the bottom), a layer by its digest, a
    directory, or the tar of an image or a layer. IMAGE#N or IMAGE#N..M alone is what these layers change of those below.
    Files are read only where size and time cannot tell. With --json also why, and how many bytes before and after.

    \b
    overlaykit diff box
    overlaykit diff debian:12.1 debian:12.2
    overlaykit diff mine:1#2..4
    overlaykit diff mine:1 ./rootfs --json | jq '[.[].size_after] | add'
    """
    whole = other is not None or "#" in one
    found = store.compare(one, other, content=content) if whole else store.container(one).diff()
    if as_json:
        print_json([change._asdict() for change in found])
    elif whole:
        _print_changes(found)
    else:
        for change in found:
            click.echo(f"{change.kind} {shown(change.path)}")
    if exit_code and found:
        raise click.exceptions.Exit(1)


def _print_changes(found: list[Change]) -> None:
    if not found:
        return
    rows = [
        [
            change.kind,
            "" if change.kind == "A" else size(change.size_before),
            "" if change.kind == "D" else size(change.size_after),
            ",".join(change.reasons),
            change.path,
        ]
        for change in found
    ]
    print_table(["", "BEFORE", "AFTER", "WHAT", "PATH"], rows)
    kinds = Counter[str](change.kind for change in found)
    grown = sum(change.size_after - change.size_before for change in found)
    words = ", ".join(f"{kinds[kind]} {word}" for kind, word in (("A", "added"), ("C", "changed"), ("D", "deleted")))
    click.echo(f"{words}: {'-' if grown < 0 else '+'}{size(abs(grown))}")


@click.command("blame")
@click.argument("image", shell_complete=completion.images)
@click.argument("path")
@no_trunc_option
@json_option
@with_store
def blame_command(store: Store, image: str, path: str, no_trunc: bool, as_json: bool) -> None:
    """Show which layers of an image add, change or take away PATH, and the step behind each; the last one decides.

    \b
    overlaykit blame debian:bookworm /etc/passwd
    """
    found = store.image(image).blame(path)
    if as_json:
        print_json(
            [
                {
                    "layer": origin.layer,
                    "verb": origin.verb.value,
                    "by": f"/{origin.by}",
                    "diff_id": origin.diff_id,
                    "created": origin.history.created if origin.history else None,
                    "created_by": origin.history.created_by if origin.history else None,
                    "comment": origin.history.comment if origin.history else None,
                }
                for origin in found
            ]
        )
        return
    rows = [
        [
            str(origin.layer),
            origin.verb.value,
            f"/{origin.by}",
            origin.diff_id if no_trunc else origin.diff_id.short,
            _step(origin.history, no_trunc),
        ]
        for origin in found
    ]
    print_table(["LAYER", "DOES", "BY", "DIFF ID", "CREATED BY"], rows)


def _step(history: History | None, no_trunc: bool = False) -> str:
    """What made a layer, in one line."""
    text = " ".join(((history and (history.created_by or history.comment)) or "").split())
    return shortened(text, CREATED_BY, no_trunc=no_trunc)


@click.command("waste")
@click.argument("image", shell_complete=completion.images)
@click.option("-n", "--top", type=click.IntRange(min=0), default=20, show_default=True, help="Show that many paths.")
@json_option
@with_store
def waste_command(store: Store, image: str, top: int, as_json: bool) -> None:
    """Show which bytes of an image's layers no container sees, by layer and by path.

    A file is wasted where an upper layer removed it, changed it, or has it again with only its mode, owner or times changed
    (ATTRIBUTES). Sizes are of the content, not compressed.

    \b
    overlaykit waste mine:1
    overlaykit waste --json mine:1 | jq .wasted
    """
    found = store.image(image)
    wasted = found.waste()
    layers = _layer_facts(found, wasted)
    if as_json:
        print_json(
            {
                "size": sum(layer["size"] for layer in layers),
                "wasted": sum(each.size for each in wasted),
                "layers": layers,
                "files": [{**asdict(each), "path": f"/{each.path}", "reason": each.reason.value} for each in wasted],
            }
        )
        return
    heads = [reason.value.upper() for reason in Reason]
    rows = [
        [
            str(layer["layer"]),
            *(size(layer[name]) for name in ("size", "wasted", *(reason.value for reason in Reason))),
            _step(found.layer_history[layer["layer"]]),
        ]
        for layer in layers
    ]
    totals = [size(sum(layer[name] for layer in layers)) for name in ("size", "wasted", *(r.value for r in Reason))]
    print_table(["LAYER", "SIZE", "WASTED", *heads, "CREATED BY"], [*rows, ["total", *totals, ""]])
    if wasted and top:
        click.echo()
        print_table(["WASTED", "TIMES", "WHY", "PATH"], _path_rows(wasted)[:top])


def _layer_facts(image: StoredImage, wasted: list[Waste]) -> list[dict[str, Any]]:
    """Of each layer: the bytes of its files, and those that nobody sees, in all and by reason."""
    facts = []
    for number, layer in enumerate(image.layers):
        tree = layer.tree()
        mine = [each for each in wasted if each.layer == number]
        by_reason = {r.value: sum(each.size for each in mine if each.reason is r) for r in Reason}
        whole = sum(int(tree.size[row]) for row in set(first_names(tree).tolist()))
        row = {"layer": number, "diff_id": layer.diff_id, "size": whole}
        facts.append({**row, "wasted": sum(by_reason.values()), **by_reason})
    return facts


def _path_rows(wasted: list[Waste]) -> list[list[str]]:
    """Rows of a table, the path that wastes most first."""
    by_path: dict[str, list[Waste]] = defaultdict(list)
    for each in wasted:
        by_path[each.path].append(each)
    ranked = sorted(by_path.items(), key=lambda item: (-sum(each.size for each in item[1]), item[0]))
    return [
        [size(sum(each.size for each in found)), str(len(found)), ", ".join(dict.fromkeys(map(_why, found))), f"/{path}"]
        for path, found in ranked
    ]


def _why(each: Waste) -> str:
    what = "/".join(each.changed) if each.changed else each.reason.value
    return f"{what} in {each.hidden_by}"


@click.command("squash")
@click.argument("image", shell_complete=completion.images)
@click.argument("layers", metavar="N..M")
@click.argument("name", required=False)
@click.option("-m", "--message", help="What the history says about the new layer.")
@compression_option
@json_option
@with_store
def squash_command(
    store: Store, image: str, layers: str, name: str | None, message: str | None, compression: str, as_json: bool
) -> None:
    """Make an image in which layers N to M of IMAGE are one. Those below and above stay as they are, and stay shared.

    Layers are counted from 0, the lowest; without M it is the topmost. Prints the new image's id.

    \b
    overlaykit squash mine:1 1.. mine:small
    """
    found = store.image(image)
    asked = re.fullmatch(r"(\d+)\.\.(\d*)", layers)
    if asked is None:
        raise click.UsageError(f"{layers}: a range of layers, such as 1..3 or 1..")
    stop = int(asked[2]) + 1 if asked[2] else len(found.layers)
    squashed = store.squash(found, int(asked[1]), stop, name, message=message, compression=compression)
    print_json(facts(squashed)) if as_json else click.echo(squashed.id)


@click.command("rebase")
@click.argument("image", shell_complete=completion.images)
@click.argument("old", metavar="OLD_BASE", shell_complete=completion.images)
@click.argument("new", metavar="NEW_BASE", shell_complete=completion.images)
@click.argument("name", required=False)
@json_option
@with_store
def rebase_command(store: Store, image: str, old: str, new: str, name: str | None, as_json: bool) -> None:
    """Make an image of the layers that IMAGE has above OLD_BASE, on NEW_BASE. No layer is copied.

    The layers are taken as they are: see with `overlaykit diff OLD_BASE NEW_BASE` what they will meet. Prints the id.

    \b
    overlaykit rebase mine:1 debian:12.1 debian:12.2 mine:2
    """
    rebased = store.rebase(image, old, new, name)
    print_json(facts(rebased)) if as_json else click.echo(rebased.id)
