"""``cafeorch``: everything but the server itself, in one command."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

from cafeteria_orch import __version__
from cafeteria_orch.bench import cli as bench
from cafeteria_orch.common.command_line import CommandParser
from cafeteria_orch.sender import cli as sender

from . import (
    backup_command,
    check_command,
    completion_command,
    copy_command,
    demo_command,
    export_command,
    forget_command,
    index_command,
    sessions_command,
    status_command,
)

_DESCRIPTION = """
Send to an orchestrator, measure it, check its options, and work with its store. twistd cafeorch
runs the orchestrator itself.
"""

_PROGRAMS = (
    ("send", "send a folder of CSV files to a server", sender.add_arguments),
    ("bench", "load a server, and measure it", bench.add_arguments),
)
"""Commands that are programs of their own too, as ``cafeorch-bench``; each adds its arguments."""

_COMMANDS = (
    demo_command.add_to,
    check_command.add_to,
    completion_command.add_to,
)
"""Each adds a command to those of ``cafeorch``."""

_STORE_COMMANDS = (
    backup_command.add_to,
    copy_command.add_to,
    export_command.add_to,
    forget_command.add_to,
    index_command.add_to,
    sessions_command.add_to,
    status_command.add_to,
)
"""Each adds a command to those of ``cafeorch store``."""


def parser() -> CommandParser:
    """The command line: of each command, its part of it has the function that runs it."""
    whole = CommandParser(prog="cafeorch", description=_DESCRIPTION)
    whole.add_argument("--version", action="version", version=f"cafeteria_orch {__version__}")
    whole.set_defaults(whole=whole)
    commands = whole.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, what, add_arguments in _PROGRAMS:
        add_arguments(commands.add_parser(name, help=what))
    for add_to in _COMMANDS:
        add_to(commands)
    what = "the database that the server keeps its batches in"
    store = commands.add_parser("store", help=what, description=f"Work with {what}.")
    store_commands = store.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add_to in _STORE_COMMANDS:
        add_to(store_commands)
    return whole


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command.

    :raises SystemExit: with its status.
    """
    options = parser().parse_args(arguments)
    raise SystemExit(options.run(options))
