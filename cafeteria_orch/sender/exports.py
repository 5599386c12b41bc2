"""The agencies' CSV exports: which files a folder holds, their rows, the batches of them."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import BinaryIO

from cafeteria_orch.wire.messages import BATCH_HEADER, encode_row
from cafeteria_orch.wire.opcodes import BatchStatus
from cafeteria_orch.wire.rows import Row
from cafeteria_orch.wire.tables import MENU_ITEMS, TABLES, Table

# Besides the aliases that the wire itself knows.
_EXPORT_ALIASES = {MENU_ITEMS: {"item_name": "name"}}


class ExportError(Exception):
    """A file that is not sent. Its text names the file, the line and what is wrong there."""

    def __init__(self, path: Path, line: int | None, what: str) -> None:
        place = str(path) if line is None else f"{path}, line {line}"
        super().__init__(f"{place}: {what}")


@dataclass(frozen=True)
class Batch:
    """An encoded batch of a file.

    :ivar payload: what a frame is to hold.
    :ivar amount: how many rows.
    :ivar first_line: where in the file its first row starts; 0 if it has none.
    :ivar last_line: where its last row ends.
    """

    payload: bytes
    amount: int
    first_line: int
    last_line: int


@dataclass(frozen=True)
class Export:
    """A CSV file with rows of a table."""

    path: Path
    table: Table

    def rows(self) -> Iterator[tuple[int, int, Row]]:
        """Read the file: for each row its first and last line, and its cells.

        The cells are in the order of the table's columns, whatever that of the file, and as
        they stand there. Blank lines are passed over.

        :raises ExportError: at the first thing that is wrong.
        """
        with self.path.open("rb") as file:
            reader = csv.reader(self._lines(file), strict=True)
            try:
                header = next(reader, [])
                places = self._places(header)
                line = reader.line_num
                for cells in reader:
                    first_line, line = line + 1, reader.line_num
                    if not cells:
                        continue
                    if len(cells) != len(header):
                        raise self._error(
                            first_line, f"{len(cells)} cells, the header has {len(header)}"
                        )
                    row = tuple(None if place is None else cells[place] for place in places)
                    yield first_line, line, row
            except csv.Error as error:
                raise self._error(reader.line_num, str(error)) from error

    def digest(self) -> str:
        """What tells this content of the file from another."""
        digest = blake2b(digest_size=16)
        with self.path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        return digest.hexdigest()

    def batches(self, number: int, most_rows: int, most_bytes: int) -> Iterator[Batch]:
        """Read the file into batches; the last one says EOF, and an empty file has just that.

        :param number: of the first batch; the next ones count on.
        :param most_rows: in a batch.
        :param most_bytes: in a payload.
        :raises ExportError: at the first thing that is wrong.
        """
        head_bytes = 1 + BATCH_HEADER.size
        encoded: list[bytes] = []
        size, first_line, last_line = head_bytes, 0, 0
        for row_first, row_last, row in self.rows():
            row_bytes = encode_row(row, self.table)
            if head_bytes + len(row_bytes) > most_bytes:
                raise self._error(row_first, f"a row that no frame of {most_bytes} bytes holds")
            if len(encoded) == most_rows or size + len(row_bytes) > most_bytes:
                yield self._batch(number, BatchStatus.CONTINUE, encoded, first_line, last_line)
                number += 1
                encoded, size = [], head_bytes
            if not encoded:
                first_line = row_first
            encoded.append(row_bytes)
            size += len(row_bytes)
            last_line = row_last
        yield self._batch(number, BatchStatus.EOF, encoded, first_line, last_line)

    def _batch(
        self,
        number: int,
        status: BatchStatus,
        encoded: Sequence[bytes],
        first_line: int,
        last_line: int,
    ) -> Batch:
        head = BATCH_HEADER.pack(len(encoded), number, status)
        payload = b"".join((bytes([self.table.opcode]), head, *encoded))
        return Batch(payload, len(encoded), first_line, last_line)

    def _lines(self, file: BinaryIO) -> Iterator[str]:
        for number, line in enumerate(file, 1):
            try:
                # Spreadsheet programs put a mark before the header; it is not part of it.
                yield str(line, "utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise self._error(number, f"byte {error.start + 1} is not UTF-8") from error

    def _places(self, header: Sequence[str]) -> list[int | None]:
        """Where each of the table's columns stands in the file."""
        aliases = {**self.table.aliases, **_EXPORT_ALIASES.get(self.table, {})}
        names = [aliases.get(name, name) for name in header]
        for name in names:
            if name not in self.table.columns:
                raise self._error(1, f"{name!r} is no column of {self.table.name}")
            if names.count(name) > 1:
                raise self._error(1, f"column {name!r} stands there twice")
        for column in self.table.columns:
            if column not in names and column not in self.table.optional:
                raise self._error(1, f"column {column!r} is missing")
        return [names.index(name) if name in names else None for name in self.table.columns]

    def _error(self, line: int, what: str) -> ExportError:
        return ExportError(self.path, line, what)


def find_exports(directory: Path) -> tuple[list[Export], list[ExportError]]:
    """Find the CSV files in a folder and the folders in it.

    A file belongs to the table that its name begins with, or that a folder around it is
    called by, the nearest first.

    :return: the files by table, in the order of their paths; and an error for each file
        that belongs to no table.
    """
    exports, errors = [], []
    for path in sorted(directory.rglob("*")):
        if path.suffix.lower() != ".csv" or not path.is_file():
            continue
        folders = (directory.resolve().name, *path.relative_to(directory).parts[:-1])
        table = _table_of([path.stem, *reversed(folders)])
        if table is None:
            names = ", ".join(table.name for table in TABLES)
            errors.append(
                ExportError(path, None, f"neither it nor its folder is named for one of {names}")
            )
        else:
            exports.append(Export(path, table))
    exports.sort(key=lambda export: TABLES.index(export.table))
    return exports, errors


def _table_of(names: Iterable[str]) -> Table | None:
    for name in names:
        for table in TABLES:
            if name == table.name or name.startswith((f"{table.name}_", f"{table.name}-")):
                return table
    return None
