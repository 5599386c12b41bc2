"""A store is copied into another: all of it, whatever kind the two are."""

from __future__ import annotations

from contextlib import closing
from typing import Any
from unittest.mock import patch

from hypothesis import given, settings
from hypothesis import strategies as st

from cafeteria_orch.admin import copying
from cafeteria_orch.admin.writing import PostgreSQLTarget, SQLiteTarget
from cafeteria_orch.store.location import store_at
from cafeteria_orch.wire.messages import TableBatch
from tests.support.copies import (
    LONG_AND_SHORT,
    CopyTestCase,
    File,
    Shared,
    a_session,
    contents,
    end,
    fill,
    fill_with_samples,
    forget,
    received,
    samples,
)
from tests.support.stores import NOW, NOW_TEXT, store_batch
from tests.support.strategies import table_batches
from tests.support.tracing import untraced


class FileToFile(CopyTestCase):
    """What holds for every kind of source and target; here, from SQLite to SQLite."""

    def test_everything_is_copied(self) -> None:
        """Sessions, batches, rows and ends of tables, and what the view makes of them."""
        fill_with_samples(self.source)
        outcome = self.assert_copied()
        rows = 3 * sum(batch.amount for batch in samples())
        self.assertEqual(outcome.summary["copied"], {"batches": 3 * len(samples()), "rows": rows})
        self.assertEqual(self.source.query("SELECT count(*) FROM batch"), [(3 * len(samples()),)])

    def test_an_empty_store(self) -> None:
        """There is nothing to copy, and the target is a store."""
        fill(self.source, [], a_session())
        self.assert_copied()

    def test_what_is_sent_again_is_still_a_duplicate(self) -> None:
        """In the target a client's batches are known; new ones get new ids."""
        fill_with_samples(self.source)
        self.assert_copied()
        self.assertEqual(set(fill(self.target, samples(), a_session(1))), {False})
        self.assertEqual(fill(self.target, [received(number=99)], a_session(1)), [True])
        ((newest,),) = self.target.query("SELECT max(id) FROM batch WHERE batch_number = 99")
        self.assertGreater(newest, 3 * len(samples()))

    def test_the_next_run_copies_the_rest(self) -> None:
        """What the source has got since: batches, ends of tables, the end of a session."""
        with closing(store_at(self.source.location).open()) as database:
            session = a_session(1)
            with database.transaction():
                store_batch(database, received(), session, NOW)
                database.end_table("users", session, NOW)
            self.assert_copied()
            with database.transaction():
                store_batch(database, received(number=2), session, NOW)
                database.end_table("users", session, NOW + 5)
                session.agency_id = 4
                database.finish_session(session, NOW + 6)
            outcome = self.assert_copied()
        self.assertEqual(outcome.summary["copied"], {"batches": 1, "rows": 1})
        self.assertEqual(self.assert_copied().summary["copied"], {"batches": 0, "rows": 0})

    def test_what_is_forgotten_is_copied_without_rows(self) -> None:
        """The batch stays a duplicate there, unless it may be sent again."""
        fill_with_samples(self.source)
        forget(self.source, 1)
        forget(self.source, 2, resend=True)
        outcome = self.assert_copied()
        rows = sum(batch.amount for batch in samples()) * 3 - 18
        self.assertEqual(outcome.summary["copied"]["rows"], rows)
        again = fill(self.target, samples()[:3], a_session(1))
        self.assertEqual(again, [False, True, False])

    def test_what_is_forgotten_after_a_copy_is_forgotten_by_the_next(self) -> None:
        """Everything else that was copied stays; a second forgetting frees the key there, too."""
        fill_with_samples(self.source)
        self.assert_copied()
        forget(self.source, 1)
        forget(self.source, 7)
        self.assertEqual(self.assert_copied().summary["copied"], {"batches": 0, "rows": 0})
        forget(self.source, 7, resend=True)
        self.assert_copied()
        found = self.target.query(
            f"SELECT id, client_id FROM batch WHERE forgotten_at = '{NOW_TEXT}'"
        )
        self.assertEqual({number for number, _ in found}, {1, 7})
        self.assertIn((7, None), found)

    def test_what_is_forgotten_in_the_target_alone_is_a_difference(self) -> None:
        """Somebody has done it there: it is told, and not undone."""
        fill(self.source, [received(), received(number=2)], a_session(1))
        self.assert_copied()
        forget(self.target, 2)
        outcome = self.copy()
        self.assertEqual(outcome.status, 1)
        self.assertIn("batch 2 or its rows are not the same in the target", outcome.err)

    def test_the_identity_moves(self) -> None:
        """Who knows the source takes the target for the same store; so with an older copy."""
        fill(self.source, [received()], a_session(1))
        self.assert_copied()
        self.source.query("UPDATE identity SET id = 'another'")
        self.assert_copied()
        with closing(store_at(self.target.location).open()):
            self.assertEqual(self.target.query("SELECT id FROM identity"), [("another",)])

    def test_an_interrupted_copy_goes_on(self) -> None:
        """Ctrl-C ends it with a line that says how to go on; what was committed stays."""
        fill_with_samples(self.source)
        batches = 3 * len(samples())
        written: list[object] = []
        target_class: Any = SQLiteTarget if self.target_kind is File else PostgreSQLTarget
        write = target_class.write_batches

        def interrupted(target: object, table: object, group: object) -> object:
            if len(written) == 5:
                raise KeyboardInterrupt
            written.append(group)
            return write(target, table, group)

        with patch.object(copying, "MAX_BATCHES", 1):
            with patch.object(target_class, "write_batches", interrupted):
                outcome = self.copy()
            self.assertEqual(outcome.status, 1)
            self.assertIn("interrupted; run it again to copy the rest\n", outcome.err)
            self.assertEqual(self.target.query("SELECT count(*) FROM batch"), [(5,)])
        self.assertEqual(self.assert_copied().summary["copied"]["batches"], batches - 5)

    def test_contents_of_something_else_are_left_alone(self) -> None:
        """A target that a server has stored in is refused, and keeps what it has."""
        fill_with_samples(self.source)
        fill(self.target, [received(rows=[("other",) * 4])], a_session(5))
        before = contents(self.target)
        outcome = self.copy()
        self.assertEqual((outcome.status, outcome.out), (1, ""))
        self.assertIn("has contents already: name an empty one", outcome.err)
        self.assertEqual(contents(self.target), before)

    def test_a_copy_of_another_store_is_left_alone(self) -> None:
        """Also if both have sessions or batches of the same ids."""
        other = self.source_kind(self)
        fill(other, [received(rows=[("other",) * 4])], a_session(1))
        fill(self.source, [received()], a_session(1))
        third = self.source_kind(self)
        fill(third, [received(rows=[("other",) * 4])], a_session(2))
        self.assert_copied()
        before = contents(self.target)
        for place, what in ((other, "batch 1"), (third, "session 1")):
            self.source = place
            outcome = self.copy()
            self.assertEqual(outcome.status, 1)
            self.assertIn(f"{what} of ", outcome.err)
            self.assertIn("is no copy of that store", outcome.err)
            self.assertEqual(contents(self.target), before)

    def test_a_batch_that_the_source_has_lost(self) -> None:
        """Then the target has more than the source: it may be the copy of another one."""
        fill(self.source, [received(number=number) for number in range(3)], a_session(1))
        self.assert_copied()
        self.source.query("DELETE FROM users WHERE batch_id = 3")
        self.source.query("DELETE FROM batch WHERE id = 3")
        self.assertIn("batch 3 of ", self.copy().err)

    def test_differences_are_found(self) -> None:
        """A cell, a row, a session and an end of a table that are not the same any more."""
        fill_with_samples(self.source)
        self.assert_copied()
        for change, problem in (
            ("UPDATE users SET gender = 'x' WHERE batch_id = 9", "batch 9 or its rows"),
            (
                "DELETE FROM stores WHERE batch_id = 2",
                "table stores has 27 rows in the source and",
            ),
            ("UPDATE session SET node = 'x' WHERE id = 2", "session 2 is not the same"),
            (
                "INSERT INTO table_eof VALUES (2, 'users', 'x', 1)",
                "an end of a table in session 2",
            ),
            (
                "INSERT INTO rejection VALUES (2, 8, 'rejected', 1, 1, 'x')",
                "a rejection in session 2",
            ),
        ):
            self.target.query(change)
            outcome = self.copy("--json")
            self.assertEqual((outcome.status, outcome.summary["complete"]), (1, False))
            self.assertIn(problem, "\n".join(outcome.summary["differences"]))
            self.assertIn(problem, outcome.err)

    def test_rows_without_a_batch_are_missed(self) -> None:
        """Somebody has put them there: no batch brings them to the target."""
        fill(self.source, [received()], a_session(1))
        self.source.query("INSERT INTO users (batch_id, gender) VALUES (0, 'x')")
        outcome = self.copy()
        self.assertEqual(outcome.status, 1)
        self.assertIn("table users has 2 rows in the source and 1 in the target", outcome.err)


class FileToShared(FileToFile):
    """From SQLite to PostgreSQL."""

    target_kind = Shared


class SharedToFile(FileToFile):
    """From PostgreSQL to SQLite."""

    source_kind = Shared


class SharedToShared(FileToFile):
    """From PostgreSQL to PostgreSQL."""

    source_kind = target_kind = Shared


class Files(CopyTestCase):
    """What only files have."""

    def test_rows_that_do_not_stand_in_order(self) -> None:
        """What somebody has put there by hand comes in the order of the batches all the same."""
        fill(self.source, [received(number=number) for number in range(3)], a_session(1))
        self.source.query("DELETE FROM users WHERE batch_id = 1")
        self.source.query("INSERT INTO users (batch_id, gender) VALUES (1, 'male')")
        self.assert_copied()

    def test_rows_in_another_order_are_a_difference(self) -> None:
        """Both databases keep the order of a batch's rows."""
        fill(self.source, [received(rows=LONG_AND_SHORT)], a_session(1))
        self.assert_copied()
        swap = "UPDATE users SET user_id = CASE user_id WHEN '1' THEN '2' ELSE '1' END"
        self.target.query(f"{swap}, gender = '' WHERE user_id IN ('1', '2')")
        self.source.query("UPDATE users SET gender = '' WHERE user_id IN ('1', '2')")
        self.assertIn("batch 1 or its rows are not the same", self.copy().err)

    def test_a_cell_that_is_a_blob(self) -> None:
        """No server stores one: it ends the copy with a line."""
        fill(self.source, [received()], a_session(1))
        self.source.query("UPDATE users SET gender = x'00'")
        outcome = self.copy()
        self.assertEqual((outcome.status, outcome.err.count("\n")), (1, 1))
        self.assertIn("a cell of batch 1 is a BLOB", outcome.err)

    def test_a_target_that_has_gone_on(self) -> None:
        """It may have what the source has not, unless the source has more, too."""
        fill(self.source, [received()], a_session(1))
        self.assert_copied()
        fill(self.target, [received(number=2)], a_session(1))
        self.assertEqual(self.copy().status, 0)
        fill(self.source, [received(number=3)], a_session(1))
        outcome = self.copy()
        self.assertEqual(outcome.status, 1)
        self.assertIn("a server has stored in ", outcome.err)
        self.assertIn("copy it into an empty store", outcome.err)


class IntoPostgreSQL(CopyTestCase):
    """What a shared database refuses, and what servers store there meanwhile."""

    target_kind = Shared

    def test_a_batch_that_cannot_be_stored(self) -> None:
        """It is named, with the reason; all others are copied. The next run says the same."""
        batches = [received(number=number, rows=[("a",) * 4] * 3) for number in range(5)]
        batches[2] = received(number=2, rows=[("a", "\0", "", "")] * 2)
        fill(self.source, batches, a_session(1))
        for copied in (4, 0):
            outcome = self.copy("--json")
            self.assertEqual((outcome.status, outcome.summary["complete"]), (1, False))
            self.assertEqual(outcome.summary["copied"]["batches"], copied)
            why = "PostgreSQL text fields cannot contain NUL (0x00) bytes"
            self.assertEqual(outcome.summary["not_copied"], {"3": why})
            self.assertEqual(outcome.summary["differences"], [])
            self.assertEqual(
                outcome.summary["tables"]["users"], {"source": 14, "target": 12, "left_out": 2}
            )
            self.assertIn(f"batch 3 is not copied: {why}\n", outcome.err)

    def test_a_batch_without_its_session(self) -> None:
        """PostgreSQL does not take it."""
        fill(self.source, [received()], a_session(1))
        fill(self.source, [received()], a_session(2))
        self.source.query("DELETE FROM session WHERE id = 1")
        outcome = self.copy("--json")
        self.assertEqual(outcome.status, 1)
        self.assertEqual([*outcome.summary["not_copied"]], ["1"])
        self.assertEqual(self.target.query("SELECT id FROM batch"), [(2,)])

    def test_a_server_that_stores_in_the_target_meanwhile(self) -> None:
        """Its batches are kept, beside those that come later; what was sent to both is there once.

        A client that has ended a table there has a complete table when all is copied.
        """
        first, second = received(number=1), received(number=2, rows=[("b",) * 4])
        fill(self.source, [first], a_session(1))
        self.assert_copied()
        self.assertEqual(fill(self.target, [second, first], a_session(1)), [True, False])
        end(self.target, a_session(1), "users", agency_id=3)
        third = received(number=3)
        fill(self.source, [second, third], a_session(1))
        outcome = self.copy("--json")
        self.assertEqual((outcome.status, outcome.err), (0, outcome.err))
        self.assertEqual(outcome.summary["copied"], {"batches": 1, "rows": 1})
        self.assertEqual(outcome.summary["sent_to_both"], [2])
        found = self.target.query("SELECT batch_number FROM batch ORDER BY batch_number")
        self.assertEqual(found, [(1,), (2,), (3,)])
        self.assertEqual(self.target.query("SELECT count(*) FROM users"), [(3,)])
        self.assertEqual(
            self.target.query("SELECT DISTINCT complete FROM ingest_status"), [(True,)]
        )
        self.assertEqual(self.copy().status, 0)

    def test_a_table_that_was_ended_before_its_batches_were_copied(self) -> None:
        """The client had sent them by then, to the server of the source."""
        fill(self.source, [received(number=1)], a_session(1))
        self.assert_copied()
        end(self.target, a_session(1), "users")
        fill(self.source, [received(number=2)], a_session(1))
        self.assertEqual(self.copy().status, 0)
        found = self.target.query("SELECT DISTINCT complete FROM ingest_status")
        self.assertEqual(found, [(True,)])


class FromPostgreSQL(CopyTestCase):
    """What only servers that share a database do."""

    source_kind = Shared

    def test_a_batch_that_was_committed_late(self) -> None:
        """Of two servers, the one that has the lower id may commit later: the next run has it."""
        fill(self.source, [received(number=1)], a_session(1))
        insert = (
            "INSERT INTO batch OVERRIDING SYSTEM VALUE SELECT {}, session_id, client_id, opcode,"
            " {}, status, amount, digest, received_at FROM batch WHERE id = 1"
        )
        self.source.query(insert.format(9, 9))
        self.source.query("INSERT INTO users SELECT 9, 'nine' FROM users")
        self.assert_copied()
        self.source.query(insert.format(5, 5))
        self.source.query("INSERT INTO users SELECT 5, 'five' FROM users LIMIT 1")
        self.assertEqual(self.assert_copied().summary["copied"], {"batches": 1, "rows": 1})


class AnyCells(CopyTestCase):
    """There and back again, with whatever a client may have sent."""

    @untraced
    @settings(max_examples=12)
    @given(st.lists(table_batches(), max_size=6), st.booleans())
    def test_there_and_back(self, batches: list[TableBatch], known: bool) -> None:
        """What PostgreSQL can store is the same after a copy there and back."""
        first, between, last = File(self), Shared(self), File(self)
        storable = [
            each for each in batches if "\0" not in "".join(filter(None, sum(each.rows, ())))
        ]
        session = a_session(1 if known else None)
        fill(
            first,
            [received(each.table, each.rows, each.batch_number) for each in storable],
            session,
        )
        self.source, self.target = first, between
        self.assert_copied()
        self.source, self.target = between, last
        self.assert_copied()
        for name, rows in contents(first).items():
            self.assertEqual(contents(last)[name], rows, name)
