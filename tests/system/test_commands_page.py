"""The page of the command ``cafeorch`` has all of its commands."""

from __future__ import annotations

import re

from twisted.trial.unittest import SynchronousTestCase

from cafeteria_orch.admin import cli
from tests.man_pages import all_parsers
from tests.support.package import ROOT

PAGE = (ROOT / "docs" / "commands.md").read_text()


class CommandsPage(SynchronousTestCase):
    """What stands in ``docs/commands.md``."""

    def test_every_command(self) -> None:
        """Each command has a section, and no section is of a command that there is not."""
        programs = {parser.prog for parser in all_parsers(cli.parser())} - {"cafeorch"}
        sections = {*re.findall(r"(?m)^##+ (.*)$", PAGE)}
        self.assertLessEqual(sections, programs)
        # The commands of a store may have a page of their own.
        missing = {each for each in programs - sections if not each.startswith("cafeorch store ")}
        self.assertEqual(missing, set())

    def test_examples(self) -> None:
        """The examples are command lines that the parser takes."""
        found = re.findall(r"(?m)^cafeorch (.+?)(?: >.*)?$", PAGE)
        self.assertGreater(len(found), 5)
        for line in found:
            words = line.replace(" exports ", f" {ROOT}/docs/sample ").split()
            self.assertTrue(callable(cli.parser().parse_args(words).run), line)
