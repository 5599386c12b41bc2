"""How a connection ends: by the client, or by us."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from twisted.internet.error import ConnectionAborted, ConnectionLost
from twisted.internet.interfaces import ISSLTransport
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.logger import LogEvent, LogLevel, capturedLogs
from twisted.trial.unittest import SynchronousTestCase
from zope.interface import alsoProvides

from cafeteria_orch.server.connection import OrchestratorProtocol
from cafeteria_orch.server.factory import OrchestratorFactory
from cafeteria_orch.server.receiver import CLOSE_TIMEOUT
from cafeteria_orch.wire.messages import Finished, encode
from tests.support.builders import (
    ECHO,
    FAIL,
    PEER,
    SUCCESS,
    Pending,
    TCPTransport,
    batch_frame,
    connect,
    frame,
    lose,
    numbered,
    texts,
)

MALFORMED = frame(b"\x63")
FINISHED = frame(encode(Finished(1)))


class ClosingCase(SynchronousTestCase):
    """A connection to a factory whose messages of ``ECHO`` stay in progress."""

    def setUp(self) -> None:
        self.clock = Clock()
        self.pending = Pending()
        self.factory = OrchestratorFactory(self.clock, log_level=LogLevel.debug)
        self.factory.register_processor(ECHO, self.pending)
        self.protocol, self.transport = connect(self.factory)

    def assert_gone(self) -> None:
        """The factory has forgotten the connection, and no timer of it is left."""
        self.assertEqual(self.factory.connections, set())
        self.assertEqual(self.clock.getDelayedCalls(), [])


class ClientCloses(ClosingCase):
    """What the log says of a client that leaves."""

    def complaints(self, events: Sequence[LogEvent]) -> list[str]:
        """What there is above info."""
        return texts(events, LogLevel.warn) + texts(events, LogLevel.error)

    def test_between_frames(self) -> None:
        """A client that closes between frames is no news above debug."""
        self.protocol.dataReceived(batch_frame())
        with capturedLogs() as events:
            self.protocol.readConnectionLost()
            lose(self.protocol)
        self.assertEqual({event["log_level"] for event in events}, {LogLevel.debug})
        self.assert_gone()

    def test_inside_a_frame(self) -> None:
        """One that closes inside a frame gives one warning, with the bytes that were missing."""
        for cut, missing in ((-1, 1), (-7, 7), (4, len(batch_frame()) - 4), (1, 3)):
            protocol, transport = connect(self.factory)
            with capturedLogs() as events:
                protocol.dataReceived(batch_frame() + batch_frame()[:cut])
                protocol.readConnectionLost()
                self.assertTrue(transport.disconnecting)
                lose(protocol)
            (warning,) = self.complaints(events)
            self.assertIn(f"ip: {PEER} ", warning)
            self.assertRegex(warning, rf"\b{missing} bytes\b")
            self.assertEqual(transport.value(), SUCCESS)

    def test_inside_a_frame_without_half_close(self) -> None:
        """The same holds where the transport reports no half-close."""
        with capturedLogs() as events:
            self.protocol.dataReceived(batch_frame()[:-5])
            lose(self.protocol)
        (warning,) = self.complaints(events)
        self.assertRegex(warning, r"\b5 bytes\b")
        self.assert_gone()

    def test_inside_a_frame_with_a_message_in_progress(self) -> None:
        """The broken frame is told of once, when what came before it is done."""
        self.protocol.dataReceived(numbered(1, 2) + batch_frame()[:-5])
        with capturedLogs() as events:
            self.protocol.readConnectionLost()
            self.pending.finish()
            self.assertEqual(self.complaints(events), [])
            self.pending.finish()
            lose(self.protocol)
        self.assertEqual(len(self.complaints(events)), 1)
        self.assertEqual(self.transport.value(), numbered(1, 2))

    def test_reset(self) -> None:
        """A reset gives one warning, be it inside a frame or not."""
        for data, missing in ((b"", 0), (batch_frame()[:-5], 5)):
            protocol, _ = connect(self.factory)
            with capturedLogs() as events:
                protocol.dataReceived(data)
                lose(protocol, ConnectionLost())
            (warning,) = self.complaints(events)
            self.assertIn("reset", warning)
            self.assertRegex(warning, rf"\b{missing} bytes\b")

    def test_reset_after_our_close(self) -> None:
        """However the client ends what we have closed, it is no news."""
        for error in (None, ConnectionLost(), ConnectionAborted()):
            protocol, _ = connect(self.factory)
            with capturedLogs() as events:
                protocol.dataReceived(FINISHED + batch_frame()[:-5])
                lose(protocol, error)
            self.assertEqual(self.complaints(events), [])


class HalfClose(ClosingCase):
    """A client that stops sending still gets all it is owed."""

    def test_idle(self) -> None:
        """With nothing owed, the connection closes at once."""
        self.protocol.dataReceived(batch_frame())
        self.protocol.readConnectionLost()
        self.assertTrue(self.transport.disconnecting)
        lose(self.protocol)
        self.assert_gone()

    def test_answers_owed(self) -> None:
        """All answers owed arrive, in order; only then is the connection closed."""
        self.protocol.dataReceived(numbered(1, 2, 3) + batch_frame())
        self.protocol.readConnectionLost()
        for _ in range(3):
            self.assertFalse(self.transport.disconnecting)
            self.pending.finish()
        self.assertEqual(self.transport.value(), numbered(1, 2, 3) + SUCCESS)
        self.assertTrue(self.transport.disconnecting)
        lose(self.protocol)
        self.assert_gone()

    def test_takes_its_time(self) -> None:
        """What is owed may take longer than a close of ours waits."""
        self.protocol.dataReceived(numbered(1))
        self.protocol.readConnectionLost()
        self.clock.advance(CLOSE_TIMEOUT * 10)
        self.assertFalse(self.transport.aborted)
        self.pending.finish()
        self.assertEqual(self.transport.value(), numbered(1))

    def test_output_full(self) -> None:
        """A client that half-closes and reads slowly is waited for before the rest is handled."""
        producer = self.transport.producer
        assert producer is not None
        self.protocol.dataReceived(numbered(1) + batch_frame())
        producer.pauseProducing()
        self.protocol.readConnectionLost()
        self.pending.finish()
        self.assertFalse(self.transport.disconnecting)
        producer.resumeProducing()
        self.assertEqual(self.transport.value(), numbered(1) + SUCCESS)
        self.assertTrue(self.transport.disconnecting)

    def test_malformed_behind_answers_owed(self) -> None:
        """A malformed frame before a half-close is refused after all that came before it."""
        self.protocol.dataReceived(numbered(1) + MALFORMED)
        self.protocol.readConnectionLost()
        self.pending.finish()
        self.assertEqual(self.transport.value(), numbered(1) + FAIL + b"\x03")
        self.assertTrue(self.transport.disconnecting)


class PeerLost(ClosingCase):
    """What was read whole is handled though nobody waits for its answer any more."""

    def test_whole_frames_are_processed(self) -> None:
        """The whole frames behind the message in progress are still processed, in order."""
        self.protocol.dataReceived(numbered(1, 2, 3) + batch_frame()[:-1])
        lose(self.protocol, ConnectionLost())
        for _ in range(3):
            self.assertEqual(self.factory.connections, {self.protocol})
            self.pending.finish()
        self.assertEqual(
            [message.body for message in self.pending.messages], [b"\1", b"\2", b"\3"]
        )
        self.assertEqual(self.transport.value(), b"")
        self.assert_gone()

    def test_output_was_full(self) -> None:
        """Frames that waited for room in the output are processed when there is no output."""
        producer = self.transport.producer
        assert producer is not None
        producer.pauseProducing()
        self.protocol.dataReceived(numbered(1))
        lose(self.protocol)
        self.pending.finish()
        self.assertEqual(len(self.pending.messages), 1)
        self.assert_gone()

    def test_false_ends_it(self) -> None:
        """A processor that closes the connection ends this too, and it is told once."""
        self.protocol.dataReceived(numbered(1, 2))
        lose(self.protocol)
        with capturedLogs() as events:
            self.pending.finish(keep=False)
        self.assertEqual(len(self.pending.messages), 1)
        self.assertEqual(
            texts(events, LogLevel.debug),
            [f"action: close_connection | result: success | ip: {PEER}"],
        )
        self.assert_gone()

    def test_malformed_frame(self) -> None:
        """A malformed frame among them is logged, and nothing is written."""
        self.protocol.dataReceived(numbered(1) + MALFORMED + numbered(2))
        lose(self.protocol)
        with capturedLogs() as events:
            self.pending.finish()
        self.assertEqual(len(texts(events, LogLevel.error)), 1)
        self.assertEqual(self.transport.writes, [])
        self.assertEqual(len(self.pending.messages), 1)
        self.assert_gone()

    def test_finished(self) -> None:
        """A FINISHED among them is the end, and no warning."""
        self.protocol.dataReceived(numbered(1) + FINISHED + batch_frame()[:-1])
        lose(self.protocol)
        with capturedLogs() as events:
            self.pending.finish()
        self.assertEqual(texts(events, LogLevel.warn), [])
        self.assertEqual(self.protocol.session.agency_id, 1)
        self.assert_gone()


class WeClose(ClosingCase):
    """Every orderly close of ours lets the last answer arrive."""

    def test_half_close_first(self) -> None:
        """We half-close, and keep reading: unread input would become a reset."""
        self.protocol.dataReceived(MALFORMED)
        self.assertEqual(self.transport.value(), FAIL + b"\x03")
        self.assertTrue(self.transport.half_closed)
        self.assertFalse(self.transport.disconnecting)
        self.assertEqual(self.transport.producerState, "producing")

    def test_last_answer_first(self) -> None:
        """The last answers are written before the half-close, in one write."""
        written: list[bytes] = []
        self.patch(
            self.transport,
            "loseWriteConnection",
            lambda: written.append(self.transport.value()),
        )
        self.protocol.dataReceived(batch_frame() + MALFORMED)
        self.assertEqual(written, [SUCCESS + FAIL + b"\x03"])
        self.assertEqual(len(self.transport.writes), 1)

    def test_drops_what_it_reads(self) -> None:
        """What comes after the close is neither handled nor kept."""
        self.protocol.dataReceived(MALFORMED + numbered(1))
        self.protocol.dataReceived(batch_frame()[:9])
        self.protocol.dataReceived(batch_frame()[9:] + numbered(2))
        self.assertEqual(self.transport.value(), FAIL + b"\x03")
        self.assertEqual(self.pending.messages, [])
        self.assertTrue(self.protocol.is_empty)

    def test_aborts_in_the_end(self) -> None:
        """A client that does not close is aborted after two seconds, and not before."""
        self.protocol.dataReceived(FINISHED)
        self.clock.advance(CLOSE_TIMEOUT - 0.01)
        self.assertFalse(self.transport.aborted)
        self.clock.advance(0.02)
        self.assertTrue(self.transport.aborted)
        self.assertEqual(CLOSE_TIMEOUT, 2)
        lose(self.protocol, ConnectionAborted())
        self.assert_gone()

    def test_closed_once(self) -> None:
        """A connection that is being closed is not closed anew, and its time not prolonged."""
        self.protocol.dataReceived(FINISHED)
        self.clock.advance(1)
        self.protocol.end()
        self.protocol.end()
        self.assertEqual(len(self.clock.getDelayedCalls()), 1)
        self.clock.advance(1)
        self.assertTrue(self.transport.aborted)

    def test_transport_without_half_close(self) -> None:
        """Where half-closing is impossible, or TLS, it is a plain close with the same limit."""
        tls = TCPTransport()
        alsoProvides(tls, ISSLTransport)
        transports: tuple[Any, ...] = (tls, StringTransport())
        for transport in transports:
            protocol = OrchestratorProtocol(self.factory)
            protocol.makeConnection(transport)
            protocol.dataReceived(MALFORMED)
            self.assertEqual(transport.value(), FAIL + b"\x03")
            self.assertTrue(transport.disconnecting)
            self.assertFalse(getattr(transport, "half_closed", False))
            (timer,) = self.clock.getDelayedCalls()
            self.assertEqual(timer.getTime() - self.clock.seconds(), CLOSE_TIMEOUT)
            lose(protocol)
            self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_abort(self) -> None:
        """An abort is at once, and nothing is delivered or answered after it."""
        self.protocol.dataReceived(numbered(1, 2))
        self.factory.abort()
        self.assertTrue(self.transport.aborted)
        lose(self.protocol, ConnectionAborted())
        self.pending.finish()
        self.assertEqual(len(self.pending.messages), 1)
        self.assertEqual(self.transport.value(), b"")
        self.assert_gone()
