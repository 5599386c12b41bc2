"""``cafeorch store forget`` as a process: killed at any moment, and beside a server that goes on."""

from __future__ import annotations

import time
from pathlib import Path
from uuid import UUID

from twisted.trial.unittest import SynchronousTestCase

from cafeteria_orch.wire.messages import TableBatch, encode
from cafeteria_orch.wire.tables import USERS
from tests.support.copies import File, Place, Shared, a_session, fill, received
from tests.support.faults import Program, RawClient, Server, seeded, wait_for

BATCHES = 300

_FEW_AT_ONCE = (
    "from cafeteria_orch.admin import cli, forgetting; forgetting.BATCHES_AT_ONCE = 3; cli.main()"
)


class ProcessTestCase(SynchronousTestCase):
    """A store, by default in a file."""

    kind: type[Place] = File

    def setUp(self) -> None:
        self.place = self.kind(self)

    def forgetting(self, *options: str) -> Program:
        """Start the command."""
        location = self.place.location
        return Program(self, _FEW_AT_ONCE, "store", "forget", location, "--yes", *options)

    def forgotten(self) -> int:
        ((number,),) = self.place.query("SELECT count(forgotten_at) FROM batch")
        return int(number)


class Kills(ProcessTestCase):
    """Killed at random moments."""

    def test_kills(self) -> None:
        """Each batch is there with all its rows, or forgotten with none; the next run goes on."""
        rows = [("7", "x" * 20, "", "")] * 3
        batches = [received(rows=rows, number=number) for number in range(BATCHES)]
        fill(self.place, batches, a_session(1))
        with seeded() as moments:
            enough = moments.randrange(20, 200)
        program = self.forgetting("--before", "2100-01-01")
        wait_for(lambda: program.has_ended or self.forgotten() > enough, "it forgets")
        program.kill()
        self.assertLess(self.forgotten(), BATCHES)
        in_part = self.place.query(
            "SELECT count(*) FROM batch LEFT JOIN"
            " (SELECT batch_id, count(*) AS there FROM users GROUP BY batch_id) AS found"
            " ON batch_id = id WHERE (forgotten_at IS NULL) <> (coalesce(there, 0) = 3)"
        )
        self.assertEqual(in_part, [(0,)])
        self.assertEqual(self.forgetting("--before", "2100-01-01").wait(), 0)
        self.assertEqual(self.forgotten(), BATCHES)
        self.assertEqual(self.place.query("SELECT count(*) FROM users"), [(0,)])


class KillsOnPostgreSQL(Kills):
    """The same of PostgreSQL."""

    kind = Shared


class BesideAServer(ProcessTestCase):
    """The file belongs to a server, which stores all the time."""

    def test_server_goes_on(self) -> None:
        """It acknowledges all that comes meanwhile."""
        server = Server(self, store=Path(self.place.location))
        server.start()
        server.wait_until_it_listens()
        client = RawClient(server.port, UUID(int=7))
        self.addCleanup(client.close)
        sent = 0

        def send() -> None:
            nonlocal sent
            client.send(encode(TableBatch(USERS, sent, 0, (("7", "x" * 100, "", ""),) * 20)))
            client.expect_success()
            sent += 1

        for _ in range(100):
            send()
        program = self.forgetting("--session", "1")
        while not program.has_ended:
            send()
            # Without a pause it would take the processor from what it goes on beside.
            time.sleep(0.005)
        send()
        self.assertEqual(program.wait(), 0, program.output)
        forgotten = self.forgotten()
        self.assertGreaterEqual(forgotten, 100)
        self.assertGreater(sent, forgotten)
        left = self.place.query("SELECT count(*) FROM users")
        self.assertEqual(left, [(20 * (sent - forgotten),)])
