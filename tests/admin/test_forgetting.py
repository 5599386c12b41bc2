"""``cafeorch store forget``: which rows go, what stays, and what is known of them afterwards."""

from __future__ import annotations

import io
from contextlib import closing
from pathlib import Path
from unittest.mock import patch

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from cafeteria_orch.admin import forgetting
from cafeteria_orch.admin.connections import SQLiteConnection
from cafeteria_orch.admin.forgetting import BatchRows, Forgetting, Selection, open_store
from cafeteria_orch.store.location import store_at
from cafeteria_orch.wire.tables import STORES, TABLES, USERS
from tests.support.copies import (
    File,
    Outcome,
    Place,
    Shared,
    a_session,
    cafeorch,
    contents,
    fill,
    fill_with_samples,
    received,
    samples,
)
from tests.support.older_stores import make_older_shared_store, make_older_store
from tests.support.stores import NOW, store_batch

BEFORE_ALL, BETWEEN, AFTER_ALL = "2023-11-14", "2023-11-14 22:13:20.260", "2023-11-15"
"""Days and a moment: the batches come at 22:13:20.250 that day, UTC, or later."""


class ForgetTestCase(SynchronousTestCase):
    """A store of some kind."""

    kind: type[Place] = File

    def setUp(self) -> None:
        self.place = self.kind(self)

    def forget(self, *options: str, store: str | None = None) -> Outcome:
        return cafeorch("store", "forget", store or self.place.location, *options)

    def forgotten(self) -> list[int]:
        """The batches that are marked."""
        found = self.place.query("SELECT id FROM batch WHERE forgotten_at IS NOT NULL ORDER BY id")
        return [number for (number,) in found]

    def ids_of_rows(self, table: str = "users") -> list[int]:
        """The batches that have rows."""
        found = self.place.query(f"SELECT DISTINCT batch_id FROM {table} ORDER BY 1")
        return [number for (number,) in found]

    def assert_forgotten(self, *expected: int) -> None:
        """These are marked and have no rows; all others have theirs."""
        self.assertEqual(self.forgotten(), [*expected])
        for table in TABLES:
            there = self.place.query(
                f"SELECT id, amount FROM batch WHERE opcode = {table.opcode:d} AND amount > 0"
                " AND forgotten_at IS NULL ORDER BY id"
            )
            rows = self.place.query(
                f"SELECT batch_id, count(*) FROM {table.name} GROUP BY 1 ORDER BY 1"
            )
            self.assertEqual(rows, there, table.name)


class Forget(ForgetTestCase):
    """What holds in both databases; here, in a file."""

    def test_batches(self) -> None:
        """Their rows go, of whatever table; everything else stays as it was."""
        fill_with_samples(self.place)
        before = contents(self.place)
        outcome = self.forget("--batch", "1", "9", "11", "--yes")
        self.assertEqual(outcome.status, 0, outcome.err)
        found = [line.split() for line in outcome.out.splitlines()]
        expected = [["menu_items", "1", "9"], ["stores", "1", "9"], ["users", "1", "1"]]
        self.assertEqual(found, [["table", "batches", "rows"], *expected])
        self.assert_forgotten(1, 9, 11)
        after = contents(self.place)
        for name, rows in before.items():
            if name in {"session", "table_eof", "rejection", "identity"}:
                self.assertEqual(after[name], rows, name)
        for old, new in zip(before["batch"], after["batch"]):
            self.assertEqual(new[:-1], old[:-1])

    def test_what_is_sent_again_is_a_duplicate(self) -> None:
        """The key stays: nothing is stored again."""
        fill(self.place, samples(), a_session(1))
        self.forget("--batch", "1", "3", "--yes")
        self.assertEqual(set(fill(self.place, samples(), a_session(1))), {False})
        self.assert_forgotten(1, 3)

    def test_resend(self) -> None:
        """With it the key goes, also of a batch that was forgotten before, and it is stored again."""
        fill(self.place, samples(), a_session(1))
        self.forget("--batch", "1", "3", "--yes")
        self.place.query("UPDATE batch SET forgotten_at = 'first' WHERE id = 1")
        outcome = self.forget("--batch", "1", "2", "--resend", "--yes", "--json")
        removed = outcome.summary["removed"]
        self.assertEqual(removed["menu_items"], {"batches": 1, "rows": 0})
        self.assertEqual(removed["stores"], {"batches": 1, "rows": 9})
        self.assert_forgotten(1, 2, 3)
        again = fill(self.place, samples(), a_session(1))
        self.assertEqual([*map(again.index, (True, False))], [0, 2])
        self.assertEqual(again.count(True), 2)
        self.assert_forgotten(1, 2, 3)
        kept = self.place.query("SELECT forgotten_at FROM batch WHERE id = 1")
        self.assertEqual(kept, [("first",)])
        outcome = self.forget("--batch", "1", "2", "--resend", "--yes")
        self.assertEqual(outcome.out, "There is nothing to remove.\n")

    def test_sessions(self) -> None:
        """All batches of some sessions."""
        for number in (1, 2, 3):
            fill(self.place, [received(number=1), received(number=2)], a_session(number))
        self.forget("--session", "1", "3", "--yes")
        self.assert_forgotten(1, 2, 5, 6)
        status = self.place.query(
            "SELECT session_id, batches, rows, forgotten_batches FROM ingest_status ORDER BY 1"
        )
        self.assertEqual(status, [(1, 0, 0, 2), (2, 2, 2, 0), (3, 0, 0, 2)])

    def test_before(self) -> None:
        """All that came before a moment of UTC, or of the zone that it says."""
        fill(self.place, [received(number=number) for number in range(4)], a_session(1))
        self.place.query("UPDATE batch SET received_at = '2023-11-14 22:13:20.260' WHERE id > 2")
        for date, expected in (
            (BEFORE_ALL, []),
            ("2023-11-14 23:13:20.250+01:00", []),
            (BETWEEN, [1, 2]),
            ("2023-11-14 23:13:20.261+01:00", [1, 2, 3, 4]),
            (AFTER_ALL, [1, 2, 3, 4]),
        ):
            self.assertEqual(self.forget("--before", date, "--yes").status, 0)
            self.assert_forgotten(*expected)

    def test_again(self) -> None:
        """There is nothing left to do, and the time of the first is kept."""
        fill(self.place, [received()], a_session(1))
        self.forget("--batch", "1", "--yes")
        before = contents(self.place)
        outcome = self.forget("--batch", "1")
        self.assertEqual((outcome.status, outcome.out), (0, "There is nothing to remove.\n"))
        self.assertEqual(contents(self.place), before)

    def test_what_comes_meanwhile_is_kept(self) -> None:
        """The operator was told of what there was."""
        fill(self.place, [received(number=1)], a_session(1))
        with closing(open_store(self.place.location)) as connection:
            selection = Selection(before="2100-01-01")
            ready = Forgetting(connection, selection, resend=False)
            fill(self.place, [received(number=2)], a_session(1))
            ready.run("now", lambda _: None)
        self.assert_forgotten(1)

    def test_interrupted(self) -> None:
        """What is done is done; the next run does the rest."""
        fill(self.place, [received(number=number) for number in range(6)], a_session(1))
        remove, done = forgetting.remove_rows, []

        def interrupted(*parameters: object) -> int:
            removed = remove(*parameters)  # type: ignore[arg-type]
            done.append(removed)
            if len(done) == 3:
                raise KeyboardInterrupt
            return removed

        with (
            patch.object(forgetting, "BATCHES_AT_ONCE", 1),
            patch.object(forgetting, "remove_rows", interrupted),
        ):
            outcome = self.forget("--before", AFTER_ALL, "--yes")
        self.assertEqual(outcome.status, 1)
        self.assertIn("interrupted; run it again to remove the rest\n", outcome.err)
        self.assert_forgotten(1, 2)
        self.assertEqual(self.forget("--before", AFTER_ALL, "--yes").status, 0)
        self.assert_forgotten(1, 2, 3, 4, 5, 6)

    def test_beside_a_server(self) -> None:
        """A server that has the store open stores on."""
        with closing(store_at(self.place.location).open()) as database:
            session = a_session(1)
            for number in (1, 2):
                with database.transaction():
                    store_batch(database, received(number=number), session, NOW)
                if number == 1:
                    self.assertEqual(self.forget("--batch", "1", "--yes").status, 0)
        self.assert_forgotten(1)
        self.assertEqual(self.ids_of_rows(), [2])

    def test_a_file_is_left_to_its_server(self) -> None:
        """After each transaction, for longer than it took; PostgreSQL needs no such rest."""
        fill(self.place, [received(number=number) for number in range(3)], a_session(1))
        moments = iter([0.0, 0.25] * 3)
        with (
            patch.object(forgetting, "Event") as event,
            patch.object(forgetting, "monotonic_time", lambda: next(moments)),
        ):
            self.forget("--session", "1", "--yes")
        rests = [call.args for call in event.return_value.wait.call_args_list]
        self.assertEqual(rests, [(0.5,)] * 3 if self.kind is File else [])

    def test_it_asks(self) -> None:
        """It says what it removes, and removes it on a yes alone."""
        fill(
            self.place,
            [received(rows=[("a",) * 4] * 3), received(STORES, number=2, rows=[])],
            a_session(1),
        )
        for answer, status in (("n\n", 1), ("", 1), ("yes please\n", 1), ("y\n", 0)):
            self.assert_forgotten()
            with patch("sys.stdin", io.StringIO(answer)):
                outcome = self.forget("--session", "1")
            self.assertEqual(outcome.status, status)
            self.assertRegex(outcome.err, "stores +1 +0\n.*users +1 +3\n")
            self.assertIn("What is sent again is then a duplicate. [y/N] ", outcome.err)
            self.assertEqual("nothing is removed" in outcome.err, bool(status))
        self.assert_forgotten(1, 2)

    def test_what_is_not_there(self) -> None:
        """A batch or a session that does not exist is named, and nothing is removed."""
        fill(self.place, [received()], a_session(1))
        for option, what in (("--batch", "batch"), ("--session", "session")):
            outcome = self.forget(option, "1", "7", "8", "--yes")
            self.assertEqual((outcome.status, outcome.err.count("\n")), (1, 1))
            self.assertIn(f"there is no {what} 7 in ", outcome.err)
        self.assert_forgotten()

    def test_an_older_store(self) -> None:
        """It is left alone: only a server upgrades it."""
        if self.kind is File:
            make_older_store(Path(self.place.location), 5)
        else:
            make_older_shared_store(self.place.location, 2)
        outcome = self.forget("--batch", "1", "--yes")
        self.assertEqual((outcome.status, outcome.err.count("\n")), (1, 1))
        self.assertRegex(outcome.err, "has schema version [25], which forgets nothing: start a ")
        with closing(store_at(self.place.location).open()):
            pass
        self.assertEqual(self.forget("--batch", "1", "--yes").status, 0)
        self.assertEqual(self.ids_of_rows(), [2])


class ForgetInPostgreSQL(Forget):
    """The same of PostgreSQL."""

    kind = Shared


class Arguments(ForgetTestCase):
    """Mistakes end in one line that names them."""

    def test_mistakes(self) -> None:
        """What is to be forgotten is said in one way, and can be read."""
        fill(self.place, [received()], a_session(1))
        for options, problem in (
            ((), "one of the arguments --batch --session --before is required"),
            (("--batch", "1", "--before", AFTER_ALL), "not allowed with"),
            (("--batch", "0"), "'0' is not a number from 1 to"),
            (("--batch", "x"), "'x' is not a number from 1 to"),
            (("--before", "yesterday"), "'yesterday' is no date: write it as 2024-01-31"),
        ):
            outcome = self.forget(*options)
            self.assertEqual(outcome.status, 2)
            self.assertIn(problem, outcome.err)
        for store in (self.mktemp(), "postgresql://user:secret@127.0.0.1:1/x"):
            outcome = self.forget("--batch", "1", store=store)
            self.assertEqual((outcome.status, outcome.err.count("\n")), (1, 1), outcome.err)
            self.assertNotIn("secret", outcome.err)
        self.assert_forgotten()


class Finding(ForgetTestCase):
    """How the rows of a batch are found in a file."""

    def setUp(self) -> None:
        super().setUp()
        fill(self.place, [], a_session(1))
        self.connection = SQLiteConnection(self.place.location, read_only=False)
        self.addCleanup(self.connection.close)

    def remove(self, batch_id: int, rows: int) -> int:
        with self.connection.transaction():
            return forgetting.remove_rows(self.connection, USERS, [BatchRows(batch_id, rows)])

    @settings(max_examples=50, deadline=None)
    @given(st.data())
    def test_any_rows(self, data: st.DataObject) -> None:
        """They are all found, in order or not, wherever others were removed, and none else."""
        ids = data.draw(st.lists(st.integers(1, 9), max_size=40))
        if data.draw(st.booleans()):
            ids.sort()
        self.connection.execute("DELETE FROM users")
        for rowid, batch_id in enumerate(ids, data.draw(st.integers(1, 5))):
            if data.draw(st.integers(0, 4)):
                self.connection.execute(
                    f"INSERT INTO users (rowid, batch_id) VALUES ({rowid}, {batch_id})"
                )
        for batch_id in data.draw(st.permutations(range(1, 10))):
            count = f"SELECT count(*), count(CASE batch_id WHEN {batch_id} THEN 1 END) FROM users"
            ((before, wanted),) = self.connection.execute(count)
            self.assertEqual(self.remove(batch_id, wanted), wanted)
            self.assertEqual(self.connection.execute(count), [(before - wanted, 0)])

    def test_few_looks(self) -> None:
        """The rows of a batch in a long table are found without reading it."""
        self.place.query(
            "INSERT INTO users (batch_id) SELECT value / 100 + 1 FROM (WITH RECURSIVE r (value) AS"
            " (SELECT 0 UNION ALL SELECT value + 1 FROM r WHERE value < 99999) SELECT * FROM r)"
        )
        steps: list[None] = []
        self.connection.raw.set_progress_handler(lambda: steps.append(None), 100)
        self.assertEqual(self.remove(700, 100), 100)
        self.assertLess(len(steps), 200)
        self.assertEqual(self.remove(700, 1), 0)
        self.assertGreater(len(steps), 1000)
