"""The WAL stays bounded: when idle, under load, and when a reader will not end."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from threading import Event, Thread
from time import monotonic

from twisted.logger import LogEvent, capturedLogs, formatEvent
from twisted.trial.unittest import SynchronousTestCase

from cafeteria_orch.store import sqlite as database_module
from cafeteria_orch.store import writer as writer_module
from cafeteria_orch.store.sqlite import WAL_SIZE_LIMIT, Database
from tests.support.builders import SUCCESS, USER_ROW, batch_frame, connect
from tests.support.stores import PassingTime, SinkTestCase

INTERVAL = 0.02
PATIENCE = 0.25
# About 90 MiB are written; without a checkpoint that waits for readers, 60 stay in the WAL.
MAX_UNDER_LOAD = 32 << 20


class SizeLimitTests(SynchronousTestCase):
    """The setting itself."""

    def test_setting(self) -> None:
        """The limit holds on the connection that writes, which is the one that it counts for."""
        with closing(Database(self.mktemp())) as database:
            self.assertEqual(database._pragma("journal_size_limit"), WAL_SIZE_LIMIT)


class WalTestCase(SinkTestCase):
    """A store whose checkpoints come often, and one client of it."""

    interval = INTERVAL
    reactor_class = PassingTime

    def setUp(self) -> None:
        super().setUp()
        self.patch(writer_module, "CHECKPOINT_INTERVAL", self.interval)
        self.patch(writer_module, "READER_PATIENCE", PATIENCE)
        self.start()
        self.wal = Path(f"{self.path}-wal")
        self.protocol, self.transport = connect(self.factory)
        self.sent = 0

    def store(self, rows: int = 1) -> None:
        """Have one more batch stored."""
        self.transport.clear()
        self.sent += 1
        frame = batch_frame(batch_number=self.sent, rows=[USER_ROW] * rows)
        self.protocol.dataReceived(frame)
        self.assertEqual(self.pump_answers(self.transport), [SUCCESS])

    def wal_bytes(self) -> int:
        return self.wal.stat().st_size

    def await_empty_wal(self) -> None:
        self.reactor.pump_until(lambda: self.wal_bytes() == 0)

    @contextmanager
    def reader(self) -> Iterator[None]:
        """Someone who reads the store, and holds on to what it was at the start.

        What is stored meanwhile stays in the WAL; what was stored before may have left it.
        """
        with closing(sqlite3.connect(self.path, isolation_level=None)) as connection:
            connection.execute("BEGIN")
            connection.execute("SELECT count(*) FROM batch").fetchone()
            yield

    def blocked(self, events: Sequence[LogEvent]) -> list[LogEvent]:
        return [event for event in events if "action: checkpoint" in formatEvent(event)]


class IdleTests(WalTestCase):
    """A store that nobody writes to or reads from."""

    def test_cut_back(self) -> None:
        """What was committed is brought into the file, and the WAL is cut back to nothing."""
        self.store()
        self.await_empty_wal()
        self.assertEqual(self.batch_numbers(), [1])
        with self.reader():
            self.store()
            self.assertGreater(self.wal_bytes(), 0)
        self.await_empty_wal()

    def test_empty_wal_is_left_alone(self) -> None:
        """An idle store costs nothing: the WAL that is empty is not looked at again."""
        self.store()
        self.await_empty_wal()
        self.reactor.pump_for(2 * INTERVAL)
        checkpoints: list[Database] = []

        def checkpoint(database: Database) -> bool:
            checkpoints.append(database)
            return True

        self.patch(Database, "checkpoint", checkpoint)
        self.reactor.pump_for(10 * INTERVAL)
        self.assertEqual(checkpoints, [])
        self.store()
        self.reactor.pump_until(lambda: checkpoints)

    def test_checkpoint_that_fails(self) -> None:
        """One that fails costs nothing: the next one makes up for it, the writer goes on."""
        failures = [sqlite3.OperationalError("disk I/O error")] * 3
        checkpoint = Database.checkpoint

        def failing(database: Database) -> bool:
            if failures:
                raise failures.pop()
            return checkpoint(database)

        self.patch(Database, "checkpoint", failing)
        self.store()
        self.await_empty_wal()
        self.assertEqual(failures, [])
        self.store()


class ReaderTests(WalTestCase):
    """Somebody reads the store, and takes long."""

    def test_noticed(self) -> None:
        """A reader that stays is logged, with the WAL's size, once per patience."""
        with capturedLogs() as events, self.reader():
            started = monotonic()
            self.store(rows=500)
            self.reactor.pump_until(lambda: len(self.blocked(events)) == 3)
            lasted = monotonic() - started
            wal_bytes = self.wal_bytes()
        self.assertGreaterEqual(lasted, 3 * PATIENCE)
        self.assertGreater(wal_bytes, 4096)
        for event in self.blocked(events):
            self.assertEqual(event["log_level"].name, "warn")
            text = formatEvent(event)
            self.assertRegex(text, rf"wal_bytes: {wal_bytes} \| error: .*\breader\b")

    def test_noticed_while_batches_come(self) -> None:
        """The same in a store that is never idle, whose WAL grows from line to line."""
        with capturedLogs() as events, self.reader():
            while len(self.blocked(events)) < 2:
                self.store(rows=50)
        sizes = re.findall(r"wal_bytes: (\d+)", "".join(map(formatEvent, events)))
        self.assertLess(int(sizes[0]), int(sizes[1]))

    def test_noticed_by_the_name_it_was_given(self) -> None:
        """The size is the WAL's also where the store was named by a symbolic link."""
        link = Path(self.mktemp())
        link.symlink_to(Path(self.path).absolute())
        with closing(Database(str(link))) as database:
            self.store()
            self.assertEqual(database.wal_bytes(), self.wal_bytes())

    def test_end_of_reader(self) -> None:
        """When it ends the WAL is cut back, and nothing more is said."""
        with capturedLogs() as events:
            with self.reader():
                self.store()
                self.reactor.pump_until(lambda: self.blocked(events))
            self.await_empty_wal()
            said = len(self.blocked(events))
            self.store()
            self.reactor.pump_for(1.5 * PATIENCE)
        self.assertEqual(len(self.blocked(events)), said)

    def test_short_readers(self) -> None:
        """Readers that come and go are not logged, however many there are."""
        # Each of them blocks a checkpoint, which does not wait for its end.
        self.patch(database_module, "CHECKPOINT_PATIENCE", 0.0)
        with capturedLogs() as events:
            for _ in range(8):
                with self.reader():
                    self.store()
                    self.reactor.pump_for(PATIENCE / 4)
                self.await_empty_wal()
        self.assertEqual(self.blocked(events), [])


class LoadTests(WalTestCase):
    """Batches come without a pause."""

    interval = 0.5

    def store_under_readers(self, readers: int, reading: float, mebibytes: int) -> int:
        """Write and read at once; the most bytes that the WAL grew to."""
        done = Event()

        def read() -> None:
            while not done.is_set():
                with self.reader():
                    done.wait(reading)

        threads = [Thread(target=read) for _ in range(readers)]
        most = 0
        try:
            for thread in threads:
                thread.start()
                done.wait(reading / readers)
            for _ in range(mebibytes * 4):
                self.store(rows=4000)
                most = max(most, self.wal_bytes())
        finally:
            done.set()
            for thread in threads:
                thread.join()
        return most

    def test_one_reader_at_a_time(self) -> None:
        """With readers that come and go the WAL stays far below what is written."""
        self.assertLess(self.store_under_readers(1, 0.05, 24), MAX_UNDER_LOAD)
        self.await_empty_wal()

    def test_readers_that_overlap(self) -> None:
        """The same where there is always some reader, none of them for long."""
        self.assertLess(self.store_under_readers(3, 0.05, 24), MAX_UNDER_LOAD)
        self.await_empty_wal()


class LimitTests(WalTestCase):
    """Without a checkpoint of ours."""

    interval = 3600.0

    def setUp(self) -> None:
        self.patch(database_module, "WAL_SIZE_LIMIT", 1 << 20)
        super().setUp()

    def test_limit(self) -> None:
        """A WAL that grew because of a reader is cut back to the limit when it starts again."""
        with self.reader():
            while not self.sent or self.wal_bytes() < 6 << 20:
                self.store(rows=4000)
        for _ in range(3):
            self.store()
        self.assertLessEqual(self.wal_bytes(), 1 << 20)
