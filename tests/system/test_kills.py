"""The server is killed again and again: what it acknowledged is there once and whole."""

from __future__ import annotations

import threading
import time
from collections import Counter
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from uuid import UUID, uuid4

from twisted.trial.unittest import SynchronousTestCase

from cafeteria_orch.wire.messages import TableBatch, encode
from cafeteria_orch.wire.tables import USERS
from tests.support.faults import PATIENCE, RawClient, Server, read_store, seeded, slow, wait_for

CLIENTS = 8
WINDOW = 8

SECONDS_PER_KILL = 3.0
"""The longest time that it takes to send again what was sent before a kill."""

FILE_BATCHES = 50
"""The batches of a file: after them the numbers start again at 1."""


def users(client: int, index: int) -> tuple[tuple[str, ...], ...]:
    """The rows of a client's batch; no other batch has one of them."""
    amount = 700 if index % 64 == 63 else 1 + index % 40
    return tuple(
        (f"{client}/{index}/{row}", "female", "2003-06-13", "2024-01-11 17:50:12")
        for row in range(amount)
    )


def users_batch(client: int, index: int) -> TableBatch:
    """A client's batch, always the same bytes."""
    return TableBatch(USERS, 1 + index % FILE_BATCHES, 0, users(client, index))


class Agency(threading.Thread):
    """A client that sends its batches in their order, a window of them ahead of the answers.

    When the connection is cut it connects again, and goes on after the last batch that was
    acknowledged.

    :param number: which of the clients.
    :param max_batches: how many batches it sends; endless by default.
    :ivar acknowledged: how many batches, counted from the first, were acknowledged.
    :ivar sent: how many batches, counted from the first, may be in the store.
    :ivar error: what ended it, unless that was a cut.
    """

    def __init__(self, port: int, number: int, client_id: UUID, max_batches: float = float("inf")):
        super().__init__(daemon=True)
        self.number = number
        self.client_id = client_id
        self.acknowledged = 0
        self.sent = 0
        self.error: Exception | None = None
        self._port = port
        self._max_batches = max_batches
        self._stopping = threading.Event()

    def run(self) -> None:
        """Send until it is stopped, or all is acknowledged."""
        while self.acknowledged < self._max_batches and not self._stopping.is_set():
            try:
                with closing(RawClient(self._port, self.client_id)) as client:
                    self._send(client)
            except ConnectionError:
                self._stopping.wait(0.005)
            except Exception as error:
                self.error = error
                return

    def stop(self) -> None:
        """Stop it at the next cut, and wait until it has ended."""
        self._stopping.set()
        self.join(PATIENCE)

    def _send(self, client: RawClient) -> None:
        unsent = self.acknowledged
        while self.acknowledged < self._max_batches:
            while unsent < min(self.acknowledged + WINDOW, self._max_batches):
                # Before it is sent: what a cut leaves of it may be the whole of it.
                self.sent = max(self.sent, unsent + 1)
                client.send(encode(users_batch(self.number, unsent)))
                unsent += 1
            client.expect_success()
            self.acknowledged += 1


@dataclass
class Figures:
    """What became of the batches.

    :ivar lost: that were acknowledged and are not in the store.
    :ivar doubled: that are in the store more than once.
    :ivar partial: entries in the store with other rows than were sent under this number.
    :ivar unasked: entries in the store that this client never sent.
    """

    kills: int = 0
    acknowledged: int = 0
    stored: int = 0
    lost: int = 0
    doubled: int = 0
    partial: int = 0
    unasked: int = 0

    def __str__(self) -> str:
        return ", ".join(f"{name}: {value}" for name, value in asdict(self).items())


def judge(store: Path, agencies: list[Agency], kills: int) -> Figures:
    """Compare the store with what the clients know."""
    figures = Figures(kills, sum(agency.acknowledged for agency in agencies))
    stored: Counter[tuple[int, int]] = Counter()
    for batch in read_store(store):
        if not batch.rows:
            figures.partial += 1
            continue
        client, index, _ = map(int, batch.rows[0][0].split("/"))
        stored[client, index] += 1
        agency = agencies[client]
        if batch.client_id != str(agency.client_id) or index >= agency.sent:
            figures.unasked += 1
        sent = users_batch(client, index)
        if (batch.number, batch.amount, tuple(batch.rows)) != (
            sent.batch_number,
            sent.amount,
            sent.rows,
        ):
            figures.partial += 1
    figures.stored = len(stored)
    figures.doubled = sum(times > 1 for times in stored.values())
    figures.lost = sum(
        not stored[agency.number, index]
        for agency in agencies
        for index in range(agency.acknowledged)
    )
    return figures


class KillTests(SynchronousTestCase):
    """kill -9 of the server at random moments, under clients that never pause."""

    def test_kills(self) -> None:
        """20 kills lose nothing that was acknowledged, and double nothing that is sent again."""
        self._survive(20)

    @slow
    def test_many_kills(self) -> None:
        """200 kills neither; says its figures (pytest shows them with -s)."""
        print(f"\nat the last kill:     {self._survive(200)}")
        print(f"after sending again:  {self._figures}")

    def _survive(self, kills: int) -> Figures:
        with seeded() as moments:
            server = Server(self)
            agencies = [Agency(server.port, number, uuid4()) for number in range(CLIENTS)]
            self._set_off(agencies)
            for _ in range(kills):
                self._kill(server, agencies, moments)
            for agency in agencies:
                agency.stop()
            at_last_kill = judge(server.store, agencies, kills)
            self._assert_sound(at_last_kill, agencies)

            server.start()
            again = [
                Agency(server.port, agency.number, agency.client_id, agency.sent)
                for agency in agencies
            ]
            self._set_off(again)
            wait_for(
                lambda: not any(agency.is_alive() for agency in again),
                "all is sent again",
                patience=PATIENCE + kills * SECONDS_PER_KILL,
            )
            server.stop()
            self._figures = judge(server.store, again, kills)
            self._assert_sound(self._figures, again)
            self.assertEqual(self._figures.acknowledged, sum(old.sent for old in agencies))
            self.assertEqual(self._figures.stored, self._figures.acknowledged)
            self.assertNotIn("Traceback", server.log())
            return at_last_kill

    def _set_off(self, agencies: list[Agency]) -> None:
        for agency in agencies:
            agency.start()
            self.addCleanup(agency.stop)

    def _kill(self, server: Server, agencies: list[Agency], moments: Random) -> None:
        """Start the server, and kill it: most times amid batches, sometimes as it starts."""
        server.start()
        if moments.random() < 0.1:
            time.sleep(moments.uniform(0.0, 0.6))
        else:
            before = sum(agency.acknowledged for agency in agencies)
            wait_for(
                lambda: sum(agency.acknowledged for agency in agencies) > before,
                "a batch is acknowledged",
            )
            time.sleep(moments.uniform(0.0, 0.2))
        server.kill()

    def _assert_sound(self, figures: Figures, agencies: list[Agency]) -> None:
        self.assertEqual([agency.error for agency in agencies if agency.error], [])
        faults = (figures.lost, figures.doubled, figures.partial, figures.unasked)
        self.assertEqual(faults, (0, 0, 0, 0), str(figures))
        self.assertGreater(figures.acknowledged, figures.kills, "the clients hardly sent")
