"""The READMEs: their examples run, both languages say the same, CI runs what they say."""

from __future__ import annotations

import importlib
import io
import re
import sys
import unittest
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from twisted.trial.unittest import SynchronousTestCase

from cafeteria_orch.daemon.options import Options
from tests.support.builders import query
from tests.support.faults import Program, Server
from tests.support.pages import code_blocks

ROOT = Path(__file__).parent.parent.parent
ENGLISH = (ROOT / "README.md").read_text()
SPANISH = (ROOT / "README.es.md").read_text()


class ReadmeTests(SynchronousTestCase):
    """What a reader does by the README."""

    def test_extending(self) -> None:
        """The processor and its test, as they stand there, work together."""
        folder = Path(self.mktemp())
        folder.mkdir()
        _, processor, test = code_blocks(ENGLISH, "python")
        (folder / "promotions.py").write_text(processor)
        (folder / "test_promotions.py").write_text(test)
        sys.path.insert(0, str(folder))
        self.addCleanup(sys.path.remove, str(folder))
        for name in ("promotions", "test_promotions"):
            self.addCleanup(sys.modules.pop, name, None)
        module = importlib.import_module("test_promotions")
        result = unittest.TestResult()
        with redirect_stdout(io.StringIO()):
            unittest.defaultTestLoader.loadTestsFromTestCase(module.PromotionsTests).run(result)
        self.assertEqual((result.testsRun, result.errors, result.failures), (2, [], []))
        self.flushLoggedErrors()

    def test_processor_is_about_ten_lines(self) -> None:
        """A new opcode takes about ten lines, as the design promises."""
        _, processor, _ = code_blocks(ENGLISH, "python")
        lines = [line for line in processor.splitlines() if line.strip()]
        self.assertLessEqual(len(lines), 12)

    def test_program_stores_once(self) -> None:
        """The sending program, run twice against a server, has stored its row once."""
        server = Server(self)
        server.start()
        server.wait_until_it_listens()
        program, *_ = code_blocks(ENGLISH, "python")
        self.assertIn(":8080", program)
        for _ in range(2):
            running = Program(self, program.replace(":8080", f":{server.port}"))
            self.assertEqual((running.wait(), running.output), (0, "BatchRecvSuccess()\n"))
        for table in ("users", "batch"):
            self.assertEqual(query(str(server.store), f"SELECT count(*) FROM {table}"), [(1,)])

    def test_languages_agree(self) -> None:
        """Both READMEs have the same commands, programs, headings, options and tables."""
        for language in ("sh", "python"):
            self.assertEqual(code_blocks(ENGLISH, language), code_blocks(SPANISH, language))
        for pattern in (r"^#+ ", r"^\|", r"^\| `[^`]*`", r"^\| \d+ \| \w+", r"^```"):
            english, spanish = (
                re.findall(pattern, text, re.MULTILINE) for text in (ENGLISH, SPANISH)
            )
            self.assertEqual(english, spanish, pattern)

    def test_every_option_is_there(self) -> None:
        """The page of options has every option, with its default."""
        parameters: list[Any] = Options.optParameters
        for name, short, default, *_ in parameters:
            mention = f"`--{name}`, `-{short}` | " if short else f"`--{name}` | "
            self.assertIn(mention, ENGLISH)
            self.assertIn(default, ENGLISH.split(mention)[1].split("|")[0])

    def test_ci_runs_the_test_command(self) -> None:
        """What CI runs is the command that a reader is given."""
        _, test_command, *_ = code_blocks(ENGLISH, "sh")
        self.assertIn(test_command, (ROOT / ".ci" / "run").read_text())
