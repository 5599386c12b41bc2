"""How all connections of a factory end together."""

from __future__ import annotations

from twisted.internet.error import ConnectionLost
from twisted.internet.task import Clock
from twisted.logger import LogLevel, capturedLogs
from twisted.trial.unittest import SynchronousTestCase

from cafeteria_orch.server import responses
from cafeteria_orch.server.factory import OrchestratorFactory
from cafeteria_orch.server.responses import Exchange
from tests.support.builders import (
    ECHO,
    SUCCESS,
    Pending,
    batch_frame,
    connect,
    lose,
    numbered,
    texts,
)


class Draining(SynchronousTestCase):
    """``drain()``: idle connections close now, busy ones after the message in progress."""

    def setUp(self) -> None:
        self.pending = Pending()
        self.factory = OrchestratorFactory(Clock())
        self.factory.register_processor(ECHO, self.pending)
        self.protocol, self.transport = connect(self.factory)

    def test_a_drain_without_connections_is_done_at_once(self) -> None:
        """With no connection it is done at once."""
        lose(self.protocol)
        self.successResultOf(self.factory.drain())

    def test_an_idle_connection_closes_at_once(self) -> None:
        """The drain is done when the connection is lost."""
        drained = self.factory.drain()
        self.assertTrue(self.transport.half_closed)
        self.assertNoResult(drained)
        lose(self.protocol)
        self.successResultOf(drained)
        self.assertEqual(self.factory.connections, set())

    def test_a_busy_connection_answers_the_message_in_progress_and_closes(self) -> None:
        """It starts no other message."""
        self.protocol.dataReceived(numbered(1, 2))
        drained = self.factory.drain()
        self.assertFalse(self.transport.half_closed)
        self.pending.finish()
        self.assertEqual(self.transport.value(), numbered(1))
        self.assertTrue(self.transport.half_closed)
        self.assertEqual(len(self.pending.messages), 1)
        self.assertNoResult(drained)
        lose(self.protocol)
        self.successResultOf(drained)

    def test_a_half_received_frame_is_dropped_without_a_warning(self) -> None:
        """A half-received frame is dropped, without a warning."""
        self.protocol.dataReceived(batch_frame()[:-1])
        with capturedLogs() as events:
            self.factory.drain()
            self.protocol.dataReceived(batch_frame()[-1:])
            lose(self.protocol)
        self.assertEqual(self.transport.value(), b"")
        self.assertEqual(texts(events, LogLevel.warn), [])

    def test_a_drain_is_done_with_its_last_connection(self) -> None:
        """However the connections end."""
        other, _ = connect(self.factory)
        other.dataReceived(numbered(1))
        drained = self.factory.drain()
        lose(self.protocol)
        lose(other, ConnectionLost())
        self.assertNoResult(drained)
        self.pending.finish()
        self.successResultOf(drained)

    def test_a_drain_waits_for_messages_of_aborted_connections(self) -> None:
        """An abort cuts the connection; the drain still waits for what is in progress."""
        self.protocol.dataReceived(numbered(1))
        drained = self.factory.drain()
        self.factory.abort()
        self.assertTrue(self.transport.aborted)
        lose(self.protocol, ConnectionLost())
        self.assertNoResult(drained)
        self.pending.finish()
        self.successResultOf(drained)
        self.assertEqual(self.transport.value(), b"")

    def test_new_connections_are_turned_away(self) -> None:
        """From the beginning of the drain on."""
        self.factory.drain()
        self.assertIsNone(self.factory.buildProtocol(None))

    def test_a_second_drain_has_a_deferred_of_its_own(self) -> None:
        """Both are done at the same end."""
        first, second = self.factory.drain(), self.factory.drain()
        self.assertIsNot(first, second)
        lose(self.protocol)
        self.successResultOf(first)
        self.successResultOf(second)
        self.successResultOf(self.factory.drain())

    def test_a_processor_that_starts_a_drain_gets_its_answer_sent(self) -> None:
        """A drain that a processor starts lets this very message have its answer."""

        def processor(message: object, client: Exchange) -> None:
            self.factory.drain()
            responses.send_success(client)

        self.factory.register_processor(ECHO, processor, replace=True)
        self.protocol.dataReceived(numbered(1, 2))
        self.assertEqual(self.transport.value(), SUCCESS)
        self.assertTrue(self.transport.half_closed)
