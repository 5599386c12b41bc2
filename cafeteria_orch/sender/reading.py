"""The rows of one open CSV file, and what is done about those that cannot be sent."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import BinaryIO, NamedTuple

from cafeteria_orch.wire.rows import Row
from cafeteria_orch.wire.tables import MENU_ITEMS, Table

_CELLS_IN_ROW = 16
"""A row is not longer than so many of the longest cells: a compressed file of a few kilobytes may
say one of gigabytes."""

# In addition to the aliases of the wire.
_EXPORT_ALIASES = {MENU_ITEMS: {"item_name": "name"}}


class ExportError(Exception):
    """A file that cannot be sent. Its text names the file, the line and the fault."""

    def __init__(self, path: Path, line: int | None, what: str) -> None:
        place = str(path) if line is None else f"{path}, line {line}"
        super().__init__(f"{place}: {what}")


class BadRow(NamedTuple):
    """A row that cannot be sent.

    :ivar line: in which it begins.
    :ivar what: is wrong with it.
    :ivar text: its lines, as they stand in the file.
    """

    line: int
    what: str
    text: bytes


Reject = Callable[[BadRow], object]
"""What is done with a row that cannot be sent."""


class RowReader:
    """Reads the rows of an open file: the first and last line of each, and its cells.

    The cells are in the order of the table's columns, unchanged. Blank lines are skipped.

    :param path: of the file, for its errors.
    :param file: the file.
    :param reject: takes the bad rows; ``None``: the first one is an error.
    """

    def __init__(self, path: Path, table: Table, file: BinaryIO, reject: Reject | None) -> None:
        self._path = path
        self._table = table
        self._file = file
        self._reject = reject
        # The lines of the row that is read, for the one who gets it if it is bad.
        self._lines: list[bytes] = []
        self._row_bytes = 0
        self._max_row_bytes = _CELLS_IN_ROW * csv.field_size_limit()
        self._not_utf8 = ""

    def __iter__(self) -> Iterator[tuple[int, int, Row]]:
        """:raises ExportError: at the first fault of the file."""
        reader = csv.reader(self._decode(), strict=True)
        width, in_table_order = self._read_header(reader)
        line = reader.line_num
        is_read = False
        while not is_read:
            self._lines.clear()
            self._row_bytes = 0
            try:
                for cells in reader:
                    first_line, line = line + 1, reader.line_num
                    if self._not_utf8:
                        self.refuse(first_line, self._not_utf8)
                    elif len(cells) == width:
                        yield first_line, line, in_table_order([*cells, None])
                    elif cells:
                        self.refuse(first_line, f"{len(cells)} cells, the header has {width}")
                    self._lines.clear()
                    self._row_bytes = 0
                is_read = True
            except csv.Error as error:
                # The reader goes on with the next line.
                first_line, line = line + 1, reader.line_num
                self.refuse(first_line, str(error))

    def refuse(self, line: int, what: str) -> None:
        """Reject the row that was read last.

        :raises ExportError: if nobody takes it.
        """
        if self._reject is None:
            raise self._error(line, what)
        self._not_utf8 = ""
        self._reject(BadRow(line, what, b"".join(self._lines)))

    def _decode(self) -> Iterator[str]:
        max_bytes = self._max_row_bytes
        lines = iter(partial(self._file.readline, max_bytes + 1), b"")
        for number, line in enumerate(lines, 1):
            self._row_bytes += len(line)
            if self._row_bytes > max_bytes:
                what = (
                    f"a row of more than {max_bytes} bytes: this is no CSV file, or it is damaged"
                )
                raise self._error(number, what)
            # Spreadsheet programs write a byte order mark before the header.
            encoding = "utf-8-sig" if number == 1 else "utf-8"
            if self._reject is not None:
                self._lines.append(line)
            try:
                yield str(line, encoding)
            except UnicodeDecodeError as error:
                what = f"byte {error.start + 1} is not UTF-8"
                if self._reject is None or number == 1:
                    raise self._error(number, what) from error
                self._not_utf8 = self._not_utf8 or f"{what} (line {number})"
                yield str(line, encoding, "surrogateescape")

    def _read_header(
        self, reader: Iterator[list[str]]
    ) -> tuple[int, Callable[[Sequence[str | None]], Row]]:
        try:
            header = next(reader, [])
        except csv.Error as error:
            raise self._error(1, str(error)) from error
        return len(header), itemgetter(*self._places(header))

    def _places(self, header: Sequence[str]) -> list[int]:
        """The place of each column of the table in a row, one behind its end for a missing one."""
        table = self._table
        aliases = {**table.aliases, **_EXPORT_ALIASES.get(table, {})}
        columns = [aliases.get(name, name) for name in header]
        places: dict[str, int] = {}
        unknown = []
        for place, (name, column) in enumerate(zip(header, columns)):
            if column not in table.columns:
                unknown.append(name)
            elif column in places:
                first = header[places[column]]
                raise self._error(1, f"{first!r} and {name!r} are the same column")
            else:
                places[column] = place
        if unknown:
            are = "is no column" if len(unknown) == 1 else "are no columns"
            has = ", ".join(table.columns)
            raise self._error(1, f"{_quoted(unknown)} {are} of {table.name}, which has {has}")
        missing = [
            column
            for column in table.columns
            if column not in places and column not in table.optional
        ]
        if missing:
            columns_are = "column {} is" if len(missing) == 1 else "columns {} are"
            raise self._error(1, f"{columns_are.format(_quoted(missing))} missing")
        return [places.get(column, len(header)) for column in table.columns]

    def _error(self, line: int, what: str) -> ExportError:
        return ExportError(self._path, line, what)


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))
