"""The READMEs: their examples run, both languages say the same, CI runs what they say."""

from __future__ import annotations

import importlib
import io
import re
import shlex
import sys
import unittest
from argparse import ArgumentParser
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from twisted.trial.unittest import SynchronousTestCase

from cafeteria_orch.admin import cli as cafeorch
from cafeteria_orch.bench import cli as bench
from cafeteria_orch.daemon.options import Options
from cafeteria_orch.sender import cli as sender
from tests.support.builders import query
from tests.support.copies import File, fill_with_samples
from tests.support.faults import Program, Server
from tests.support.pages import code_blocks, links, table_rows

ROOT = Path(__file__).parent.parent.parent
ENGLISH = (ROOT / "README.md").read_text()
SPANISH = (ROOT / "README.es.md").read_text()
STORE = "cafeorch.sqlite3"

OTHER_WORDS = ("fichero", "confirm", "razón", "órdenes", "log", "backup", "lotes completos")
"""Beside archivo, acuse, motivo, comando, registro, copia de seguridad, lote lleno."""

PARSERS: dict[str, Callable[[], ArgumentParser]] = {
    "cafeorch": cafeorch.parser,
    "cafeorch-bench": bench.parser,
    "cafeorch-send": sender.parser,
}


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
        for pattern in (r"^#+ ", r"^\|", r"^\| `[^`]*`", r"^\| \d+ \| \w+", r"^```", r"^- "):
            english, spanish = (
                re.findall(pattern, text, re.MULTILINE) for text in (ENGLISH, SPANISH)
            )
            self.assertEqual(english, spanish, pattern)
        of_its_language = {"README.es.md": "README.md", "docs/data.es.md": "docs/data.md"}
        english, spanish = (
            [of_its_language.get(link, link) for link in links(text)]
            for text in (ENGLISH, SPANISH)
        )
        self.assertEqual(english, spanish)
        english, spanish = (figures(text) for text in (ENGLISH, SPANISH))
        self.assertEqual(english, spanish)

    def test_spanish_is_spanish(self) -> None:
        """No row of a table is left in English, and one thing has one word."""
        rows = {*re.findall(r"^\|.*[a-z].*", SPANISH, re.MULTILINE)}
        self.assertEqual(rows & {*ENGLISH.splitlines()}, set())
        prose = re.sub(r"^```.*?^```$|`[^`]*`", "", SPANISH, flags=re.DOTALL | re.MULTILINE)
        self.assertEqual(re.findall(rf"\b(?:{'|'.join(OTHER_WORDS)})\w*", prose), [])

    def test_commands(self) -> None:
        """Each command is one that its program takes, with what is there after a clone."""
        found = re.findall(r"\.venv/bin/(\S+)(.*)", "\n".join(code_blocks(ENGLISH, "sh")))
        ran = set()
        for program, line in ((name, text.partition(" && ")[0]) for name, text in found):
            # The tests may run in another folder.
            words = shlex.split(line.replace(" docs/", f" {ROOT}/docs/"))
            ran.add(program)
            if program == "twistd":
                flag, plugin, *options = words
                self.assertEqual((flag, plugin), ("-n", "cafeorch"))
                Options().parseOptions(options)
            elif program in PARSERS:
                PARSERS[program]().parse_args(words)
            else:
                self.assertIn(program, {"pip", "python"}, line)
        self.assertGreaterEqual(ran, {*PARSERS, "twistd"})

    def test_queries(self) -> None:
        """The queries find something in a store that has the sample."""
        store = File(self)
        fill_with_samples(store)
        programs = [block for block in code_blocks(ENGLISH, "sh") if "SELECT" in block]
        self.assertEqual(len(programs), 1)
        words = shlex.split(programs[0])
        queries = [word for word in words if "SELECT" in word]
        self.assertEqual(words, [each for sql in queries for each in ("sqlite3", STORE, sql)])
        for sql in queries:
            self.assertTrue(store.query(sql), sql)

    def test_headline_figures(self) -> None:
        """The figures of the benchmarks are those of their page."""
        measured = (ROOT / "docs" / "benchmarks.md").read_text()
        _, _, section = ENGLISH.partition("\n## Measure\n")
        _, *rows = table_rows(section)
        self.assertEqual(len(rows), 4)
        for _, ours, other, ratio in rows:
            name = other.partition(":")[0]
            self.assertRegex(measured, rf"\| {ours} \| {name} .*\| {re.escape(ratio)} \|")

    def test_every_option_is_there(self) -> None:
        """The page of options has every option, with its default."""
        parameters: list[Any] = Options.optParameters
        for name, short, default, *_ in parameters:
            mention = f"`--{name}`, `-{short}` | " if short else f"`--{name}` | "
            self.assertIn(mention, ENGLISH)
            self.assertIn(default, ENGLISH.split(mention)[1].split("|")[0])

    def test_ci_runs_the_test_command(self) -> None:
        """What CI runs is the command that a reader is given."""
        commands = code_blocks(ENGLISH, "sh")
        (test_command,) = [each for each in commands if each.endswith("/python -m tests\n")]
        self.assertIn(test_command, (ROOT / ".ci" / "run").read_text())


def figures(text: str) -> list[list[str]]:
    """The numbers in each row of each table, without the marks of their language."""
    rows = re.findall(r"^\|.*", text, re.MULTILINE)
    return [re.findall(r"\d+", re.sub(r"(?<=\d)[., \u202f](?=\d)", "", row)) for row in rows]
