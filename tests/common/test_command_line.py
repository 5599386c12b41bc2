"""Command lines that pass options on to a server."""

from __future__ import annotations

from argparse import SUPPRESS
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO

from twisted.trial.unittest import SynchronousTestCase

from cafeteria_orch.common.command_line import CommandParser, DefaultsFormatter, ServerOptions


class ServerOptionsTests(SynchronousTestCase):
    """The words that a command does not read itself."""

    def parser(self) -> CommandParser:
        """A parser with three commands."""
        parser = CommandParser(prog="cafeorch")
        commands = parser.add_subparsers(required=True)
        for command, takes in (
            ("plain", None),
            ("dashes", ServerOptions.AFTER_DASHES),
            ("all", ServerOptions.ALL),
        ):
            added = commands.add_parser(command)
            added.server_options = takes
            if command != "all":
                added.add_argument("words", nargs="*")
        return parser

    def test_after_dashes(self) -> None:
        """Everything after the first ``--`` is the server's, as it is."""
        parser = self.parser()
        for words, own, passed_on in (
            (["a"], ["a"], None),
            (["a", "--"], ["a"], []),
            (["--", "-p", "--", "x y"], [], ["-p", "--", "x y"]),
        ):
            options = parser.parse_args(["dashes", *words])
            self.assertEqual((options.words, options.server_options), (own, passed_on))

    def test_all(self) -> None:
        """Every word is the server's, but for those that ask for help."""
        parser = self.parser()
        words = ["-p", "80", "--store=x y", "--", "-1", "word"]
        self.assertEqual(parser.parse_args(["all", *words]).server_options, words)
        for word in ("-h", "--help"):
            with redirect_stdout(StringIO()) as shown:
                self.assertRaises(SystemExit, parser.parse_args, ["all", "-p", word])
            self.assertIn("usage: cafeorch all", shown.getvalue())

    def test_none(self) -> None:
        """Where a command has none, ``--`` keeps its meaning, and an unknown option is refused."""
        parser = self.parser()
        options = parser.parse_args(["plain", "--", "-a"])
        self.assertEqual((options.words, hasattr(options, "server_options")), (["-a"], False))
        with redirect_stderr(StringIO()):
            self.assertRaises(SystemExit, parser.parse_args, ["plain", "-a"])


class DefaultsTests(SynchronousTestCase):
    """What the help says of defaults."""

    def test_defaults(self) -> None:
        """A default is shown, a zero too; where there is none, none is."""
        parser = CommandParser(prog="x", formatter_class=DefaultsFormatter)
        parser.add_argument("--zero", default=0, help="some")
        parser.add_argument("--one", default=1, help="some")
        parser.add_argument("--flag", action="store_true", help="a flag")
        parser.add_argument("--absent", help="nothing")
        parser.add_argument("--suppressed", default=SUPPRESS, help="nothing")
        text = parser.format_help()
        self.assertEqual(text.count("(default: "), 2)
        self.assertIn("(default: 0)", text)
        self.assertIn("(default: 1)", text)
