"""``cafeorch completion``: what a shell needs to complete the command.

The extra ``cli`` brings shtab, which is imported where it is used.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cafeteria_orch.common.command_line import ServerOptions
from cafeteria_orch.common.extras import how_to_install
from cafeteria_orch.common.plugin import service_maker

_SHELLS = ("bash", "zsh", "tcsh")
_FILES = {"FILE", "SOURCE", "TARGET", "STORE"}
_FOLDERS = {"DIRECTORY", "FOLDER"}

_DESCRIPTION = """
Print a script that completes the words of cafeorch in a shell. For bash:
cafeorch completion bash > ~/.local/share/bash-completion/completions/cafeorch
"""


def add_to(commands: Any) -> None:
    """Add the command to those of a parser.

    :param commands: what ``add_subparsers`` has returned.
    """
    parser = commands.add_parser(
        "completion", help="print a script that completes the command", description=_DESCRIPTION
    )
    parser.add_argument("shell", metavar="SHELL", choices=_SHELLS, help=", ".join(_SHELLS))
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print the script.

    :param options: of :func:`add_to`, and as ``whole`` the parser of the whole command.
    :return: the exit status.
    """
    try:
        import shtab  # noqa: PLC0415 (of the extra "cli")
    except ImportError:
        print(f"cafeorch completion: it needs shtab: {how_to_install('cli')}", file=sys.stderr)
        return 1
    for parser in _parsers(options.whole):
        _add_server_options(parser)
        _mark_files(parser, shtab)
    print(shtab.complete(options.whole, shell=options.shell))
    return 0


def _add_server_options(parser: argparse.ArgumentParser) -> None:
    """Have the options of the server completed where a command takes them."""
    if getattr(parser, "server_options", None) is not ServerOptions.ALL:
        return
    for option in service_maker().options().longOpt:
        name = option.rstrip("=")
        if name != "help":
            parser.add_argument(
                f"--{name}", action="store" if option.endswith("=") else "store_true"
            )


def _mark_files(parser: argparse.ArgumentParser, shtab: Any) -> None:
    for action in parser._actions:  # noqa: SLF001 (argparse has no other way to ask)
        if action.metavar in _FILES or action.type is Path:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
        elif action.metavar in _FOLDERS:
            action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]


def _parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """A parser, and those of its commands."""
    yield parser
    for action in parser._actions:  # noqa: SLF001
        if isinstance(action, argparse._SubParsersAction):  # noqa: SLF001
            for command in action.choices.values():
                yield from _parsers(command)
