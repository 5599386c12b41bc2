"""The page of the data: its columns and examples are the sample's, and so are its answers."""

from __future__ import annotations

import re
from itertools import count
from pathlib import Path
from uuid import UUID

from cafeteria_orch.sender.exports import Export
from cafeteria_orch.sender.finding import find_exports
from cafeteria_orch.server.responses import Session
from cafeteria_orch.wire.tables import MENU_ITEMS, STORES, TABLES, USERS
from tests.support.builders import PEER
from tests.support.pages import code_blocks, table_rows
from tests.support.stores import CLIENT, NOW, DatabaseTestCase

DOCS = Path(__file__).parent.parent.parent / "docs"
ENGLISH = (DOCS / "data.md").read_text()
SPANISH = (DOCS / "data.es.md").read_text()


def cell_text(cell: object) -> str:
    """A cell of an answer, as the page shows it on any database."""
    return "" if cell is None else re.sub(r"(\.\d*?)0+$", r"\1", str(cell)).removesuffix(".")


class Sample(DatabaseTestCase):
    """The sample, as two agencies have sent it."""

    def setUp(self) -> None:
        super().setUp()
        self.numbers = count(1)
        exports, errors = find_exports(DOCS / "sample")
        self.assertEqual(errors, [])
        whole, lists, cut = (
            Session(PEER, NOW, CLIENT),
            *(Session(PEER, NOW, UUID(int=8)) for _ in range(2)),
        )
        for export in exports:
            self.send(export, whole)
        self.finish(whole, 7, *TABLES)
        for export in exports:
            if export.table in {MENU_ITEMS, STORES}:
                self.send(export, lists)
        self.finish(lists, 8, MENU_ITEMS, STORES)
        self.send(next(export for export in exports if export.table is USERS), cut)

    def send(self, export: Export, session: Session) -> None:
        rows = [cells for _, _, cells in export.rows()]
        self.store(session, table=export.table, rows=rows, batch_number=next(self.numbers))

    def finish(self, session: Session, agency_id: int, *tables: object) -> None:
        session.agency_id = agency_id
        with self.database.transaction():
            for table in TABLES:
                if table in tables:
                    self.database.end_table(table.name, session, NOW)
            self.database.finish_session(session, NOW)

    def test_examples(self) -> None:
        """Each column is described in its place, by an example that is in the sample."""
        for table in TABLES:
            _, _, section = ENGLISH.partition(f"\n### {table.name}\n")
            _, *rows = table_rows(section)
            self.assertEqual([name.strip("`") for name, *_ in rows], list(table.columns))
            for name, (_, _, example, _) in zip(table.columns, rows):
                cells = {cell for (cell,) in self.query(f"SELECT {name} FROM {table.name}")}
                self.assertIn(example.strip("`"), {cell or "" for cell in cells})

    def test_answers(self) -> None:
        """Each question has this answer."""
        _, _, questions = ENGLISH.partition("\n## Five questions\n")
        sections = re.split(r"^### .*\n", questions, flags=re.MULTILINE)[1:]
        self.assertEqual(len(sections), 5)
        for section in sections:
            (sql,) = code_blocks(section, "sql")
            _, *rows = table_rows(section)
            found = [[cell_text(cell) for cell in row] for row in self.query(sql)]
            self.assertEqual(found, [[cell_text(cell) for cell in row] for row in rows])


class Languages(DatabaseTestCase):
    """The page in two languages."""

    def test_languages_agree(self) -> None:
        """Both pages have the same commands, queries, columns, examples and answers."""
        for language in ("sh", "sql"):
            self.assertEqual(code_blocks(ENGLISH, language), code_blocks(SPANISH, language))
        for pattern in (r"^#+ ", r"^\|", r"^\| \d.*"):
            english, spanish = (
                re.findall(pattern, text, re.MULTILINE) for text in (ENGLISH, SPANISH)
            )
            self.assertEqual(english, spanish, pattern)
        self.assertEqual(names_in_tables(ENGLISH), names_in_tables(SPANISH))


def names_in_tables(text: str) -> list[list[str]]:
    """What a language does not change in each row of a table."""
    rows = re.findall(r"^\|.*", text, re.MULTILINE)
    return [re.findall("`[^`]*`", row) for row in rows]
