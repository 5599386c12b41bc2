"""The files of an export: CSV, by the standard library, and Parquet, by the extra ``export``."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from decimal import Context, Decimal, Inexact, InvalidOperation
from io import TextIOWrapper
from typing import Any, BinaryIO, Protocol

from cafeteria_orch.store.database import StoreError
from cafeteria_orch.store.views import kind_of
from cafeteria_orch.wire.tables import Table

PRECISION, SCALE = 38, 12
"""Of the numbers in Parquet: 26 digits before the point, 12 after it."""

FIXED = ("batch_id", "agency_id", "received_at")
"""The columns before those of the table."""


class Writer(Protocol):
    """Writes a file.

    :ivar numbers_left_out: how many numbers did not fit, and are NULL.
    """

    numbers_left_out: int

    def write(self, rows: Sequence[tuple[Any, ...]]) -> None:
        """Write rows: the fixed columns, then what the cells of the table's mean, as text."""

    def close(self) -> None:
        """Write the end of the file, which stays open."""


class CSVWriter:
    """A CSV file with a line of headings; nothing between two commas is NULL.

    :param file: takes it.
    :param table: whose rows they are.
    """

    numbers_left_out = 0

    def __init__(self, file: BinaryIO, table: Table) -> None:
        self._text = TextIOWrapper(file, encoding="utf-8", newline="", write_through=True)
        self._csv = csv.writer(self._text, lineterminator="\n")
        self._csv.writerow((*FIXED, *table.columns))

    def write(self, rows: Sequence[tuple[Any, ...]]) -> None:
        """See :class:`Writer`."""
        self._csv.writerows(rows)

    def close(self) -> None:
        """See :class:`Writer`."""
        self._text.detach()


class ParquetWriter:
    """A Parquet file; what is written at once becomes a row group.

    :param file: takes it.
    :param table: whose rows they are.
    """

    def __init__(self, file: BinaryIO, table: Table) -> None:
        self.numbers_left_out = 0
        self._arrow = _pyarrow()
        types = {
            "identifier": self._arrow.string(),
            "text": self._arrow.string(),
            "number": self._arrow.decimal128(PRECISION, SCALE),
            "integer": self._arrow.int64(),
            "boolean": self._arrow.bool_(),
            "date": self._arrow.date32(),
            "time": self._arrow.timestamp("us"),
        }
        kinds = ("integer", "integer", "time", *map(kind_of, table.columns))
        self._schema = self._arrow.schema(
            [(name, types[kind]) for name, kind in zip((*FIXED, *table.columns), kinds)]
        )
        self._file = self._arrow.parquet.ParquetWriter(file, self._schema, compression="zstd")

    def write(self, rows: Sequence[tuple[Any, ...]]) -> None:
        """See :class:`Writer`."""
        batch_ids, agency_ids, *texts = zip(*rows)
        kinds = self._schema.types
        columns = [
            *(self._arrow.array(ids, self._arrow.int64()) for ids in (batch_ids, agency_ids)),
            *(self._column(cells, kind) for cells, kind in zip(texts, kinds[2:])),
        ]
        table = self._arrow.Table.from_arrays(columns, schema=self._schema)
        self._file.write_table(table, row_group_size=len(rows))

    def _column(self, cells: Sequence[Any], kind: Any) -> Any:
        texts = self._arrow.array(cells, self._arrow.string())
        try:
            return texts.cast(kind)
        except self._arrow.ArrowInvalid:
            if not self._arrow.types.is_decimal(kind):
                raise
        fitting = [cell and fitting_number(cell) for cell in cells]
        self.numbers_left_out += fitting.count(None) - texts.null_count
        return self._arrow.array(fitting, self._arrow.string()).cast(kind)

    def close(self) -> None:
        """See :class:`Writer`."""
        self._file.close()


def fitting_number(text: str) -> str | None:
    """A number with all decimal places that there is room for; ``None`` if it has more digits."""
    try:
        return format(Decimal(text).quantize(_UNIT, context=_EXACTLY), "f")
    except (Inexact, InvalidOperation):
        return None


_UNIT = Decimal(1).scaleb(-SCALE)
_EXACTLY = Context(prec=PRECISION, traps=[Inexact, InvalidOperation])


def _pyarrow() -> Any:
    try:
        import pyarrow as pa  # noqa: PLC0415 (of the extra "export")
        import pyarrow.parquet  # noqa: PLC0415
    except ImportError as error:
        raise StoreError(
            "--format parquet needs pyarrow: pip install 'cafeteria_orch[export]', or say"
            " --format csv"
        ) from error
    return pa


def check_format(name: str) -> None:
    """Make sure that what writes files of a format is installed.

    :raises StoreError: if it is not.
    """
    if name == "parquet":
        _pyarrow()


FORMATS: dict[str, Callable[[BinaryIO, Table], Writer]] = {
    "parquet": ParquetWriter,
    "csv": CSVWriter,
}
"""What writes the files of a format, which is also the ending of their names."""
