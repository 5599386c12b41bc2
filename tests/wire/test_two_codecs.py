"""The compiled row codec is the pure one, only faster: whatever it is given, both say the same."""

from __future__ import annotations

import copy
import gc
import pickle
import struct
import tracemalloc
import weakref
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DataObject, DrawFn, SearchStrategy

from cafeteria_orch.wire import rows as pure
from cafeteria_orch.wire.opcodes import Opcode
from cafeteria_orch.wire.tables import END_OF_TABLE, TABLES, USERS, Table
from tests.support.cases import case
from tests.support.codecs import Compiled
from tests.support.strategies import I32, mutations, wire_row, wire_rows
from tests.support.tracing import untraced

OPTIONAL = Table(
    Opcode.DATA_BATCH, "optional", ("a", "b"), frozenset({"a", "b"}), aliases={"c": "b", "d": "b"}
)
NO_COLUMNS = Table(Opcode.DATA_BATCH, "none", ())
TWO_OF_ONE_NAME = Table(Opcode.DATA_BATCH, "twins", ("a", "a"), frozenset({"a"}))
FULLEST = Table(Opcode.DATA_BATCH, "fullest", tuple(f"c{i}" for i in range(64)))
TOO_WIDE = Table(Opcode.DATA_BATCH, "wide", tuple(f"c{i}" for i in range(65)))
TOO_MANY_KEYS = Table(
    Opcode.DATA_BATCH, "aliases", ("a",), aliases={f"c{i}": "a" for i in range(64)}
)
NARROW = (*TABLES, END_OF_TABLE, OPTIONAL, NO_COLUMNS, TWO_OF_ONE_NAME)

NUMBERS = (
    I32
    | st.integers()
    | st.integers(-70, 70)
    | st.sampled_from((2**63 - 1, 2**63, -(2**63), -(2**63) - 1, 2**64, 2**64 + 1))
)
WRONG_NUMBERS = st.none() | st.booleans() | st.floats() | st.just("1")


class Text(str):  # noqa: SLOT000 - it is to be a plain subclass, with a `__dict__`
    """Text that says something else of itself when it is encoded."""

    def encode(self, encoding: str = "utf-8", errors: str = "strict") -> bytes:
        return b"another"


class Number(int):
    """A number that is in every range."""

    def __ge__(self, other: Any) -> bool:
        return True

    def __le__(self, other: Any) -> bool:
        return True


class Body(bytes):
    """Bytes that say of themselves that they are longer."""

    def __len__(self) -> int:
        return 2**20


@cache
def any_cells() -> SearchStrategy[Any]:
    """Cells, right and wrong: lone surrogates, strings of a class of their own, no strings."""
    surrogates = st.text(st.characters(min_codepoint=0xD780, max_codepoint=0xE07F), max_size=4)
    wrong = st.none() | st.integers() | st.binary(max_size=3) | surrogates
    return st.text(max_size=8) | wrong | st.text(max_size=8).map(Text)


@st.composite
def any_rows(draw: DrawFn, table: Table) -> Any:
    """Rows to encode that are right, or too short, or too long, or no tuples."""
    width = len(table.columns)
    size = draw(st.just(width) | st.integers(0, width + 2))
    right = st.tuples(*[st.text(max_size=8)] * size)
    cells = draw(right | st.tuples(*[any_cells()] * size))
    return draw(st.sampled_from((cells, cells, cells, list(cells), "x" * size, None, 7)))


def outcome(function: Callable[..., Any], *arguments: Any) -> tuple[str, ...]:
    """What came of a call: the value with the types in it, or the error and all that it shows."""
    try:
        value = function(*arguments)
    except Exception as error:
        return type(error).__name__, str(error), repr(error.__context__)
    kinds = [type(cell).__name__ for row in value if isinstance(row, tuple) for cell in row]
    return type(value).__name__, repr(value), *kinds


class AgreementTests(Compiled):
    """The same value, or the same error with the same text."""

    def assertAgree(self, name: str, *arguments: Any) -> None:
        expected = outcome(getattr(pure, name), *arguments)
        self.assertEqual(outcome(getattr(self.codec, name), *arguments), expected)
        if name == "decode_rows":
            # Of what is right, it may make the rows or not.
            checked = outcome(lambda: [self.codec.check_rows(*arguments)][1:])
            self.assertEqual(checked, outcome(list) if expected[0] == "list" else expected)
            self.assertAgree("copy_text", *arguments, 7)

    @given(st.data())
    def test_valid(self, data: DataObject) -> None:
        """Of rows as clients write them, anywhere in the body."""
        table = data.draw(st.sampled_from((*NARROW, FULLEST, TOO_WIDE, TOO_MANY_KEYS)))
        drawn = data.draw(st.lists(wire_rows(table), max_size=3))
        head = data.draw(st.binary(max_size=8))
        body = head + b"".join(wire for _, wire in drawn)
        self.assertAgree("decode_rows", body, len(head), len(drawn), table)

    # The sanitizer's test compares many more; these are the ones that Hypothesis can shrink.
    @untraced
    @settings(max_examples=500)
    @given(st.data())
    def test_mutated(self, data: DataObject) -> None:
        """Of such rows with a few changes."""
        table = data.draw(st.sampled_from(NARROW))
        drawn = data.draw(st.lists(wire_rows(table), max_size=3))
        body = data.draw(mutations(b"".join(wire for _, wire in drawn)))
        count = data.draw(st.just(len(drawn)) | st.integers(0, 4))
        self.assertAgree("decode_rows", body, 0, count, table)

    @given(st.binary(max_size=60), NUMBERS, NUMBERS, st.sampled_from(NARROW))
    def test_arbitrary(self, body: bytes, offset: int, count: int, table: Table) -> None:
        """Of any bytes, and counts and offsets from before the body to beyond all numbers."""
        self.assertAgree("decode_rows", body, offset, count, table)
        self.assertAgree("decode_rows", body, 0, count, table)
        self.assertAgree("decode_rows", body, offset, 0, table)

    @given(NUMBERS, NUMBERS)
    def test_numbers_with_a_valid_body(self, offset: int, count: int) -> None:
        """Of rows that are right, with counts and offsets that are not."""
        body = wire_row([("a", "x"), ("b", "y")]) + bytes(4)
        self.assertAgree("decode_rows", body, 0, 2, OPTIONAL)
        self.assertAgree("decode_rows", body, 0, count, OPTIONAL)
        self.assertAgree("decode_rows", body, offset, 1, OPTIONAL)
        self.assertAgree("decode_rows", body, offset, count, OPTIONAL)

    @given(WRONG_NUMBERS | st.just(0), WRONG_NUMBERS | st.just(1))
    def test_no_numbers(self, offset: Any, count: Any) -> None:
        """Of counts and offsets that are no integers, or hardly."""
        body = wire_row([("a", "x")])
        self.assertAgree("decode_rows", body, offset, count, OPTIONAL)

    def test_types_of_ones_own(self) -> None:
        """Of bytes, numbers and texts of a class that lies about them."""
        body = wire_row([("a", "x")])
        for given_body in (Body(body), bytearray(body), memoryview(body), "text", None):
            with case(body=given_body):
                self.assertAgree("decode_rows", given_body, 0, 1, OPTIONAL)
        for number in (Number(-1), Number(1), Number(2**70), Number(10**6)):
            with case(number=number):
                self.assertAgree("decode_rows", body, 0, number, OPTIONAL)
                self.assertAgree("decode_rows", body, number, 1, OPTIONAL)
        self.assertAgree("encode_row", (Text("a"), "b"), OPTIONAL)
        for batch_id in (Number(7), True, 7.0, None, "seven"):
            with case(batch_id=batch_id):
                self.assertAgree("copy_text", body, 0, 1, OPTIONAL, batch_id)

    # A row has a width, and a cell one of a handful of classes: there is little more to find.
    @settings(max_examples=300)
    @given(st.data())
    def test_encoded(self, data: DataObject) -> None:
        """Of rows to encode, right and wrong."""
        table = data.draw(st.sampled_from(NARROW))
        self.assertAgree("encode_row", data.draw(any_rows(table)), table)
        drawn = data.draw(st.none() | st.lists(any_rows(table), max_size=3))
        self.assertAgree("encode_rows", drawn, table)

    @given(st.data(), NUMBERS)
    def test_copied(self, data: DataObject, batch_id: int) -> None:
        """Of rows that are full of what ``COPY`` has a meaning for, and have a NUL here and there."""
        table = data.draw(st.sampled_from((*NARROW, FULLEST, TOO_WIDE)))
        alphabet = data.draw(st.sampled_from(("\t\n\r\\N", "\t\n\r\\ñ🧉\x0b", "\\\0a")))
        cell = st.text(alphabet, max_size=6)
        row = st.tuples(
            *(cell | st.none() if name in table.optional else cell for name in table.columns)
        )
        drawn = data.draw(st.lists(row, max_size=3))
        body = pure.encode_rows(drawn, table)
        self.assertAgree("copy_text", body, 0, len(drawn), table, batch_id)

    def test_many_keys(self) -> None:
        """Of tables with as many keys as the compiled codec holds, and with more."""
        for table in (FULLEST, TOO_WIDE, TOO_MANY_KEYS):
            with case(table=table.name):
                row = tuple(f"ñ{i}" for i in range(len(table.columns)))
                self.assertAgree("encode_row", row, table)
                body = pure.encode_row(row, table)
                self.assertEqual(self.codec.decode_rows(body, 0, 1, table), [row])
                for key in table.index_of_key:
                    self.assertAgree("decode_rows", wire_row([(key, "1")]), 0, 1, table)


class TupleTests(Compiled):
    """A decoded row is a tuple like any other."""

    @given(st.data())
    def test_rows(self, data: DataObject) -> None:
        """It compares, sorts, hashes, pickles and copies as one that Python made."""
        table = data.draw(st.sampled_from((*TABLES, END_OF_TABLE, OPTIONAL, NO_COLUMNS)))
        drawn = data.draw(st.lists(wire_rows(table), max_size=3))
        expected = [row for row, _ in drawn]
        body = b"".join(wire for _, wire in drawn)
        decoded = self.codec.decode_rows(body, 0, len(drawn), table)
        self.assertEqual({type(row) for row in decoded}, {tuple} if drawn else set())
        self.assertEqual(decoded, expected)
        self.assertEqual(list(map(hash, decoded)), list(map(hash, expected)))
        self.assertEqual(set(decoded), set(expected))
        self.assertEqual(sorted(decoded, key=repr), sorted(expected, key=repr))
        self.assertEqual(copy.deepcopy(decoded), expected)
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            self.assertEqual(pickle.loads(pickle.dumps(decoded, protocol)), expected)

    def test_a_row_in_a_cycle(self) -> None:
        """A tuple made of rows is one that the collector looks at, and frees."""
        (row,) = self.codec.decode_rows(wire_row([("a", "x")]), 0, 1, OPTIONAL)

        class Holder:
            rows: Any = None

        holder = Holder()
        holder.rows = (*row, row, holder)
        reference = weakref.ref(holder)
        del holder
        gc.collect()
        self.assertIsNone(reference())


class KeepingTests(Compiled):
    """What a call leaves behind: nothing."""

    def test_memory(self) -> None:
        """A thousand of each way through it leave no memory taken."""
        row = wire_row([(column, "some text that is not shared") for column in USERS.columns])
        latin = wire_row([(column, "\xff".encode("latin-1")) for column in USERS.columns])
        bodies = [
            (row, 1, USERS),
            (row * 3, 4, USERS),
            (row + latin, 2, USERS),
            (row + b"\0", 1, USERS),
            (row[:-1], 1, USERS),
            (wire_row([(column, "a\0") for column in USERS.columns]), 1, USERS),
            (struct.pack("<i", 0), 1, USERS),
            (wire_row([("a", "x")]) + bytes(4), 2, OPTIONAL),
        ]
        encoded: list[Any] = [
            ("1", "two", "ñ", "🧉"),
            ("1", "two", "\ud800", ""),
            ("1", "two"),
            ("1", None, "2", "3"),
        ]

        def every_way() -> None:
            for body, count, table in bodies:
                outcome(self.codec.decode_rows, body, 0, count, table)
                outcome(self.codec.copy_text, body, 0, count, table, 1)
            for cells in encoded:
                outcome(self.codec.encode_row, cells, USERS)

        def taken() -> int:
            gc.collect()
            return tracemalloc.get_traced_memory()[0]

        tracemalloc.start()
        self.addCleanup(tracemalloc.stop)
        every_way()
        before = taken()
        for _ in range(1000):
            every_way()
        # A leaked row or an error of each round would be some hundred bytes a thousand times.
        self.assertLess(taken() - before, 20_000)

    def test_memory_of_a_malformed_body(self) -> None:
        """One that is malformed at its very end takes no more than with the pure codec alone."""
        row = wire_row([(column, "some text that is not shared") for column in USERS.columns])

        def peak(codec: ModuleType) -> int:
            tracemalloc.start()
            try:
                outcome(codec.decode_rows, row * 1000 + b"\0", 0, 1000, USERS)
                return tracemalloc.get_traced_memory()[1]
            finally:
                tracemalloc.stop()

        self.assertLess(peak(self.codec), 1.2 * peak(pure))

    def test_the_collector_has_no_rows_to_look_at(self) -> None:
        """Rows are of no interest to the garbage collector, however many a batch holds."""
        body = wire_row([(column, "1") for column in USERS.columns])
        (row,) = self.codec.decode_rows(body, 0, 1, USERS)
        self.assertFalse(gc.is_tracked(row))

    def test_the_collector_sees_no_row_in_the_making(self) -> None:
        """What runs during a collection finds no row with empty cells."""
        row = wire_row([(column, "1") for column in FULLEST.columns[1:]] + [("c0", b"\xff")])
        found: list[int] = []

        def look(phase: str, info: dict[str, int]) -> None:
            # To read such a cell ends the process, so it is left at counting the tuples.
            tuples = [thing for thing in gc.get_objects() if type(thing) is tuple]
            found.append(sum(len(thing) == len(FULLEST.columns) for thing in tuples))

        # What the other tests have left is no part of what is looked at.
        gc.collect()
        gc.freeze()
        self.addCleanup(gc.unfreeze)
        look("before", {})
        # The error of the last cell is what makes it collect, where collections begin in between.
        threshold = gc.get_threshold()
        self.addCleanup(gc.set_threshold, *threshold)
        gc.callbacks.append(look)
        self.addCleanup(gc.callbacks.remove, look)
        gc.set_threshold(1)
        for _ in range(20):
            outcome(self.codec.decode_rows, row, 0, 1, FULLEST)
        gc.set_threshold(*threshold)
        self.assertGreater(len(found), 1)
        self.assertEqual(set(found), {found[0]})

    def test_tables(self) -> None:
        """A program that makes a table for each batch is not kept from freeing them."""
        made = []
        for _ in range(200):
            table = Table(Opcode.DATA_BATCH, "t", ("a",))
            self.codec.decode_rows(wire_row([("a", "1")]), 0, 1, table)
            made.append(weakref.ref(table))
        del table
        gc.collect()
        self.assertLess(sum(reference() is not None for reference in made), 100)
