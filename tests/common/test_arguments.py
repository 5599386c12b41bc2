"""Values on a command line, as the server's options and the console commands read them."""

from __future__ import annotations

import argparse
import io
from contextlib import redirect_stderr

from twisted.trial.unittest import SynchronousTestCase

from cafeteria_orch.common.arguments import endpoint, number


class ArgumentsTests(SynchronousTestCase):
    """A value is read, or refused by its text."""

    def test_numbers_within_their_bounds(self) -> None:
        """The bounds belong to the range; the kind decides what a number is."""
        parse = number(int, -1, 3)
        self.assertEqual([parse("-1"), parse("3")], [-1, 3])
        self.assertEqual(number(float, 0, 1)("0.5"), 0.5)

    def test_numbers_that_are_refused(self) -> None:
        """What is out of range, of another kind, or no number at all."""
        for text in ("-2", "4", "1.5", "nan", "x", ""):
            error = self.assertRaises(ValueError, number(int, -1, 3), text)
            self.assertEqual(str(error), f"{text!r} is not a number from -1 to 3")
        self.assertRaises(ValueError, number(float, 0, 1), "nan")

    def test_endpoints(self) -> None:
        """The description of an endpoint is taken as it is, or refused by its text."""
        self.assertEqual(endpoint("tcp:localhost:1"), "tcp:localhost:1")
        self.assertIn("tcp:", str(self.assertRaises(ValueError, endpoint, "tcp:")))

    def test_argparse_shows_the_text(self) -> None:
        """The console commands end with the same words as the server."""
        parser = argparse.ArgumentParser()
        parser.add_argument("--port", type=number(int, 0, 65535))
        with redirect_stderr(io.StringIO()) as output:
            self.assertRaises(SystemExit, parser.parse_args, ["--port=x"])
        self.assertIn("--port: 'x' is not a number from 0 to 65535", output.getvalue())
