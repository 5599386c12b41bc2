"""``cafeorch``: what an operator does with a store."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NoReturn

from cafeteria_orch import __version__

from . import (
    backup_command,
    copy_command,
    export_command,
    forget_command,
    index_command,
    sessions_command,
    status_command,
)

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


def parser() -> argparse.ArgumentParser:
    """The command line: of each command, its part of it has the function that runs it."""
    whole = argparse.ArgumentParser(
        prog="cafeorch", description="Work with the store of an orchestrator."
    )
    whole.add_argument("--version", action="version", version=f"cafeteria_orch {__version__}")
    parts = whole.add_subparsers(title="commands", metavar="COMMAND", required=True)
    what = "the database that the server keeps its batches in"
    store = parts.add_parser("store", help=what, description=f"Work with {what}.")
    commands = store.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add_to in _STORE_COMMANDS:
        add_to(commands)
    return whole


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command.

    :raises SystemExit: with its status.
    """
    options = parser().parse_args(arguments)
    raise SystemExit(options.run(options))
