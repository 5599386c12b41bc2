"""Backpressure: what waits for its commit is bounded, and every connection gets its turn."""

from __future__ import annotations

import sqlite3
from functools import partial

from twisted.internet.error import ConnectionDone
from twisted.internet.interfaces import IPushProducer
from twisted.python.failure import Failure
from zope.interface.verify import verifyObject

from cafeteria_orch.server.counters import Outcome
from cafeteria_orch.store import sink as sink_module
from cafeteria_orch.store import writer as writer_module
from cafeteria_orch.store.sqlite import Database
from tests.support.builders import SUCCESS, TCPTransport, batch_frame, connect
from tests.support.stores import TRY_AGAIN, GroupTestCase


class BackpressureTests(GroupTestCase):
    """What waits for its commit is bounded: beyond that no connection is read."""

    def limit(self, batches: int = 1024, bytes_: int = 1 << 30) -> None:
        self.patch(sink_module, "MAX_WAITING_BATCHES", batches)
        self.patch(sink_module, "MAX_WAITING_BYTES", bytes_)

    def connect_many(self, connections: int, batches: int) -> list[TCPTransport]:
        """Have each of many clients send several batches, and not wait for an answer."""
        transports = []
        for protocol, transport in [connect(self.factory) for _ in range(connections)]:
            for _ in range(batches):
                protocol.dataReceived(batch_frame(batch_number=next(self.numbers)))
            transports.append(transport)
        return transports

    def answered(self, transports: list[TCPTransport]) -> list[int]:
        return [len(transport.value()) // len(SUCCESS) for transport in transports]

    def more_are_answered(self, transports: list[TCPTransport], done: int) -> bool:
        return sum(self.answered(transports)) > done

    def test_all_connections_pause_at_the_limit(self) -> None:
        """Idle ones as well."""
        self.limit(batches=4)
        _, idle = connect(self.factory)
        transports = self.connect_many(10, 2)
        self.assertEqual(self.counts().in_progress, 4)
        states = {transport.producerState for transport in (idle, *transports)}
        self.assertEqual(states, {"paused"})

    def test_the_limit_counts_bytes_and_batches(self) -> None:
        """The limit counts the bytes of the bodies as well as the batches."""
        self.limit(bytes_=3 * (len(batch_frame()) - 5) - 1)
        transports = self.connect_many(10, 1)
        self.assertEqual(self.counts().in_progress, 3)
        self.gate.open(10)
        self.reactor.pump_until(lambda: self.answered(transports) == [1] * 10)
        self.assertEqual(transports[-1].producerState, "producing")

    def test_connections_resume_at_half_of_the_limit(self) -> None:
        """Not before."""
        self.limit(batches=8)
        self.patch(writer_module, "MAX_GROUP_BYTES", 1)
        transports = self.connect_many(12, 1)
        for received in (8, 8, 8, 12):
            done = sum(self.answered(transports))
            self.gate.open()
            self.reactor.pump_until(partial(self.more_are_answered, transports, done))
            self.assertEqual(self.counts().received, received)
        self.gate.open(8)
        self.reactor.pump_until(lambda: self.answered(transports) == [1] * 12)
        self.assertEqual({transport.producerState for transport in transports}, {"producing"})

    def test_connections_that_always_send_are_served_equally_often(self) -> None:
        """Where all always have more to send and few may wait, each is served as often."""
        self.limit(batches=4)
        # How many are committed together would depend on the writer's thread.
        self.patch(writer_module, "MAX_GROUP_BYTES", 1)
        transports = self.connect_many(25, 8)
        while sum(self.answered(transports)) < 25 * 8:
            done = sum(self.answered(transports))
            self.gate.open()
            self.reactor.pump_until(partial(self.more_are_answered, transports, done))
            served = self.answered(transports)
            self.assertLessEqual(max(served) - min(served), 4)
            self.assertLessEqual(self.counts().in_progress, 4)
        self.assert_accounts(committed=25 * 8)
        self.assertEqual(len(self.batch_numbers()), 25 * 8)

    def test_a_new_connection_starts_paused_and_gets_its_turn(self) -> None:
        """A connection that is made meanwhile starts paused, and gets its turn."""
        self.limit(batches=2)
        self.connect_many(2, 1)
        protocol, transport = connect(self.factory)
        self.assertEqual(transport.producerState, "paused")
        protocol.dataReceived(batch_frame(batch_number=3))
        self.assertEqual(self.counts().received, 2)
        self.gate.open(3)
        self.assertEqual(self.pump_answers(transport), [SUCCESS])
        self.assertEqual(transport.producerState, "producing")

    def test_a_store_that_fails_lets_connections_go_on(self) -> None:
        """It answers the batches that wait."""
        self.limit(batches=2)
        self.patch(Database, "store", self.fail_to_store)
        transports = self.connect_many(6, 2)
        self.gate.open(12)
        self.reactor.pump_until(lambda: all(part.value() == TRY_AGAIN * 2 for part in transports))
        self.assert_accounts(committed=0, failed=12)

    def fail_to_store(self, *_: object) -> None:
        raise sqlite3.OperationalError("disk I/O error")

    def test_lost_connections_leave_room(self) -> None:
        """Their batches in progress do not count for ever."""
        self.limit(batches=2)
        protocols = [connect(self.factory)[0] for _ in range(4)]
        for protocol in protocols:
            protocol.dataReceived(batch_frame(batch_number=next(self.numbers)))
            protocol.connectionLost(Failure(ConnectionDone()))
        self.gate.open(4)
        # What was read whole is still stored, whoever has gone.
        self.reactor.pump_until(lambda: self.counts()[Outcome.COMMITTED] == 4)
        self.assertFalse(self.factory.connections)
        self.assert_accounts(committed=4)

    def test_what_was_read_of_lost_clients_keeps_its_turn(self) -> None:
        """What was read of clients that vanish waits for its turn like that of the others."""
        self.limit(batches=2)
        protocols = [connect(self.factory)[0] for _ in range(6)]
        for protocol in protocols:
            protocol.dataReceived(batch_frame(batch_number=next(self.numbers)))
        for protocol in protocols:
            protocol.connectionLost(Failure(ConnectionDone()))
        self.assertEqual(self.counts().in_progress, 2)
        self.gate.open(6)
        self.reactor.pump_until(lambda: self.counts()[Outcome.COMMITTED] == 6)
        self.assertFalse(self.factory.connections)

    def test_a_factory_is_the_producer_of_its_sink(self) -> None:
        """The interface between sink and connections is one that has a name."""
        verifyObject(IPushProducer, self.factory)
