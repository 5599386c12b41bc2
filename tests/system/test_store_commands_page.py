"""The page of the store's commands: they exist, and its programs read an export."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from twisted.trial.unittest import SkipTest, SynchronousTestCase

from tests.support.copies import File, a_session, cafeorch, end, fill_with_samples
from tests.support.package import ROOT
from tests.support.pages import code_blocks

PAGE = (ROOT / "docs" / "store-commands.md").read_text()


class StoreCommandsPage(SynchronousTestCase):
    """What stands on the page."""

    def test_commands(self) -> None:
        """Each of them runs on a store, in the order of the page, and each command is there."""
        source = File(self)
        fill_with_samples(source)
        folder = Path(self.mktemp())
        folder.mkdir()
        names = {"cafeorch.sqlite3": source.location}
        ran = set()
        for block in code_blocks(PAGE, "sh"):
            for line in block.splitlines():
                program, *words = shlex.split(line)
                if program == "cafeorch":
                    words = [
                        names.get(word, str(folder / word))
                        if word in {*names, "backup.sqlite3", "exports"}
                        else word
                        for word in words
                    ]
                    outcome = cafeorch(*words)
                    if "pyarrow" in outcome.err:
                        continue
                    self.assertEqual(outcome.status, 0, outcome.err)
                    ran.add(words[1])
        self.assertGreaterEqual(ran, {"status", "sessions", "backup", "index"})
        first_table = PAGE.partition("\n## ")[0]
        listed = re.findall(r"^\| \[?`(\w+)`", first_table, re.MULTILINE)
        self.assertEqual(
            sorted(listed),
            re.findall(r"^    (\w+) ", cafeorch("store", "--help").out, re.MULTILINE),
        )

    def test_programs(self) -> None:
        """Those of DuckDB and pandas find the rows."""
        try:
            import duckdb  # noqa: F401, PLC0415
            import pandas  # noqa: F401, ICN001, PLC0415
            import pyarrow  # noqa: F401, ICN001, PLC0415
        except ImportError as error:
            raise SkipTest(f"{error.name} is not installed") from error
        source = File(self)
        fill_with_samples(source)
        end(source, a_session(2), agency_id=8)
        folder = Path(self.mktemp()).absolute()
        words = ("store", "export", source.location, str(folder), "--format", "parquet")
        self.assertEqual(cafeorch(*words).status, 0)
        (program,) = code_blocks(PAGE, "python")
        found: dict[str, object] = {}
        program = re.sub(r"^duckdb\.sql", "answer = duckdb.sql", program, flags=re.MULTILINE)
        exec(
            program.replace("'exports/", f"'{folder}/").replace('"exports/', f'"{folder}/'), found
        )
        self.assertEqual(len(found["users"]), 620)  # type: ignore[arg-type]
        self.assertEqual({row[0] for row in found["answer"].fetchall()}, {3, 8})  # type: ignore[attr-defined]
