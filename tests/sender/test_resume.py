"""The sender or its server is killed again and again: the store ends up like the files."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

from twisted.internet import reactor
from twisted.trial.unittest import SynchronousTestCase, TestCase

from cafeteria_orch.sender.journal import STATE_NAME
from tests.support.faults import (
    PATIENCE,
    Sender,
    Server,
    faults_of_store,
    new_folder,
    read_store,
    seeded,
    send_folder,
    wait_for,
    write_exports,
)
from tests.support.tracing import untraced

FILES = {"users_1.csv": 1700, "users_2.csv": 3, "stores/a.csv": 1200, "stores/b.csv": 1300}
BATCHES = "--batch-rows=7"
"""Some 600 batches in all."""

OTHER_BATCHES = "--batch-rows=5"


class ProcessTests(SynchronousTestCase):
    """A sender and a server as processes, and kill -9 at random moments."""

    def setUp(self) -> None:
        self.server = Server(self)
        self.folder = new_folder(self)
        self.exports = write_exports(self.folder, FILES)
        self.state = self.folder / STATE_NAME

    def test_sender_is_killed(self) -> None:
        """Run again until it is done, it has sent every row once and each file in its order."""
        self.server.start()
        self.server.wait_until_it_listens()
        kills = 0
        with seeded() as moments:
            while True:
                # How a file is cut into batches is settled when it is first seen.
                batches = OTHER_BATCHES if self.state.exists() else BATCHES
                sender = Sender(self, self.folder, self.server.port, batches)
                self._wait_for_progress(sender, moments)
                if sender.has_ended:
                    break
                sender.kill()
                kills += 1
            self.assertEqual(sender.wait(), 0, sender.output)
            self.assertGreater(kills, 3)
            self._assert_complete()
            sender = Sender(self, self.folder, self.server.port, BATCHES)
            self.assertEqual(sender.wait(), 0, sender.output)
            self.assertIn("All had been acknowledged before", sender.output)
            self._assert_complete()

    def test_server_is_killed(self) -> None:
        """The sender connects again by itself, sends the rest, and ends with status 0."""
        self.server.start()
        sender = Sender(self, self.folder, self.server.port, BATCHES, "--retry-for=30")
        with seeded() as moments:
            for _ in range(3):
                self._wait_for_progress(sender, moments)
                self.assertFalse(sender.has_ended, "it was faster than the kills")
                self.server.kill()
                self.server.start()
            self.assertEqual(sender.wait(), 0, sender.output)
            self._assert_complete()

    def test_file_is_edited(self) -> None:
        """Only checked rows are stored; restored as it was, the file arrives whole."""
        self.server.start()
        self.server.wait_until_it_listens()
        self.exports |= write_exports(self.folder, {"stores/c.csv": 5000})
        path = self.folder / "stores" / "c.csv"
        place = path.read_bytes().index(b" 4999 ")
        sender = Sender(self, self.folder, self.server.port, BATCHES, "--window=1")
        wait_for(lambda: b"stores/c.csv" in self._last_acknowledgement(), "the file's turn")
        self._overwrite(path, place, b" EDIT ")
        self.assertEqual(sender.wait(), 1, sender.output)
        self.assertIn(f"{path}: it has changed since it was checked", sender.output)
        rows = [row for batch in read_store(self.server.store) for row in batch.rows]
        self.assertNotIn("EDIT", str(rows))
        self.assertIn("stores/c.csv 0 store_id", str(rows))
        self._overwrite(path, place, b" 4999 ")
        sender = Sender(self, self.folder, self.server.port, BATCHES)
        self.assertEqual(sender.wait(), 0, sender.output)
        self._assert_complete()

    def _overwrite(self, path: Path, place: int, data: bytes) -> None:
        with path.open("r+b") as file:
            file.seek(place)
            file.write(data)

    def _last_acknowledgement(self) -> bytes:
        records = self.state.read_bytes().splitlines() if self.state.exists() else []
        return next((line for line in records[-1:] if b'"acknowledged"' in line), b"")

    def _wait_for_progress(self, sender: Sender, moments: Random) -> None:
        """Wait until the state file has some more acknowledgements, up to eighty."""
        until = self._state_bytes() + moments.randrange(4000)
        wait_for(lambda: self._state_bytes() >= until or sender.has_ended, "the sender goes on")

    def _state_bytes(self) -> int:
        return self.state.stat().st_size if self.state.exists() else 0

    def _assert_complete(self) -> None:
        self.assertEqual(faults_of_store(self.server.store, self.exports), {})
        client_id = json.loads(self.state.read_text().splitlines()[0])["client_id"]
        clients = {batch.client_id for batch in read_store(self.server.store)}
        self.assertEqual(clients, {client_id})


def is_told(line: bytes) -> bool:
    """Whether a line of a state is there however often the sender was run."""
    return not {"checked", "stored"} & json.loads(line).keys()


class TornStateTests(TestCase):
    """A kill may leave any part of the state file's last line."""

    timeout = PATIENCE * 4

    @untraced
    async def test_every_part_of_a_line(self) -> None:
        """A server, a plan, an acknowledgement: cut at any byte, all is sent, nothing twice."""
        server = Server(self)
        server.start()
        server.wait_until_it_listens()
        folder = new_folder(self)
        exports = write_exports(folder, {"users_1.csv": 5, "users_2.csv": 1, "stores.csv": 4})
        state = folder / STATE_NAME
        await self._send(folder, server)
        lines = state.read_bytes().splitlines(keepends=True)
        for kind in (b'"store"', b'"digest"', b'"acknowledged"', b'"stored"'):
            last = max(index for index, line in enumerate(lines) if kind in line)
            for size in range(len(lines[last])):
                state.write_bytes(b"".join(lines[:last]) + lines[last][:size])
                await self._send(folder, server)
                # In another order, perhaps: what it says is the same.
                told = sorted(state.read_bytes().splitlines(keepends=True))
                self.assertEqual(list(filter(is_told, told)), sorted(filter(is_told, lines)))
        self.assertEqual(faults_of_store(server.store, exports), {})

    async def _send(self, folder: Path, server: Server) -> None:
        status, output = await send_folder(reactor, folder, server.port, "--batch-rows=2")
        self.assertEqual(status, 0, output)
