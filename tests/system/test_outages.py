"""Outages of the store that a server waits out: its clients notice nothing but the time.

They are as those in the field: they do not wait, and never send again. Each test prints the longest
time that one of them waited for an answer, and the server's memory (pytest shows it with -s).
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from tests.support.disks import fill_disk, holding, mount_small_disk
from tests.support.faults import slow, wait_for
from tests.support.memory import memory_of
from tests.support.postgresql import cluster, query
from tests.support.processes import ProcessTestCase
from tests.support.senders import STORED, FieldClient, balance, longest_wait

CLIENTS = 4

MAX_SECONDS_AFTER = 3.0
"""How long after an outage any batch may wait for its answer."""

MAX_MEMORY_GROWTH = 64 * 1024 * 1024

TERMINATE = (
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
    " WHERE application_name = 'cafeteria_orch' AND datname = current_database()"
)


class OutageTestCase(ProcessTestCase):
    """Clients send before, during and after an outage.

    :ivar place: what ``--store`` names.
    """

    place: str

    def stored(self) -> list[Any]:
        """The rows of what is stored, by :data:`STORED`."""
        raise NotImplementedError

    def survive(self, what: str, seconds: float) -> None:
        """Have an outage, and account for every batch.

        :param what: the name of the method that makes it.
        :param seconds: how long it is.
        """
        server = self.start("--store", self.place)
        clients = [FieldClient(server.port, f"f{number}") for number in range(CLIENTS)]
        for client in clients:
            client.start()
            self.addCleanup(client.stop)
        wait_for(lambda: all(client.answered for client in clients), "all are answered")
        time.sleep(0.5)
        before = memory_of(server.pid)
        during = before
        began = time.monotonic()
        with getattr(self, what)():
            while time.monotonic() < began + seconds:
                time.sleep(0.1)
                during = max(during, memory_of(server.pid))
        lasted = time.monotonic() - began
        time.sleep(1)
        for client in clients:
            client.stop()
        for client in clients:
            client.join(30)
            self.assertFalse(client.is_alive())
        answered = [each for client in clients for each in client.answered]
        ledger = balance(self.stored(), "f", answered)
        longest = longest_wait(answered)
        print(
            f"\n| {type(self).__name__}, {what} | {lasted:.1f} | {longest:.1f}"
            f" | {before / 2**20:.0f} | {during / 2**20:.0f} | {ledger.acknowledged}"
            f" | {ledger.failed} | {ledger.lost} | {ledger.doubled} | {ledger.partial} |"
        )
        self.assertEqual([client.error for client in clients if client.error], [])
        self.assertEqual(sum(client.cuts for client in clients), 0)
        self.assertEqual((*ledger.faults, ledger.unanswered), (0, 0, 0, 0, 0), str(ledger))
        self.assertLess(longest, lasted + MAX_SECONDS_AFTER)
        self.assertLess(during - before, MAX_MEMORY_GROWTH)
        self.assertNotIn("Traceback", server.log)


class PostgreSQLOutages(OutageTestCase):
    """PostgreSQL is away, or does not get on."""

    def setUp(self) -> None:
        super().setUp()
        self.place = cluster().new_database()

    def stored(self) -> list[Any]:
        return query(self.place, STORED)

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """It is stopped, and started at the end."""
        cluster().stop()
        try:
            yield
        finally:
            cluster().start()

    @contextmanager
    def cut_again_and_again(self) -> Iterator[None]:
        """Its connections are ended all the time."""
        ended = threading.Event()

        def cut() -> None:
            while not ended.wait(0.1):
                query(self.place, TERMINATE)

        cutting = threading.Thread(target=cut)
        cutting.start()
        try:
            yield
        finally:
            ended.set()
            cutting.join()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Somebody has locked a table."""
        import psycopg  # noqa: PLC0415

        with psycopg.connect(self.place) as connection:
            connection.execute("LOCK TABLE users IN ACCESS EXCLUSIVE MODE")
            yield

    def test_short_lock(self) -> None:
        """A table is locked for 2 s."""
        self.survive("locked", 2)

    @slow
    def test_stop(self) -> None:
        """The server of PostgreSQL is away for 10 s."""
        self.survive("stopped", 10)

    @slow
    def test_cuts(self) -> None:
        """The connection is cut ten times a second, for 10 s."""
        self.survive("cut_again_and_again", 10)

    @slow
    def test_lock(self) -> None:
        """A table is locked for 10 s."""
        self.survive("locked", 10)


class SQLiteOutages(OutageTestCase):
    """The embedded store cannot be written."""

    def setUp(self) -> None:
        super().setUp()
        self.disk = mount_small_disk(self, "64m")
        self.place = str(self.disk / "store.sqlite3")

    def stored(self) -> list[Any]:
        with closing(sqlite3.connect(self.place)) as store:
            return store.execute(STORED).fetchall()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Another process has locked the file."""
        with holding(Path(self.place), "BEGIN IMMEDIATE"):
            yield

    @contextmanager
    def full(self) -> Iterator[None]:
        """The disk is full."""
        filler = fill_disk(self.disk)
        yield
        filler.unlink()

    def test_short_lock(self) -> None:
        """The file is locked for 2 s."""
        self.survive("locked", 2)

    def test_short_lack_of_room(self) -> None:
        """The disk is full for 2 s."""
        self.survive("full", 2)

    @slow
    def test_lock(self) -> None:
        """The file is locked for 10 s."""
        self.survive("locked", 10)

    @slow
    def test_lack_of_room(self) -> None:
        """The disk is full for 10 s."""
        self.survive("full", 10)
