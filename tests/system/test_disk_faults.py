"""The disk or the file fails while the server runs: FAIL in time, nothing lost, it recovers."""

from __future__ import annotations

import os
import random
import resource
import sqlite3
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

from twisted.logger import LogEvent, capturedLogs, formatEvent
from twisted.trial.unittest import SkipTest, SynchronousTestCase

from cafeteria_orch.store import writer as writer_module
from cafeteria_orch.store.outage import OUTAGE_INTERVAL
from cafeteria_orch.wire.messages import encode
from cafeteria_orch.wire.tables import STORES
from tests.support.builders import SUCCESS, USER_ROW, batch, batch_frame, connect
from tests.support.disks import (
    ServerProcess,
    delaying_syncs,
    fill_disk,
    holding,
    make_folder,
    mount_small_disk,
)
from tests.support.faults import RawClient, slow, wait_for
from tests.support.ports import reserve_port
from tests.support.stores import TRY_AGAIN, PassingTime, SinkTestCase

IMPATIENT = """
import runpy, sys
from cafeteria_orch.store import outage
outage.MAX_COMMIT_SECONDS = 1.0
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""Runs a server that does not wait for five seconds before it says that its store hangs."""

LARGE = [USER_ROW] * 4000
"""Rows that need room wherever they come to rest."""

STORE_ROW = ("1", "G Coffee", "Jalan 1", "50480", "Kuala Lumpur", "KL", "3.1", "101.7")


class DiskTestCase(SynchronousTestCase):
    """A server with a store in which there is one batch."""

    def start(self, folder: Path | None = None) -> None:
        self.store = (folder or make_folder(self)) / "store.sqlite3"
        self.server = ServerProcess(self, self.store)
        self.client = self.server.connect(self)
        self.client.store(batch_number=1)

    def assert_outage(self, begin: Callable[[], object], end: Callable[[], object]) -> None:
        """While it lasts every batch gets FAIL 1 in time; then all is as it was before."""
        begin()
        for number in range(2, 7):
            self.client.be_put_off(batch_number=number, rows=LARGE)
        end()
        # The same bytes again, over the same connection, to the same process.
        for number in range(2, 7):
            self.client.store(batch_number=number, rows=LARGE)
        self.assertEqual(self.server.stored(), [*range(1, 7)])
        self.client.close()
        self.server.stop()
        began, ended = self.server.complaints()
        self.assertRegex(began, r"#error\] action: store \| result: fail \| error: .*\w")
        self.assertRegex(ended, r"#warn\] action: store \| result: success \| refused: 5 \|")


class FullDiskTests(DiskTestCase):
    """There is no room left."""

    def test_full_file_system(self) -> None:
        """A full disk puts batches off, leaves no part of one, and ends when there is room."""
        folder = mount_small_disk(self, "8m")
        self.start(folder)

        def end() -> None:
            self.assertEqual(self.server.stored(), [1])
            filler.unlink()

        filler = folder / "filler"
        self.assert_outage(lambda: fill_disk(folder), end)

    def test_file_size_limit(self) -> None:
        """The same where it is the process that may write no longer files."""
        if not hasattr(resource, "prlimit"):
            raise SkipTest("the limits of another process cannot be set here")
        self.start()
        kind = resource.RLIMIT_FSIZE
        before = resource.prlimit(self.server.process.pid, kind)

        def limit(soft: int) -> None:
            resource.prlimit(self.server.process.pid, kind, (soft, before[1]))

        def end() -> None:
            self.assertEqual(self.server.stored(), [1])
            limit(before[0])

        self.assert_outage(lambda: limit(100_000), end)

    def test_small_batches_go_on(self) -> None:
        """A batch that does not fit costs itself: one that does is stored after it."""
        self.start(mount_small_disk(self, "256k"))
        self.client.be_put_off(batch_number=2, rows=LARGE)
        self.client.store(batch_number=3)
        self.assertEqual(self.server.stored(), [1, 3])


class LockedTests(DiskTestCase):
    """Another process has the store, and keeps it."""

    def test_locked(self) -> None:
        """A lock puts batches off, and is over when it is."""
        self.start()
        holder = holding(self.store, "BEGIN EXCLUSIVE")
        self.assert_outage(holder.__enter__, lambda: holder.__exit__(None, None, None))

    def test_many_clients(self) -> None:
        """Each of many clients hears in time: they do not wait for the lock in turn."""
        self.start()
        clients = [self.server.connect(self) for _ in range(30)]
        with holding(self.store, "BEGIN IMMEDIATE"):
            for number, client in enumerate(clients, 2):
                client.send_batch(batch_number=number)
            self.assertEqual({client.receive(within=2) for client in clients}, {b"\x02\x01"})

    def test_short_lock(self) -> None:
        """A lock that is over soon costs nobody anything."""
        self.start()
        with closing(sqlite3.connect(self.store, isolation_level=None)) as holder:
            holder.execute("BEGIN IMMEDIATE")
            self.client.send_batch(batch_number=2)
            time.sleep(0.2)
        self.assertEqual(self.client.receive(), b"\x01")
        self.assertEqual(self.server.complaints(), [])


class PatienceTests(DiskTestCase):
    """Outages that are waited out: clients in the field, which never send again, lose nothing."""

    def start(self, folder: Path | None = None) -> None:
        self.store = (folder or make_folder(self)) / "store.sqlite3"
        self.server = ServerProcess(self, self.store, "--store-patience=30")
        self.clients = [RawClient(self.server.port) for _ in range(8)]
        for client in self.clients:
            self.addCleanup(client.close)

    def assert_waited_out(
        self, begin: Callable[[], object], end: Callable[[], object], seconds: float
    ) -> None:
        """Batches are sent before, during and after; each gets its SUCCESS, and is stored."""
        begin()
        for number, client in enumerate(self.clients):
            client.send(encode(batch(batch_number=number, rows=LARGE)))
        time.sleep(seconds)
        for client in self.clients:
            self.assertRaises(TimeoutError, client.receive, 0.01)
        end()
        for number, client in enumerate(self.clients, 8):
            client.expect_success()
            client.send(encode(batch(batch_number=number)))
            client.expect_success()
        self.assertEqual(sorted(self.server.stored()), [*range(16)])
        self.server.stop()
        self.assertIn("result: success | refused: 0", self.server.complaints()[-1])

    def test_lock(self) -> None:
        """Another process holds a lock for longer than SQLite waits."""
        self.start()
        holder = holding(self.store, "BEGIN IMMEDIATE")
        self.assert_waited_out(holder.__enter__, lambda: holder.__exit__(None, None, None), 2)

    def test_full_disk(self) -> None:
        """The disk is full for a while."""
        folder = mount_small_disk(self, "64m")
        self.start(folder)
        self.assert_waited_out(lambda: fill_disk(folder), (folder / "filler").unlink, 2)

    def test_stop_during_an_outage(self) -> None:
        """A stop waits for the drain's time at most, and nothing is acknowledged or refused."""
        self.store = make_folder(self) / "store.sqlite3"
        options = ("--store-patience=30", "--drain-timeout=0.5")
        self.server = ServerProcess(self, self.store, *options)
        client = RawClient(self.server.port)
        self.addCleanup(client.close)
        with holding(self.store, "BEGIN IMMEDIATE"):
            client.send(encode(batch(batch_number=1)))
            self.assertRaises(TimeoutError, client.receive, 1)
            began = time.monotonic()
            self.server.stop()
            self.assertLess(time.monotonic() - began, 5)
            self.assertRaises(ConnectionError, client.receive)
        self.assertEqual(self.server.stored(), [])

    @slow
    def test_ten_seconds(self) -> None:
        """Both again, each for ten seconds."""
        self.start()
        holder = holding(self.store, "BEGIN IMMEDIATE")
        self.assert_waited_out(holder.__enter__, lambda: holder.__exit__(None, None, None), 10)
        folder = mount_small_disk(self, "64m")
        self.start(folder)
        self.assert_waited_out(lambda: fill_disk(folder), (folder / "filler").unlink, 10)


class ReadinessTests(DiskTestCase):
    """What a load balancer asks: it sends nothing while the answer is no."""

    def start(self, folder: Path | None = None, launcher: Sequence[str] = ()) -> None:
        self.store = make_folder(self) / "store.sqlite3"
        self.port = reserve_port(self)
        metrics = f"--metrics=tcp:{self.port}:interface=127.0.0.1"
        self.server = ServerProcess(self, self.store, metrics, launcher=launcher)
        self.client = self.server.connect(self)
        self.client.store(batch_number=1)

    def is_ready(self) -> bool:
        status, self.reason = self.server.readiness(self.port)
        return status == 200

    def test_ready_again_without_a_request(self) -> None:
        """After one refused batch the server is ready again when the lock is gone."""
        self.start()
        with holding(self.store, "BEGIN IMMEDIATE"):
            self.client.be_put_off(batch_number=2)
            self.assertFalse(self.is_ready())
            self.assertIn("locked", self.reason)
        wait_for(self.is_ready, "it is ready")
        self.assertEqual(self.server.stored(), [1])

    def test_sync_that_hangs(self) -> None:
        """While a sync hangs the server is not ready, says no FAIL, and goes on afterwards."""
        self.start(launcher=(sys.executable, "-c", IMPATIENT))
        with delaying_syncs(self.server.process.pid, 3):
            self.client.send_batch(batch_number=2)
            wait_for(lambda: not self.is_ready(), "it is not ready")
            self.assertIn("has not answered", self.reason)
            self.assertEqual(self.client.receive(), b"\x01")
        wait_for(self.is_ready, "it is ready")
        self.assertEqual(self.server.stored(), [1, 2])
        self.client.close()
        self.server.stop()
        began, ended = self.server.complaints()
        self.assertIn("store | result: fail | error: the store has not answered for 1 s", began)
        self.assertIn("store | result: success | refused: 0", ended)


class MovedTests(DiskTestCase):
    """The store is not where it was."""

    def setUp(self) -> None:
        self.start()
        self.away = make_folder(self)

    def move(self, pattern: str, source: Path, target: Path) -> None:
        for path in source.glob(pattern):
            path.rename(target / path.name)

    def assert_moving_is_an_outage(self, pattern: str) -> None:
        home = self.store.parent
        self.assert_outage(
            lambda: self.move(pattern, home, self.away),
            lambda: self.move(pattern, self.away, home),
        )

    def test_moved(self) -> None:
        """The file alone is moved away, and put back."""
        self.assert_moving_is_an_outage("*.sqlite3")

    def test_moved_with_its_wal(self) -> None:
        """The file is moved away with all that belongs to it, and put back."""
        self.assert_moving_is_an_outage("*.sqlite3*")

    def test_deleted(self) -> None:
        """What is stored in a file without a name is lost: nothing is acknowledged."""
        os.link(self.store, self.away / "saved")
        self.assert_outage(self.store.unlink, lambda: (self.away / "saved").rename(self.store))

    def test_replaced(self) -> None:
        """Another file in its place is not the store, and is left as it is."""
        self.store.rename(self.away / "saved")
        self.store.write_bytes(b"something else")
        self.client.be_put_off(batch_number=2)
        self.assertEqual(self.store.read_bytes(), b"something else")
        (self.away / "saved").rename(self.store)
        self.client.store(batch_number=2)
        self.assertEqual(self.server.stored(), [1, 2])

    def test_wal_deleted(self) -> None:
        """A WAL without a name is lost when the process is killed: nothing goes into it."""
        self.store.with_name(f"{self.store.name}-wal").unlink()
        self.client.send_batch(batch_number=2)
        answer = self.client.receive(within=2)
        self.server.kill()
        if answer == b"\x01":
            with closing(sqlite3.connect(self.store)) as store:
                numbers = store.execute("SELECT batch_number FROM batch").fetchall()
            self.assertIn((2,), numbers)
        else:
            self.assertEqual(answer, b"\x02\x01")


class CorruptTests(DiskTestCase):
    """Somebody writes into the file, or cuts it off, while the server has it open."""

    def setUp(self) -> None:
        self.start()
        for number in range(2, 31):
            self.client.store(batch_number=number, rows=[USER_ROW] * 300)
        self.random = random.Random(3)

    def checkpoint(self) -> None:
        """Have all that is stored in the file itself."""
        with closing(sqlite3.connect(self.store, timeout=10)) as store:
            busy, *_ = store.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        self.assertFalse(busy)

    def write(self, path: Path, offset: int, data: bytes) -> bytes:
        """Overwrite a part of a file; what stood there."""
        with path.open("r+b") as file:
            file.seek(offset)
            before = file.read(len(data))
            file.seek(offset)
            file.write(data)
        return before

    def touch(self) -> None:
        """Write into the store as another program may: its pages are read again."""
        with closing(sqlite3.connect(self.store, isolation_level=None)) as store:
            store.execute("UPDATE session SET finished_at = random()")

    def send_on(self, first: int = 100) -> list[int]:
        """Send a few batches more: those that were acknowledged; the others get FAIL 1."""
        acknowledged = []
        for number in range(first, first + 10):
            self.client.send_batch(batch_number=number, rows=[USER_ROW] * 300)
            answer = self.client.receive(within=2)
            self.assertIn(answer, (b"\x01", b"\x02\x01"))
            if answer == b"\x01":
                acknowledged.append(number)
        self.assertTrue(self.server.is_running)
        return acknowledged

    def test_one_table(self) -> None:
        """A page that is no page puts off the batches that need it; the others are stored."""
        ((page,),) = self.server.ask("SELECT rootpage FROM sqlite_master WHERE name = 'stores'")
        ((page_size,),) = self.server.ask("PRAGMA page_size")
        self.checkpoint()
        offset = (page - 1) * page_size
        before = self.write(self.store, offset, b"\xff" * page_size)
        self.touch()
        stores = {"table": STORES, "rows": [STORE_ROW], "batch_number": 40}
        self.client.be_put_off(**stores)
        self.client.store(batch_number=31)
        self.client.be_put_off(**stores)
        self.assertEqual(self.server.stored(), [*range(1, 32)])
        self.write(self.store, offset, before)
        self.touch()
        self.client.store(**stores)
        self.assertEqual(self.server.ask("SELECT store_name FROM stores"), [("G Coffee",)])
        self.assertEqual(self.server.ask("PRAGMA integrity_check"), [("ok",)])

    def assert_goes_on(self, end: Callable[[], object]) -> None:
        """What is acknowledged after the damage is there, when the server has ended."""
        self.touch()
        ((last,),) = self.server.ask("SELECT max(rowid) FROM users")
        acknowledged = self.send_on()
        self.client.close()
        end()
        with closing(sqlite3.connect(self.store)) as store:
            rows = store.execute(
                "SELECT batch_number, count(*) FROM users JOIN batch ON batch.id = batch_id"
                f" WHERE users.rowid > {last} GROUP BY batch_number"
            ).fetchall()
        self.assertEqual(rows, [(number, 300) for number in acknowledged])

    def test_middle_of_the_file(self) -> None:
        """The middle of the file is lost: what comes later is put off or safe from a kill."""
        self.checkpoint()
        size = self.store.stat().st_size
        self.write(self.store, size // 3, self.random.randbytes(size // 3))
        self.assert_goes_on(self.server.kill)

    def test_middle_of_the_wal(self) -> None:
        """The same with the WAL, up to a kill: no reader of a WAL gets past what is no WAL."""
        wal = self.store.with_name(f"{self.store.name}-wal")
        size = wal.stat().st_size
        self.write(wal, size // 3, self.random.randbytes(size // 3))
        self.assert_goes_on(self.server.stop)

    def test_header(self) -> None:
        """A file that is no database any more puts everything off, until it is one again."""
        self.checkpoint()
        before = self.write(self.store, 0, self.random.randbytes(100))
        self.client.be_put_off(batch_number=31, rows=LARGE)
        self.write(self.store, 0, before)
        self.touch()
        self.client.store(batch_number=31, rows=LARGE)
        self.assertEqual(self.server.stored(), [*range(1, 32)])

    def test_cut_off(self) -> None:
        """A file that was cut off in the middle puts batches off, the process stays."""
        self.checkpoint()
        os.truncate(self.store, self.store.stat().st_size // 2)
        self.touch()
        self.assertEqual(self.send_on(), [])


class ReadOnlyTests(SinkTestCase):
    """The store may not be written, and how the log tells of it."""

    reactor_class = PassingTime
    reactor: PassingTime

    def setUp(self) -> None:
        self.patch(writer_module, "RETRY_INTERVAL", 0.01)
        super().setUp()
        self.start()
        self.sent = 0

    def send(self) -> bytes:
        self.sent += 1
        protocol, transport = connect(self.factory)
        protocol.dataReceived(batch_frame(batch_number=self.sent))
        return self.pump_answers(transport)[0]

    def begin(self) -> None:
        self.connection.execute("PRAGMA query_only = ON")
        self.assertEqual(self.send(), TRY_AGAIN)

    def end(self) -> None:
        self.connection.execute("PRAGMA query_only = OFF")
        self.reactor.pump_until(lambda: self.sink.refusal is None)

    def outage_lines(self, events: Sequence[LogEvent]) -> list[str]:
        lines = map(formatEvent, events)
        return [line for line in lines if line.startswith("action: store")]

    def test_read_only(self) -> None:
        """A store that became read-only puts batches off, and takes them when it may."""
        self.assertEqual(self.send(), SUCCESS)
        self.begin()
        self.assertEqual(self.send(), TRY_AGAIN)
        self.end()
        self.assertEqual(self.send(), SUCCESS)
        self.assertEqual(self.batch_numbers(), [1, 4])
        self.assert_accounts(committed=2, failed=2)

    def test_log(self) -> None:
        """One line at the start, one at the end, and the count once in a while between."""
        with capturedLogs() as events:
            self.begin()
            for wait in (0, 1, OUTAGE_INTERVAL, 1, 1, OUTAGE_INTERVAL):
                self.reactor.offset += wait
                self.assertEqual(self.send(), TRY_AGAIN)
            self.end()
        failed, ended = (rf"action: store \| result: {how} \| " for how in ("fail", "success"))
        patterns = [
            rf"{failed}error: the store takes nothing now: attempt to write a readonly database",
            rf"{failed}refused: [34] \| seconds: 61\.\d",
            rf"{failed}refused: [67] \| seconds: 123\.\d",
            rf"{ended}refused: 7 \| seconds: 123\.\d",
        ]
        lines = self.outage_lines(events)
        self.assertEqual(len(lines), len(patterns), lines)
        for line, pattern in zip(lines, patterns):
            self.assertRegex(line, f"^{pattern}$")

    def test_next_outage(self) -> None:
        """Each outage has its own lines and its own count."""
        with capturedLogs() as events:
            for _ in range(2):
                self.begin()
                self.end()
        lines = self.outage_lines(events)
        self.assertEqual(["result: fail" in line for line in lines], [True, False] * 2)
        for line in lines[1::2]:
            self.assertIn("refused: 1 |", line)
