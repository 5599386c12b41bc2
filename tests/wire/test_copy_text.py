"""The text of ``COPY``: what PostgreSQL reads in it is what came, whichever codec wrote it."""

from __future__ import annotations

import re
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.strategies import DataObject

from cafeteria_orch.wire.errors import BatchRejected, ProtocolError
from cafeteria_orch.wire.messages import CODEC, TableBatch, copy_text
from cafeteria_orch.wire.rows import Row
from cafeteria_orch.wire.tables import TABLES, TRANSACTIONS, USERS, Table
from tests.support.builders import received
from tests.support.codecs import CodecTestCase, Compiled
from tests.support.strategies import I64, rows, wire_row, wire_rows
from tests.support.tracing import untraced

_ESCAPES = {"t": "\t", "n": "\n", "r": "\r"}


def read(text: bytes) -> list[tuple[str, ...] | Row]:
    """The rows of a text, as PostgreSQL's manual describes the format."""
    *lines, rest = text.decode().split("\n")
    assert not rest, "the last line has no end"
    return [tuple(map(_read_cell, line.split("\t"))) for line in lines]


def _read_cell(cell: str) -> str | None:
    assert "\r" not in cell, "a carriage return that is not escaped"
    if cell == r"\N":
        return None
    return re.sub(r"\\(.)", lambda found: _ESCAPES.get(found[1], found[1]), cell, flags=re.DOTALL)


class CopyText(CodecTestCase):
    """What is written for a body."""

    def assert_text(self, table: Table, cells: Sequence[Row], text: bytes) -> None:
        body = self.codec.encode_rows(cells, table)
        self.assertEqual(self.codec.copy_text(body, 0, len(cells), table, 12), text)

    @untraced
    @given(st.data(), I64)
    def test_any_rows(self, data: DataObject, batch_id: int) -> None:
        """Whatever rows a client writes, they are read again, each with the id of its batch."""
        table = data.draw(st.sampled_from(TABLES))
        without_nul = wire_rows(table).filter(
            lambda drawn: b"\0" not in "".join(filter(None, drawn[0])).encode()
        )
        drawn = data.draw(st.lists(without_nul, max_size=3))
        head = data.draw(st.binary(max_size=4))
        body = head + b"".join(wire for _, wire in drawn)
        text = self.codec.copy_text(body, len(head), len(drawn), table, batch_id)
        self.assertEqual(read(text), [(str(batch_id), *row) for row, _ in drawn])

    def test_escapes(self) -> None:
        """What has a meaning there is escaped, and nothing else."""
        cells = [("a\tb", "\r\n", "\\", "\x01\b\v\f\x7fñ🧉"), ("", r"\N", r"\.", "\\" * 3)]
        text = (
            "12\ta\\tb\t\\r\\n\t\\\\\t\x01\b\v\f\x7fñ🧉\n12\t\t\\\\N\t\\\\.\t" + "\\\\" * 3 + "\n"
        )
        self.assert_text(USERS, cells, text.encode())

    def test_null(self) -> None:
        """A column that is left out is NULL, and the text that says NULL is text."""
        cells: list[Row] = [(*"abcdefgh", voucher) for voucher in (None, r"\N", "")]
        start = b"12\t" + b"\t".join([b"%c" % letter for letter in b"abcdefgh"]) + b"\t"
        self.assert_text(
            TRANSACTIONS, cells, start + b"\\N\n" + start + b"\\\\N\n" + start + b"\n"
        )

    def test_longest(self) -> None:
        """A cell of nothing but what is escaped takes twice its length."""
        self.assert_text(
            USERS, [("\t" * 70_000, *"123")], b"12\t" + b"\\t" * 70_000 + b"\t1\t2\t3\n"
        )

    def test_no_rows(self) -> None:
        """A batch without rows has no text."""
        self.assert_text(USERS, [], b"")

    def test_nul(self) -> None:
        """A NUL is refused wherever it is, and the text says nothing of the data."""
        for place in range(4):
            row = ["secret"] * 4
            row[place] = "sec\0ret"
            body = self.codec.encode_rows([("1",) * 4, tuple(row)], USERS)
            with self.assertRaises(BatchRejected) as caught:
                self.codec.copy_text(body, 0, 2, USERS, 1)
            self.assertEqual(str(caught.exception), "PostgreSQL cannot store a NUL character")

    def test_malformed(self) -> None:
        """What is malformed is refused as it is when it comes."""
        row = wire_row([(column, b"\xff\0") for column in USERS.columns])
        with self.assertRaisesRegex(ProtocolError, "row 1: the value of 'user_id' is not UTF-8"):
            self.codec.copy_text(row, 0, 1, USERS, 1)


class CompiledCopyText(Compiled, CopyText):
    """The same of the compiled codec."""


class OfBatches(CodecTestCase):
    """A batch's own text."""

    @given(st.data())
    def test_batch(self, data: DataObject) -> None:
        """It is that of its rows."""
        drawn = data.draw(st.lists(rows(USERS), max_size=2))
        batch: TableBatch = received(table=USERS, rows=drawn)
        body = self.codec.encode_rows(drawn, USERS)
        try:
            expected = copy_text(body, 0, len(drawn), USERS, 3)
        except BatchRejected:
            with self.assertRaises(BatchRejected):
                batch.copy_text(3)
        else:
            self.assertEqual(batch.copy_text(3), expected)

    def test_no_row_is_decoded(self) -> None:
        """The compiled codec makes no rows for it."""
        batch = received()
        batch.copy_text(1)
        self.assertIs("rows" in batch.__dict__, CODEC == "pure")
