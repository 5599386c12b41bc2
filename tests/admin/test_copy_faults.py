"""The copy as a process: killed at any moment, and beside a server that goes on."""

from __future__ import annotations

import signal
import time
from contextlib import closing
from pathlib import Path
from uuid import UUID

from cafeteria_orch.store.location import store_at
from cafeteria_orch.wire.messages import TableBatch, encode
from cafeteria_orch.wire.tables import TABLES, USERS
from tests.support.builders import DATA
from tests.support.copies import CopyTestCase, File, Shared, a_session, received
from tests.support.faults import (
    Program,
    RawClient,
    Sender,
    Server,
    seeded,
    wait_for,
)
from tests.support.stores import NOW, store_batch

BATCHES = 500

_IN_SMALL_TRANSACTIONS = (
    "from cafeteria_orch.admin import cli, copying; copying.MAX_BATCHES = 3; cli.main()"
)


class Processes(CopyTestCase):
    """From one file to another; the classes below have the other kinds."""

    def copying(self, code: str = "from cafeteria_orch.admin import cli; cli.main()") -> Program:
        """Start the command."""
        places = (self.source.location, self.target.location)
        return Program(self, code, "store", "copy", *places)

    def fill_source(self) -> None:
        """Store many small batches of all tables."""
        with closing(store_at(self.source.location).open()) as database, database.transaction():
            for number in range(BATCHES):
                table = TABLES[number % len(TABLES)]
                rows = [(f"{number} {row}",) * len(table.columns) for row in range(3)]
                store_batch(database, received(table, rows, number), a_session(1), NOW)

    def copied(self) -> int:
        """How many batches the target has by now."""
        try:
            ((number,),) = self.target.query("SELECT count(*) FROM batch")
        except Exception:
            # There is no table yet, or no more than half of one.
            return 0
        return int(number)

    def test_kills(self) -> None:
        """Killed at random moments and run again until it ends by itself, it has copied all once."""
        self.fill_source()
        kills = 0
        with seeded() as moments:
            while True:
                enough = self.copied() + moments.randrange(40, 160)
                program = self.copying(_IN_SMALL_TRANSACTIONS)
                # To ask a store takes longer than to copy some batches into it.
                wait_for(
                    lambda: program.has_ended or self.copied() > enough,  # noqa: B023
                    "it copies",
                    interval=0.02,
                )
                if program.has_ended:
                    break
                program.kill()
                kills += 1
            self.assertEqual(program.wait(), 0, program.output)
            self.assertGreater(kills, 1)
            self.assertEqual(self.assert_copied().summary["copied"]["batches"], 0)

    def test_interrupt(self) -> None:
        """Ctrl-C ends it with one line that says how to go on."""
        self.fill_source()
        program = self.copying(_IN_SMALL_TRANSACTIONS)
        wait_for(self.copied, "it copies")
        program.signal(signal.SIGINT)
        self.assertEqual(program.wait(), 1)
        self.assertIn("interrupted; run it again to copy the rest\n", program.output)
        self.assertNotIn("Traceback", program.output)
        self.assertLess(self.copied(), BATCHES)
        self.assert_copied()


class ProcessesIntoPostgreSQL(Processes):
    """From SQLite to PostgreSQL."""

    target_kind = Shared


class ProcessesFromPostgreSQL(Processes):
    """From PostgreSQL to SQLite."""

    source_kind = Shared


class BesideAServer(CopyTestCase):
    """The source belongs to a server, which stores all the time."""

    target_kind = Shared

    def test_server_goes_on(self) -> None:
        """It acknowledges batches meanwhile; the next run copies what was stored after the first."""
        server = Server(self, store=Path(self.source.location))
        server.start()
        server.wait_until_it_listens()
        client = RawClient(server.port, UUID(int=7))
        self.addCleanup(client.close)
        numbers = iter(range(100_000))

        def send() -> None:
            rows = (("7", "x" * 1000, "", ""),) * 20
            client.send(encode(TableBatch(USERS, next(numbers), 0, rows)))
            client.expect_success()

        for _ in range(50):
            send()
        code = "from cafeteria_orch.admin import cli; cli.main()"
        places = (self.source.location, self.target.location)
        program = Program(self, code, "store", "copy", *places)
        while not program.has_ended:
            send()
            # Without a pause it would take the processor from what it goes on beside.
            time.sleep(0.005)
        self.assertEqual(program.wait(), 0, program.output)
        ((copied,),) = self.target.query("SELECT count(*) FROM batch")
        self.assertGreaterEqual(copied, 50)
        send()
        sent = next(numbers)
        self.assertGreater(sent, copied)
        server.stop()
        self.assertEqual(self.assert_copied().summary["copied"]["batches"], sent - copied)
        self.assertEqual(self.target.query("SELECT count(*) FROM users"), [(20 * sent,)])

    def test_real_data(self) -> None:
        """The sample exports, sent to a server: what the typed views make of them is the same."""
        server = Server(self, store=Path(self.source.location))
        server.start()
        server.wait_until_it_listens()
        state = f"--state={self.mktemp()}"
        sender = Sender(self, DATA, server.port, state, "--batch-rows=5")
        self.assertEqual(sender.wait(), 0, sender.output)
        self.assert_copied()
        server.stop()
        back = File(self)
        first = self.source
        self.source, self.target = self.target, back
        self.assert_copied()
        for table in TABLES:
            query = f"SELECT * FROM {table.name}_typed"
            self.assertEqual(
                sorted(back.query(query), key=repr), sorted(first.query(query), key=repr)
            )
