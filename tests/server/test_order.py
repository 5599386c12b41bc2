"""One connection: one message at a time, answers in order, and backpressure."""

from __future__ import annotations

from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from cafeteria_orch.server.factory import OrchestratorFactory
from tests.support.builders import (
    ECHO,
    FAIL,
    SUCCESS,
    Pending,
    batch_frame,
    connect,
    echo,
    frame,
    numbered,
)


class Order(SynchronousTestCase):
    """One message at a time, in order, answered in that order."""

    def setUp(self) -> None:
        self.pending = Pending()
        self.factory = OrchestratorFactory(Clock())
        self.factory.register_processor(ECHO, self.pending)
        self.factory.register_processor(ECHO + 1, echo)
        self.protocol, self.transport = connect(self.factory)

    def test_messages_are_processed_one_at_a_time(self) -> None:
        """The next frame of the same chunk waits until the message in progress is done."""
        self.protocol.dataReceived(numbered(1, 2, 3))
        for number in (1, 2, 3):
            self.assertEqual(
                [message.body for message, _, _ in self.pending.in_progress], [bytes([number])]
            )
            self.pending.finish()
        self.assertEqual(self.transport.value(), numbered(1, 2, 3))

    def test_a_message_is_in_progress_until_its_processor_is_done(self) -> None:
        """Its answer may have left before."""
        self.protocol.dataReceived(numbered(1, 2))
        message, client, deferred = self.pending.in_progress.pop()
        echo(message, client)
        self.assertEqual(len(self.pending.messages), 1)
        deferred.callback(True)
        self.assertEqual(len(self.pending.messages), 2)

    def test_a_connection_is_not_read_while_a_message_is_in_progress(self) -> None:
        """While a message is in progress nothing is read, and afterwards it is again."""
        self.protocol.dataReceived(numbered(1, 2))
        self.assertEqual(self.transport.producerState, "paused")
        self.pending.finish()
        self.assertEqual(self.transport.producerState, "paused")
        self.pending.finish()
        self.assertEqual(self.transport.producerState, "producing")

    def test_a_processor_that_is_done_at_once_pauses_nothing(self) -> None:
        """A processor that is done when it returns leaves the reading alone."""
        self.patch(self.transport, "pauseProducing", lambda: self.fail("paused"))
        self.protocol.dataReceived(batch_frame() * 3)
        self.assertEqual(self.transport.value(), SUCCESS * 3)

    def test_a_chunk_of_many_messages_needs_no_deep_stack(self) -> None:
        """However many frames a chunk holds, no stack grows with them."""
        self.protocol.dataReceived(numbered(1) * 3000)
        while self.pending.in_progress:
            self.pending.finish()
        self.assertEqual(self.transport.value(), numbered(1) * 3000)


class Output(SynchronousTestCase):
    """How answers leave."""

    def setUp(self) -> None:
        self.factory = OrchestratorFactory(Clock())
        self.factory.register_processor(ECHO, echo)
        self.protocol, self.transport = connect(self.factory)

    def test_answers_do_not_wait_for_nagle(self) -> None:
        """``TCP_NODELAY`` is set."""
        self.assertTrue(self.transport.no_delay)

    def test_answers_that_are_ready_together_leave_in_one_write(self) -> None:
        """The answers that are ready within one ``dataReceived`` leave in one write."""
        self.protocol.dataReceived(batch_frame() * 3 + numbered(1) + frame(b"\x63"))
        self.assertEqual(self.transport.writes, [SUCCESS * 3 + numbered(1) + FAIL + b"\x03"])

    def test_many_answers_leave_before_the_chunk_ends(self) -> None:
        """They do not gather in memory, and a transport that is full stops the rest."""
        written: list[int] = []
        producer = self.transport.producer
        assert producer is not None

        def write(data: bytes) -> None:
            written.append(len(data))
            producer.pauseProducing()

        self.patch(self.transport, "write", write)
        answer = frame(bytes([ECHO]) + bytes(20_000))
        self.protocol.dataReceived(answer * 10)
        self.assertEqual(written, [4 * len(answer)])
        producer.resumeProducing()
        self.assertEqual(written, [4 * len(answer)] * 2)

    def test_nothing_is_written_without_an_answer(self) -> None:
        """Nothing is written where there is nothing to say."""
        self.protocol.dataReceived(batch_frame()[:7])
        self.protocol.dataReceived(b"")
        self.assertEqual(self.transport.writes, [])

    def test_a_client_that_does_not_read_is_not_read(self) -> None:
        """A client that does not read its answers is not read from, until it does."""
        producer = self.transport.producer
        assert producer is not None
        self.assertTrue(self.transport.streaming)
        producer.pauseProducing()
        self.assertEqual(self.transport.producerState, "paused")
        self.protocol.dataReceived(numbered(1))
        self.assertEqual(self.transport.value(), b"")
        producer.resumeProducing()
        self.assertEqual(self.transport.producerState, "producing")
        self.assertEqual(self.transport.value(), numbered(1))

    def test_a_full_transport_stops_the_rest_of_the_chunk(self) -> None:
        """Its other messages are processed when the client reads."""
        pending = Pending()
        self.factory.register_processor(ECHO, pending, replace=True)
        self.protocol.dataReceived(numbered(1) + batch_frame())
        producer = self.transport.producer
        assert producer is not None
        self.patch(self.transport, "write", lambda data: producer.pauseProducing())
        pending.finish()
        self.assertEqual(self.transport.producerState, "paused")
        del self.transport.write
        producer.resumeProducing()
        self.assertEqual(self.transport.value(), SUCCESS)
