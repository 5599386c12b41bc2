"""The man pages in ``docs/man`` say what the commands are."""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
from collections.abc import Iterator
from copy import copy

from twisted.trial.unittest import SkipTest, SynchronousTestCase

from cafeteria_orch import __version__
from tests.man_pages import FOLDER, all_parsers, make_page, parsers

MAKE_THEM = "run python -m tests.man_pages"


def condensed(text: str) -> str:
    """Text without its white space: where lines break depends on the version of Python."""
    return "".join(text.split())


def plain(page: str) -> str:
    """A page without the marks of its fonts, condensed."""
    return condensed(re.sub(r"\\f[A-Z]|\\[,/]", "", page).replace(r"\-", "-"))


def texts(parser: argparse.ArgumentParser) -> Iterator[str]:
    """All that the user is told about a program and its commands."""
    for each in all_parsers(parser):
        yield each.description or ""
        formatter = each._get_formatter()
        for action in each._actions:
            if "--help" in action.option_strings:
                continue
            yield from action.option_strings
            if action.help:
                shown = copy(action)
                shown.help = formatter._get_help_string(action)
                yield formatter._expand_help(shown)


class ManPages(SynchronousTestCase):
    """One page for each program."""

    def test_pages_are_current(self) -> None:
        """Each option, help and description stands there, and no option that is gone."""
        for parser in parsers():
            page = plain((FOLDER / f"{parser.prog}.1").read_text())
            told = [f"cafeteria_orch {__version__}", *texts(parser)]
            for text in told:
                self.assertIn(condensed(text), page, f"{parser.prog}: {MAKE_THEM}")
            known = {*re.findall(r"--[a-z-]+", " ".join([*told, "--help"]))}
            for each in all_parsers(parser):
                known |= {*re.findall(r"--[a-z-]+", each.format_usage())}
            source = (FOLDER / f"{parser.prog}.1").read_text().replace(r"\-", "-")
            gone = {*re.findall(r"--[a-z-]+[a-z]", source)} - known
            self.assertEqual(gone, set(), f"{parser.prog}: {MAKE_THEM}")

    def test_programs(self) -> None:
        """Every program has its page, and there is no page of another."""
        pages = {path.name for path in FOLDER.iterdir()}
        self.assertEqual(pages, {f"{parser.prog}.1" for parser in parsers()})

    def test_pages_have_no_date(self) -> None:
        """They are the same as long as the commands are."""
        for parser in parsers():
            title, *_ = make_page(parser).splitlines()
            self.assertRegex(title, r'^\.TH \S+ "1" "" "cafeteria_orch [\d.]+" "cafeteria_orch"$')

    def test_roff(self) -> None:
        """``man`` has no complaint."""
        if shutil.which("groff") is None:
            raise SkipTest("there is no groff")
        for path in FOLDER.iterdir():
            command = ["groff", "-man", "-Tutf8", "-ww", "-z", str(path)]
            ended = subprocess.run(command, capture_output=True, text=True, check=True)
            self.assertEqual(ended.stderr, "")
