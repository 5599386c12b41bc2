"""The agencies' CSV exports: the files of a folder, their rows, and batches of these."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from io import BufferedReader, FileIO, RawIOBase
from operator import itemgetter
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from cafeteria_orch.wire.messages import BATCH_HEADER, encode_row
from cafeteria_orch.wire.opcodes import BatchStatus
from cafeteria_orch.wire.rows import Row
from cafeteria_orch.wire.tables import MENU_ITEMS, TABLES, Table

_CHUNK_BYTES = 1 << 20

# In addition to the aliases of the wire.
_EXPORT_ALIASES = {MENU_ITEMS: {"item_name": "name"}}


class ExportError(Exception):
    """A file that cannot be sent. Its text names the file, the line and the fault."""

    def __init__(self, path: Path, line: int | None, what: str) -> None:
        place = str(path) if line is None else f"{path}, line {line}"
        super().__init__(f"{place}: {what}")


@dataclass(frozen=True)
class Batch:
    """An encoded batch of a file.

    :ivar payload: the payload of its frame.
    :ivar amount: the number of rows.
    :ivar first_line: the line of the file in which its first row starts; 0 without rows.
    :ivar last_line: the line in which its last row ends.
    """

    payload: bytes
    amount: int
    first_line: int
    last_line: int

    @property
    def digest(self) -> bytes:
        """Tells this payload from any other."""
        return _new_digest(self.payload).digest()


class Contents(NamedTuple):
    """What a file held when it was read.

    :ivar digest: of its bytes.
    :ivar rows: the number of rows of each batch.
    :ivar batch_digests: of each batch.
    """

    digest: str
    rows: list[int]
    batch_digests: list[bytes]


@dataclass(frozen=True)
class Export:
    """A CSV file with rows of a table."""

    path: Path
    table: Table

    def rows(self) -> Iterator[tuple[int, int, Row]]:
        """Read the rows of the file: the first and last line of each, and its cells.

        The cells are in the order of the table's columns, unchanged. Blank lines are skipped.

        :raises ExportError: at the first fault.
        """
        with self.path.open("rb") as file:
            yield from self._rows(file)

    def digest(self) -> str:
        """Read the file and return the digest of its bytes, as :attr:`Contents.digest`."""
        digest = _new_digest()
        with self.path.open("rb", buffering=0) as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
        return digest.hexdigest()

    def batches(self, number: int, max_rows: int, max_bytes: int) -> Iterator[Batch]:
        """Read the file into batches. The last one says EOF; it is empty if the file is.

        :param number: of the first batch; those of the next ones follow.
        :param max_rows: of a batch.
        :param max_bytes: of a payload.
        :raises ExportError: at the first fault.
        """
        with self.path.open("rb") as file:
            yield from self._batches(file, number, max_rows, max_bytes)

    def check(self, number: int, max_rows: int, max_bytes: int) -> Contents:
        """Read the whole file once; it can be compared with what it holds later.

        The parameters and the errors are those of :meth:`batches`.
        """
        rows, batch_digests = [], []
        with self.path.open("rb", buffering=0) as raw:
            source = _DigestingReader(raw)
            file = BufferedReader(source, _CHUNK_BYTES)
            for batch in self._batches(file, number, max_rows, max_bytes):
                rows.append(batch.amount)
                batch_digests.append(batch.digest)
        return Contents(source.digest.hexdigest(), rows, batch_digests)

    def _rows(self, file: BinaryIO) -> Iterator[tuple[int, int, Row]]:
        reader = csv.reader(self._lines(file), strict=True)
        try:
            header = next(reader, [])
            width = len(header)
            in_table_order = itemgetter(*self._places(header))
            line = reader.line_num
            for cells in reader:
                first_line, line = line + 1, reader.line_num
                if not cells:
                    continue
                if len(cells) != width:
                    raise self._error(first_line, f"{len(cells)} cells, the header has {width}")
                yield first_line, line, in_table_order([*cells, None])
        except csv.Error as error:
            raise self._error(reader.line_num, str(error)) from error

    def _batches(
        self, file: BinaryIO, number: int, max_rows: int, max_bytes: int
    ) -> Iterator[Batch]:
        head_bytes = 1 + BATCH_HEADER.size
        encoded: list[bytes] = []
        size, first_line, last_line = head_bytes, 0, 0
        for row_first, row_last, row in self._rows(file):
            row_bytes = encode_row(row, self.table)
            if head_bytes + len(row_bytes) > max_bytes:
                raise self._error(row_first, f"a row that no frame of {max_bytes} bytes holds")
            if len(encoded) == max_rows or size + len(row_bytes) > max_bytes:
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
                # Spreadsheet programs write a byte order mark before the header.
                yield str(line, "utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise self._error(number, f"byte {error.start + 1} is not UTF-8") from error

    def _places(self, header: Sequence[str]) -> list[int]:
        """The place of each column of the table in a row, one behind its end for a missing one."""
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
        places = {name: place for place, name in enumerate(names)}
        return [places.get(column, len(names)) for column in self.table.columns]

    def _error(self, line: int, what: str) -> ExportError:
        return ExportError(self.path, line, what)


class _DigestingReader(RawIOBase):
    """Reads a file.

    :ivar digest: of what was read so far.
    """

    def __init__(self, file: FileIO) -> None:
        self.digest = _new_digest()
        self._file = file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        size = self._file.readinto(buffer)
        self.digest.update(buffer[:size])
        return size


def _new_digest(data: bytes = b"") -> blake2b:
    return blake2b(data, digest_size=16)


def find_exports(directory: Path) -> tuple[list[Export], list[ExportError]]:
    """Find the CSV files in a folder and its subfolders.

    A file belongs to the table that its name begins with; otherwise, to the table that the name
    of a folder around it begins with, the nearest folder first.

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
