"""Connections are cut after the commit, before its acknowledgement has arrived."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from itertools import cycle, repeat
from uuid import uuid4

from twisted.internet import reactor
from twisted.internet.defer import DeferredList
from twisted.internet.endpoints import TCP4ClientEndpoint, TCP4ServerEndpoint, connectProtocol
from twisted.internet.error import ConnectionLost
from twisted.internet.task import deferLater
from twisted.trial.unittest import TestCase

from cafeteria_orch.sender import delivery
from cafeteria_orch.sender.client import OrchestratorClient
from cafeteria_orch.wire.messages import BatchRecvSuccess, TableBatch, encode
from cafeteria_orch.wire.tables import USERS
from tests.support.faults import (
    LOOPBACK,
    PATIENCE,
    POLL_INTERVAL,
    CuttingProxy,
    Server,
    faults_of_store,
    new_folder,
    read_store,
    seeded,
    send_folder,
    write_exports,
)

CUTS = 200
HELLO = 1
"""The answer to CLIENT_HELLO has come through, before any other."""
NEVER = float("inf")

ROWS = 20


def users_batch(index: int) -> TableBatch:
    """A batch that no other is like, under a number that others have too."""
    rows = [(f"{index}", f"{row}", "2003-06-13", "2024-01-11 17:50:12") for row in range(ROWS)]
    return TableBatch(USERS, 1 + index % 7, 0, tuple(rows))


class CutTests(TestCase):
    """A client does not learn that its batch is stored, and sends it again."""

    timeout = PATIENCE

    async def test_single_batch(self) -> None:
        """200 batches are cut off from their answers: stored once, and the resend succeeds."""
        await self._start()
        with closing(sqlite3.connect(self.server.store)) as store:
            for index in range(CUTS):
                payload = encode(users_batch(index))
                self.proxy.passing = repeat(HELLO)
                client = await self._connect()
                await self.assertFailure(client.send_payload(payload), ConnectionLost)
                self._assert_rows(store, (index + 1) * ROWS)
                self.proxy.passing = repeat(NEVER)
                client = await self._connect()
                self.assertEqual(await client.send_payload(payload), BatchRecvSuccess())
                await client.finish()
                self._assert_rows(store, (index + 1) * ROWS)
        self.assertEqual(self.proxy.cuts, CUTS)
        self._assert_stored(CUTS)

    async def test_window(self) -> None:
        """The same amid a window: all without an answer is sent again, stored or not."""
        await self._start()
        acknowledged = 0
        with seeded() as moments:
            while self.proxy.cuts < CUTS:
                self.proxy.passing = repeat(HELLO + moments.randrange(8))
                client = await self._connect()
                window = range(acknowledged, acknowledged + 8)
                sent = [client.send_payload(encode(users_batch(index))) for index in window]
                for succeeded, answer in await DeferredList(sent, consumeErrors=True):
                    if succeeded:
                        self.assertEqual(answer, BatchRecvSuccess())
                        acknowledged += 1
            self.proxy.passing = repeat(NEVER)
            client = await self._connect()
            for index in range(acknowledged, acknowledged + 8):
                answer = await client.send_payload(encode(users_batch(index)))
                self.assertEqual(answer, BatchRecvSuccess())
            await client.finish()
            self._assert_stored(acknowledged + 8)

    async def test_sender(self) -> None:
        """cafeorch-send, cut off at every turn, goes on by itself until the store has it all."""
        await self._start()
        self.patch(delivery, "_backoff", lambda failures: 0.0)
        folder = new_folder(self)
        exports = write_exports(folder, {"users_1.csv": 700, "users_2.csv": 1, "stores.csv": 300})
        # Sooner or later than its window of 8 is full: batches, ends of tables, the hello itself.
        self.proxy.passing = cycle(range(12))
        status, output = await send_folder(reactor, folder, self.port, "--batch-rows=5")
        self.assertEqual(status, 0, output)
        self.assertEqual(faults_of_store(self.server.store, exports), {})
        self.assertGreater(self.proxy.cuts, 20)

    async def _start(self) -> None:
        self.client_id = uuid4()
        self.server = Server(self)
        self.server.start()
        self.server.wait_until_it_listens()
        self.proxy = CuttingProxy(reactor, self.server.port, repeat(NEVER))
        port = await TCP4ServerEndpoint(reactor, 0, interface=LOOPBACK).listen(self.proxy)
        self.addCleanup(self._wait_until_all_is_closed)
        self.addCleanup(port.stopListening)
        self.port = port.getHost().port

    async def _connect(self) -> OrchestratorClient:
        endpoint = TCP4ClientEndpoint(reactor, LOOPBACK, self.port)
        client = OrchestratorClient()
        await connectProtocol(endpoint, client)
        self.addCleanup(client.transport.abortConnection)
        self.assertEqual(await client.send_hello(self.client_id), BatchRecvSuccess())
        return client

    async def _wait_until_all_is_closed(self) -> None:
        while self.proxy.sides:
            await deferLater(reactor, POLL_INTERVAL)

    def _assert_rows(self, store: sqlite3.Connection, rows: int) -> None:
        self.assertEqual(store.execute("SELECT count(*) FROM users").fetchone(), (rows,))

    def _assert_stored(self, batches: int) -> None:
        """The store has this number of batches, the first ones, each once and whole, in order."""
        stored = [int(batch.rows[0][0]) for batch in read_store(self.server.store)]
        self.assertEqual(stored, list(range(batches)))
        for index, batch in enumerate(read_store(self.server.store)):
            sent = users_batch(index)
            self.assertEqual((batch.number, tuple(batch.rows)), (sent.batch_number, sent.rows))
