"""The command line: `overlaykit COMMAND`. One file per group of commands, imported when one of them is called."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import click

from overlaykit import __version__
from overlaykit.errors import OverlaykitError

# What there is, in the order in which --help lists it: group, then each command's name and the module that has it.
COMMANDS: dict[str, dict[str, str]] = {
    "Images": {
        "load": "image",
        "import": "image",
        "images": "image",
        "history": "image",
        "tag": "image",
        "rmi": "image",
        "save": "image",
    },
    "Layers": {"blame": "layer", "waste": "layer", "squash": "layer", "rebase": "layer"},
    "Containers": {
        "create": "container",
        "ps": "ps",
        "rename": "container",
        "rm": "container",
        "diff": "layer",
        "commit": "container",
        "mount": "container",
        "umount": "container",
        "exec": "inside",
        "shell": "inside",
    },
    "States of a container": {
        "snapshot": "states",
        "snapshots": "states",
        "rollback": "states",
        "fork": "states",
        "discard": "states",
        "keep": "states",
        "apply-to": "states",
        "export": "states",
    },
    "The store": {"df": "upkeep", "fsck": "upkeep", "gc": "upkeep", "prune": "upkeep"},
    "Volumes": {"volume": "volume"},
    "Files in a container": {"cp": "copy", "ls": "files", "cat": "files", "put": "files", "write": "files"},
    "Both": {"inspect": "inspect", "info": "inspect"},
    "Measuring": {"bench": "bench", "explain": "explain"},
    "First steps": {"tour": "tour", "completion": "completion"},
}
HOMES = {name: module for group in COMMANDS.values() for name, module in group.items()}
# Docker's commands that have no like-named one here, and what does their work.
DOCKERS = {"run": "create, then exec", "start": "exec", "container": "ps, rm", "system": "df, prune"}
COMPLETING = "_OVERLAYKIT_COMPLETE"  # what a shell that wants to complete a word says its wish in
INTERRUPTED, UNREAD = 130, 141  # 128 + SIGINT and SIGPIPE, as shells have it


class Commands(click.Group):
    """A group whose commands are imported when they are asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(HOMES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        home = HOMES.get(cmd_name)
        if home is None:
            return None
        command = getattr(import_module(f"overlaykit.cli.{home}"), f"{cmd_name.replace('-', '_')}_command")
        assert isinstance(command, click.Command)
        return command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in HOMES and not args[0].startswith("-"):
            from difflib import get_close_matches

            close = [DOCKERS[args[0]]] if args[0] in DOCKERS else get_close_matches(args[0], HOMES, n=1)
            ctx.fail(f"no command {args[0]!r}" + (f"; did you mean {close[0]}?" if close else ""))
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, names in COMMANDS.items():
            rows = []
            for name in names:
                command = self.get_command(ctx, name)
                assert command is not None
                rows.append((name, command.get_short_help_str(90)))
            with formatter.section(title):
                formatter.write_dl(rows)


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="Start with: overlaykit tour",
)
@click.version_option(__version__, "-V", "--version", message="overlaykit %(version)s")
@click.option(
    "--root",
    type=click.Path(file_okay=False),
    help="The store's folder.  [default: $OVERLAYKIT_ROOT, else /var/lib/overlaykit for root, else "
    "$XDG_DATA_HOME/overlaykit]",
)
@click.pass_context
def cli(ctx: click.Context, root: str | None) -> None:
    """Container images, layers and writable layers, in process: no daemon, and no root but for mounts.

    \b
    overlaykit import rootfs.tar base:1
    overlaykit create base:1 --name box
    echo hello | overlaykit write box /etc/motd
    overlaykit diff box
    overlaykit commit box mine:1
    overlaykit save mine:1 mine.tar
    """
    ctx.obj = root


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code of `overlaykit ARGV`, or of this process's arguments: 0; 1 failed; 2 not understood; 130 interrupted."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure: Any = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="surrogateescape")  # names in a layer need not be UTF-8
    _have_streams()
    try:
        code = cli.main(args=None if argv is None else list(argv), prog_name="overlaykit", standalone_mode=False)
        sys.stdout.flush()
    except click.exceptions.Exit as e:
        return e.exit_code
    except (click.Abort, KeyboardInterrupt):
        return complain("interrupted", code=INTERRUPTED)
    except click.ClickException as e:
        e.show()
        return e.exit_code
    except OverlaykitError as e:
        return complain(f"{e} ({e.hint})" if e.hint else str(e), code=e.exit_code)
    except (BrokenPipeError, SystemExit):  # click exits when it meets the former, and after a completion
        if COMPLETING in os.environ:
            return 0
        # Whoever read our output has gone, as `head` does. What is still in the buffer must not be tried again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return UNREAD
    except OSError as e:
        names = " -> ".join(os.fsdecode(n) or "''" for n in (e.filename, e.filename2) if isinstance(n, str | bytes))
        return complain(f"{names}: {e.strerror}" if names else str(e.strerror or e))
    except UnicodeEncodeError as e:  # files may be called so, but what is written down is JSON
        return complain(f"{e.object!r} is not UTF-8, and cannot be written down")
    return code if isinstance(code, int) else 0


def _have_streams() -> None:
    """Let streams that our caller closed be /dev/null, as in Go: else files of the store would get their numbers."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(fd, True)
    os.close(fd)
    for fd, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(fd, mode, errors="surrogateescape", closefd=False))


def complain(message: str, *, code: int = 1) -> int:
    """Say it on stderr in one line; `code` comes back."""
    click.echo(f"overlaykit: {' '.join(message.split())}", err=True)
    return code
