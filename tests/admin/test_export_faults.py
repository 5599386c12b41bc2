"""An export as a process: killed at any moment, and beside a server that goes on."""

from __future__ import annotations

import signal
from contextlib import closing
from pathlib import Path
from uuid import UUID

from cafeteria_orch.store.location import store_at
from cafeteria_orch.wire.messages import TableBatch, encode
from cafeteria_orch.wire.tables import USERS
from tests.support.copies import a_session, received
from tests.support.exported import ExportTestCase, rows_of, users_in
from tests.support.faults import Program, RawClient, Server, seeded, wait_for
from tests.support.stores import NOW, store_batch

BATCHES = 400

_IN_SMALL_STEPS = (
    "from cafeteria_orch.admin import cli, exporting; exporting.MAX_ROWS = 6; cli.main()"
)


class Processes(ExportTestCase):
    """In CSV, whose rows can be counted at any time."""

    def exporting(self) -> Program:
        """Start the command."""
        where = (self.source.location, str(self.folder), "--format=csv", "--unfinished")
        return Program(self, _IN_SMALL_STEPS, "store", "export", *where)

    def files(self) -> int:
        """How many files there are by now."""
        return len([*self.folder.glob("users/*/*/*.csv")])

    def fill_source(self) -> None:
        """Store many small batches."""
        with closing(store_at(self.source.location).open()) as database, database.transaction():
            for number in range(BATCHES):
                rows = [(f"{number} {row}", "", "", "") for row in range(3)]
                store_batch(database, received(USERS, rows, number), a_session(1), NOW)

    def test_kills(self) -> None:
        """Killed at random moments and run again until it ends by itself: everything once."""
        self.fill_source()
        kills = 0
        with seeded() as moments:
            while True:
                enough = self.files() + moments.randrange(30, 90)
                program = self.exporting()
                wait_for(
                    lambda: program.has_ended or self.files() > enough,  # noqa: B023
                    "it exports",
                )
                if program.has_ended:
                    break
                program.kill()
                kills += 1
            self.assertEqual(program.wait(), 0, program.output)
            self.assertGreater(kills, 1)
            self.assertEqual(rows_of(self.folder), users_in(self.source))

    def test_interrupt(self) -> None:
        """Ctrl-C ends it with one line; the next run goes on."""
        self.fill_source()
        program = self.exporting()
        wait_for(self.files, "it exports")
        program.signal(signal.SIGINT)
        self.assertEqual(program.wait(), 1)
        self.assertTrue(program.output.endswith("cafeorch store export: interrupted\n"))
        self.assertNotIn("Traceback", program.output)
        self.exported("--unfinished")
        self.assertEqual(rows_of(self.folder), users_in(self.source))

    def test_beside_a_server(self) -> None:
        """A server stores meanwhile: what it has acknowledged at the end is exported once."""
        server = Server(self, store=Path(self.source.location))
        server.start()
        server.wait_until_it_listens()
        client = RawClient(server.port, UUID(int=7))
        self.addCleanup(client.close)
        for number in range(100):
            client.send(encode(TableBatch(USERS, number, 0, (("7", f"{number}", "", ""),) * 20)))
            client.expect_success()
            if number % 30 == 0:
                self.exported("--unfinished")
        self.exported("--unfinished")
        server.stop()
        self.assertEqual(len(rows_of(self.folder)), 2000)
        self.assertEqual(rows_of(self.folder), users_in(self.source))
