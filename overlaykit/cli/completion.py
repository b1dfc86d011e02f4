"""The command completion, and what the shell is offered for names of containers and images, and for paths in them."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator

import click
from click.shell_completion import CompletionItem, get_completion_class

from overlaykit.errors import OverlaykitError


@click.command("completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion_command(ctx: click.Context, shell: str) -> None:
    """Print what makes SHELL complete commands, options, names and paths in containers.

    \b
    source <(overlaykit completion bash)                                      # in ~/.bashrc
    source <(overlaykit completion zsh)                                       # in ~/.zshrc
    overlaykit completion fish > ~/.config/fish/completions/overlaykit.fish
    """
    made = get_completion_class(shell)
    assert made is not None
    root = ctx.find_root()
    click.echo(made(root.command, {}, "overlaykit", "_OVERLAYKIT_COMPLETE").source())


def containers(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    return [name for name in _names(ctx, "containers") if name.startswith(incomplete)]


def images(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    return [name for name in _names(ctx, "images") if name.startswith(incomplete)]


def volumes(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    return [name for name in _names(ctx, "volumes") if name.startswith(incomplete)]


def both(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    return [*containers(ctx, param, incomplete), *images(ctx, param, incomplete)]


def places(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """CONTAINER: and then paths in it; what has no colon may be a path on the host too."""
    name, colon, path = incomplete.rpartition(":")
    given = [word for value in ctx.params.values() if isinstance(value, tuple | str) for word in _words(value)]
    if not name and given and (colon or given[-1] == ":"):
        # bash takes a colon for a word of its own, and wants only what stands behind it.
        name = given[-1] if colon else given[-2] if len(given) > 1 else ""
        return [CompletionItem(each) for each in _paths(ctx, name, path or "/")]
    if colon:
        return [CompletionItem(f"{name}:{each}") for each in _paths(ctx, name, path or "/")]
    found = [CompletionItem(f"{name}:") for name in containers(ctx, param, incomplete)]
    return [*found, CompletionItem(incomplete, type="file")]


def _words(value: tuple[str, ...] | str) -> tuple[str, ...]:
    return value if isinstance(value, tuple) else (value,)


def _names(ctx: click.Context, what: str) -> list[str]:
    from overlaykit.store import Store

    try:
        with Store(ctx.find_root().params.get("root")) as store:
            if what == "containers":
                return [container.name for container in store.containers()]
            if what == "volumes":
                return [volume.name for volume in store.volumes()]
            return [tag for image in store.images() for tag in image.tags]
    except (OverlaykitError, OSError):
        return []  # no store, or not ours to read: nothing to offer


def _paths(ctx: click.Context, name: str, path: str) -> Iterator[str]:
    from overlaykit.store import Store

    head, begun = posixpath.split(path)
    try:
        with Store(ctx.find_root().params.get("root")) as store, store.container(name).view() as view:
            for entry in view.scandir(head):
                if entry.name.startswith(begun):
                    yield posixpath.join(head, entry.name) + ("/" if entry.is_dir() else "")
    except (OverlaykitError, OSError):
        return
