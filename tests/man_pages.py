"""The man pages in ``docs/man``, from the parsers of the commands: ``python -m tests.man_pages``."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path

from argparse_manpage.manpage import Manpage

from cafeteria_orch import __version__
from cafeteria_orch.admin import cli as cafeorch
from cafeteria_orch.bench import cli as bench
from cafeteria_orch.sender import cli as sender

FOLDER = Path(__file__).parent.parent / "docs" / "man"

SHORT = {
    "cafeorch": "send to an orchestrator, measure it, look at its store",
    "cafeorch-bench": "load an orchestrator, and measure it",
    "cafeorch-send": "send a folder of CSV files to an orchestrator",
}


def parsers() -> list[argparse.ArgumentParser]:
    """The parsers of all commands that are programs."""
    return [cafeorch.parser(), bench.parser(), sender.parser()]


def all_parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """A parser and those of its commands."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from all_parsers(command)


def make_page(parser: argparse.ArgumentParser) -> str:
    """The man page of a program."""
    for each in all_parsers(parser):
        formatter = each._get_formatter()
        for action in each._actions:
            # The generator knows no formatter that adds the defaults.
            if action.help:
                action.help = formatter._get_help_string(action)
    page = Manpage(parser, format="single-commands-section")
    # A date would make each page differ from that of the day before.
    page.date = ""
    page.source = f"cafeteria_orch {__version__}"
    page.manual = "cafeteria_orch"
    page.description = SHORT[parser.prog]
    return str(page)


def main() -> None:
    """Write the pages."""
    # argparse breaks its lines for the terminal that it finds.
    os.environ["COLUMNS"] = "80"
    FOLDER.mkdir(exist_ok=True)
    for parser in parsers():
        (FOLDER / f"{parser.prog}.1").write_text(make_page(parser))


if __name__ == "__main__":
    main()
