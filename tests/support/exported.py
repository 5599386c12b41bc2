"""What an export has written."""

from __future__ import annotations

import csv
from datetime import datetime
from pathlib import Path
from typing import Any

from twisted.trial.unittest import SynchronousTestCase

from cafeteria_orch.wire.tables import USERS, Table

from .copies import File, Outcome, Place, cafeorch


def rows_of(folder: Path, table: Table = USERS) -> list[tuple[str, ...]]:
    """The rows of a table in CSV files: the batch, the agency, when it came, the cells."""
    found = []
    for path in folder.glob(f"{table.name}/agency=*/day=*/batches-*.csv"):
        agency = path.parent.parent.name.partition("=")[2]
        day = path.parent.name.partition("=")[2]
        with path.open(newline="") as file:
            headings, *rows = csv.reader(file)
        assert tuple(headings) == ("batch_id", "agency_id", "received_at", *table.columns)
        first, last = map(int, path.stem.split("-")[1:])
        for batch_id, agency_id, received_at, *cells in rows:
            assert agency == (agency_id or "unknown")
            assert received_at.startswith(day)
            assert first <= int(batch_id) <= last
            found.append((batch_id, agency_id, received_at, *cells))
    return sorted(found)


def users_in(place: Place) -> list[tuple[str, ...]]:
    """What the typed view has of users, as text."""
    return sorted(tuple(map(_as_text, row)) for row in place.query("SELECT * FROM users_typed"))


def _as_text(cell: Any) -> str:
    if isinstance(cell, datetime):
        return cell.isoformat(" ", "milliseconds" if cell.microsecond else "seconds")
    return "" if cell is None else str(cell)


class ExportTestCase(SynchronousTestCase):
    """A store of some kind, and a folder that it is exported into."""

    source_kind: type[Place] = File

    def setUp(self) -> None:
        self.source = self.source_kind(self)
        self.folder = Path(self.mktemp())

    def export(self, *options: str, file_format: str = "csv") -> Outcome:
        """Export what is new."""
        where = (self.source.location, str(self.folder))
        return cafeorch("store", "export", *where, "--format", file_format, *options)

    def exported(self, *options: str, file_format: str = "csv") -> Any:
        """Export what is new, without a mistake; what the command says of it."""
        outcome = self.export("--json", *options, file_format=file_format)
        self.assertEqual(outcome.status, 0, outcome.err)
        return outcome.summary
