"""Commands that look after the store: df, fsck, gc, prune."""

from __future__ import annotations

from dataclasses import asdict

import click

from overlaykit.cli.force import confirmed
from overlaykit.cli.output import json_option, print_json, print_table, shown, size, with_store
from overlaykit.store import Store


@click.command("df")
@json_option
@with_store
def df_command(store: Store, as_json: bool) -> None:
    """Show what the store takes on disk: shared, exclusive, and reclaimable with `gc`.

    Hard links and clones count once, so the sizes add up to the whole. With --json each blob, layer, container
    and volume.

    \b
    overlaykit df
    """
    used = store.usage()
    if as_json:
        totals = {name: getattr(used, name) for name in ("total", "shared", "exclusive", "reclaimable")}
        print_json({**totals, "items": [asdict(item) for item in used.items]})
        return
    rows = []
    for kind in ("blob", "layer", "container", "volume", "other"):
        items = [item for item in used.items if item.kind == kind]
        parts = [sum(item.size for item in items if test(item.users)) for test in (_several, _one, _none)]
        rows.append([kind, str(len(items)), size(used.of(kind)), *map(size, parts)])
    rows.append(["total", "", size(used.total), size(used.shared), size(used.exclusive), size(used.reclaimable)])
    print_table(["TYPE", "COUNT", "SIZE", "SHARED", "EXCLUSIVE", "RECLAIMABLE"], rows)


def _several(users: int) -> bool:
    return users > 1


def _one(users: int) -> bool:
    return users == 1


def _none(users: int) -> bool:
    return users == 0


@click.command("fsck")
@click.option("--repair", is_flag=True, help="Put right what has another copy; move what nobody knows to lost+found.")
@click.option("--deep", is_flag=True, help="Hold each unpacked file against its blob too: content, xattrs, times.")
@json_option
@with_store
def fsck_command(store: Store, repair: bool, deep: bool, as_json: bool) -> None:
    """Check every blob, layer, row and directory of the store against each other.

    Reads all blobs, and with --deep all that is unpacked of them. Exit code 1 if something stays wrong.

    \b
    overlaykit fsck
    overlaykit fsck --deep --repair
    """
    findings = store.fsck(repair=repair, deep=deep)
    if as_json:
        print_json([asdict(finding) for finding in findings])
    for finding in [] if as_json else findings:
        needed = f" (needed by {', '.join(finding.needed_by)})" if finding.needed_by else ""
        state = "repaired" if finding.repaired else "can be repaired" if finding.repairable else "no other copy"
        click.echo(shown(f"{finding.kind}: {finding.what}: {finding.text}{needed}: {state}"))
    if any(not finding.repaired for finding in findings):
        raise click.exceptions.Exit(1)


@click.command("gc")
@json_option
@with_store
def gc_command(store: Store, as_json: bool) -> None:
    """Remove blobs and layers that no image, container or running command needs, and say how much came free.

    \b
    overlaykit gc
    """
    freed = store.gc()
    if as_json:
        print_json(asdict(freed))
    else:
        click.echo(f"Total reclaimed space: {size(freed.size)}")


@click.command("prune")
@click.option("-a", "--all", is_flag=True, help="All images that no container uses, not only those without a name.")
@click.option("--containers", is_flag=True, help="Containers too, all that are neither mounted nor open.")
@click.option("-f", "--force", is_flag=True, help="Do not ask.")
@json_option
@with_store
def prune_command(store: Store, all: bool, containers: bool, force: bool, as_json: bool) -> None:
    """Remove images that have no name and no container, and all that nothing needs; say how much came free.

    \b
    overlaykit prune
    overlaykit prune --all --containers --force
    """
    what = ("all containers, " if containers else "") + ("all unused images" if all else "unused images without a name")
    if not force and not confirmed(f"This removes {what}. Go on?"):
        return
    pruned = store.prune(all=all, containers=containers)
    if as_json:
        print_json({"containers": pruned.containers, "images": pruned.images, "freed": pruned.size})
        return
    for name in (*pruned.containers, *pruned.images):
        click.echo(f"Deleted: {name}")
    click.echo(f"Total reclaimed space: {size(pruned.size)}")
