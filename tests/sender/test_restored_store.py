"""A store is restored from a real backup, or its server is moved: nothing is lost, nothing twice."""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

from twisted.internet import reactor
from twisted.trial.unittest import TestCase

from cafeteria_orch.sender.journal import STATE_NAME
from tests.support.builders import query
from tests.support.copies import cafeorch
from tests.support.faults import (
    Sender,
    Server,
    faults_of_store,
    new_folder,
    seeded,
    send_folder,
    wait_for,
    write_exports,
)

BATCHES = "--batch-rows=7"


class RestoredStoreTests(TestCase):
    """A sender, a server as a process, ``VACUUM INTO``, and the backup in the store's place."""

    def setUp(self) -> None:
        self.server = Server(self)
        self.server.start()
        self.server.wait_until_it_listens()
        self.folder = new_folder(self)
        self.backup = new_folder(self) / "backup.sqlite3"
        self.exports = write_exports(self.folder, {"users_1.csv": 300, "stores/a.csv": 200})

    def sender(self, *options: str) -> Sender:
        """Start a sender that can be killed."""
        return Sender(self, self.folder, self.server.port, BATCHES, *options)

    async def send(self, server: Server | None = None, status: int = 0) -> str:
        """Run the sender to its end, by default a good one; return what it said."""
        port = (server or self.server).port
        ended, output = await send_folder(reactor, self.folder, port, BATCHES)
        self.assertEqual(ended, status, output)
        return output

    def back_up(self) -> None:
        """Make a backup, as the page for operators says."""
        with closing(sqlite3.connect(self.server.store)) as store:
            store.execute("VACUUM INTO ?", (str(self.backup),))

    def restore(self) -> None:
        """Put the backup in the store's place, as the page for operators says."""
        self.server.stop()
        for suffix in ("", "-wal", "-shm"):
            Path(f"{self.server.store}{suffix}").unlink(missing_ok=True)
        shutil.copy(self.backup, self.server.store)
        self.server.start()
        self.server.wait_until_it_listens()

    def assert_complete(self) -> None:
        """Every row is there once, every table is complete, and whose they are is known."""
        self.assertEqual(faults_of_store(self.server.store, self.exports), {})
        status = query(
            str(self.server.store), "SELECT DISTINCT complete, agency_id FROM ingest_status"
        )
        self.assertEqual(status, [(1, 1)])

    async def test_what_a_backup_lacks_is_sent_again(self) -> None:
        """The next run finds out by itself, and brings rows, ends and the agency."""
        await self.send()
        self.back_up()
        self.exports |= write_exports(self.folder, {"users_2.csv": 100, "stores/b.csv": 100})
        await self.send()
        self.restore()
        self.assertNotEqual(faults_of_store(self.server.store, self.exports), {})
        self.assertIn("was it restored from a backup? Everything is sent again", await self.send())
        self.assert_complete()
        self.assertIn("All had been acknowledged before", await self.send())
        self.assert_complete()

    def test_a_backup_of_the_middle_of_a_file(self) -> None:
        """The backup has part of a file; the sender is killed again and again while it resends."""
        sender = self.sender("--window=1")
        self.wait_for_progress(sender, 2500)
        self.back_up()
        self.assertEqual(sender.wait(), 0, sender.output)
        self.restore()
        kills = 0
        with seeded() as moments:
            while True:
                sender = self.sender()
                self.wait_for_progress(sender, moments.randrange(1500))
                if sender.has_ended:
                    break
                sender.kill()
                kills += 1
        self.assertEqual(sender.wait(), 0, sender.output)
        self.assertGreater(kills, 0)
        self.assert_complete()

    async def test_a_backup_without_ends(self) -> None:
        """A backup that has all batches, and no end, gets the ends in the next run."""
        await self.send()
        self.back_up()
        with closing(sqlite3.connect(self.backup)) as backup, backup:
            backup.execute("DELETE FROM table_eof")
            backup.execute("UPDATE session SET finished_at = NULL, agency_id = NULL")
        self.restore()
        await self.send()
        self.assert_complete()

    async def test_batches_that_an_operator_has_removed(self) -> None:
        """They come back in the next run if they were removed with --resend, and only then."""
        await self.send()
        forget = ("store", "forget", str(self.server.store), "--yes", "--batch")
        for options, are_sent_again in ((("3",), False), (("3", "4", "--resend"), True)):
            self.assertEqual(cafeorch(*forget, *options).status, 0)
            said = await self.send()
            self.assertEqual("Everything is sent again" in said, are_sent_again, said)
        for table, amount in (("users", 300), ("stores", 200)):
            column = f"{table.removesuffix('s')}_id"
            counts = f"SELECT count(*), count(DISTINCT {column}) FROM {table}"
            self.assertEqual(query(str(self.server.store), counts), [(amount, amount)])

    async def test_a_moved_server(self) -> None:
        """The store at another port is the same; the store of another server is refused."""
        await self.send()
        self.server.stop()
        moved = Server(self, store=self.server.store)
        other = Server(self)
        for server in (moved, other):
            server.start()
            server.wait_until_it_listens()
        self.exports |= write_exports(self.folder, {"users_2.csv": 50})
        self.assertIn("more batches had been acknowledged before", await self.send(moved))
        self.assert_complete()
        said = await self.send(other, status=1)
        self.assertRegex(said, "it is about the store .* has the store .* another --state")
        self.assertEqual(query(str(other.store), "SELECT count(*) FROM batch"), [(0,)])

    def wait_for_progress(self, sender: Sender, size: int) -> None:
        """Wait until the state has grown."""
        until = self.state_bytes() + size
        wait_for(lambda: self.state_bytes() >= until or sender.has_ended, "progress")

    def state_bytes(self) -> int:
        state = self.folder / STATE_NAME
        return state.stat().st_size if state.exists() else 0
