"""What the commands of ``cafeorch store`` have in common: their store, their errors, their end."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

from cafeteria_orch.store.database import StoreError

from .arguments import location

Say = Callable[[str], None]
"""Prints a line on standard error, after the command's name."""

Run = Callable[[argparse.Namespace, Say], int]
"""Runs a command, and returns its exit status."""


def add_command(
    commands: Any, name: str, run: Run, what: str, description: str
) -> argparse.ArgumentParser:
    """Add a command that takes a STORE and ``--json``.

    :param commands: what ``add_subparsers`` has returned.
    :param what: it does, in the list of commands.
    :return: takes the command's other arguments.
    """
    parser: argparse.ArgumentParser = commands.add_parser(name, help=what, description=description)
    parser.add_argument(
        "store",
        metavar="STORE",
        type=location,
        help="a path or sqlite:PATH (SQLite), or a postgresql:// URL",
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(run=_ending(name, run))
    return parser


def _ending(name: str, run: Run) -> Callable[[argparse.Namespace], int]:
    def say(line: str) -> None:
        print(f"cafeorch store {name}: {line}", file=sys.stderr)

    def run_to_the_end(options: argparse.Namespace) -> int:
        try:
            return run(options, say)
        except StoreError as error:
            say(str(error))
        except KeyboardInterrupt:
            say("interrupted")
        return 1

    return run_to_the_end
