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

    def test_a_close_between_frames_is_logged_at_debug_only(self) -> None:
        """A client that closes between frames is no news above debug."""
        self.protocol.dataReceived(batch_frame())
        with capturedLogs() as events:
            self.protocol.readConnectionLost()
            lose(self.protocol)
        self.assertEqual({event["log_level"] for event in events}, {LogLevel.debug})
        self.assert_gone()

    def test_a_close_inside_a_frame_is_one_warning(self) -> None:
        """With the number of bytes that were missing, whether a half-close comes first or not."""
        for cut, missing in ((-1, 1), (-7, 7), (4, len(batch_frame()) - 4), (1, 3)):
            for half_closes in (True, False):
                self.factory.rate_limits.stop()
                protocol, transport = connect(self.factory)
                with capturedLogs() as events:
                    protocol.dataReceived(batch_frame() + batch_frame()[:cut])
                    if half_closes:
                        protocol.readConnectionLost()
                        self.assertTrue(transport.disconnecting)
                    lose(protocol)
                (warning,) = self.complaints(events)
                self.assertIn(f"ip: {PEER} ", warning)
                self.assertRegex(warning, rf"\b{missing} bytes\b")
                self.assertEqual(transport.value(), SUCCESS)

    def test_a_broken_frame_is_logged_once_what_came_before_it_is_done(self) -> None:
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

    def test_a_reset_is_one_warning(self) -> None:
        """Inside a frame or not, once the client has sent something."""
        for data, missing in ((batch_frame(), 0), (batch_frame()[:-5], 5)):
            self.factory.rate_limits.stop()
            protocol, _ = connect(self.factory)
            with capturedLogs() as events:
                protocol.dataReceived(data)
                lose(protocol, ConnectionLost())
            (warning,) = self.complaints(events)
            self.assertIn("reset", warning)
            self.assertRegex(warning, rf"\b{missing} bytes\b")

    def test_a_reset_before_the_first_byte_is_no_failure(self) -> None:
        """Balancers check servers so, every few seconds: nothing above debug."""
        protocol, _ = connect(self.factory)
        with capturedLogs() as events:
            lose(protocol, ConnectionLost())
        self.assertEqual({event["log_level"] for event in events}, {LogLevel.debug})

    def test_a_reset_after_our_close_is_not_logged(self) -> None:
        """However the client ends what we have closed, it is no news."""
        for error in (None, ConnectionLost(), ConnectionAborted()):
            protocol, _ = connect(self.factory)
            with capturedLogs() as events:
                protocol.dataReceived(FINISHED + batch_frame()[:-5])
                lose(protocol, error)
            self.assertEqual(self.complaints(events), [])


class HalfClose(ClosingCase):
    """A client that stops sending still gets all it is owed."""

    def test_a_half_close_with_nothing_owed_closes_at_once(self) -> None:
        """With nothing owed, the connection closes at once."""
        self.protocol.dataReceived(batch_frame())
        self.protocol.readConnectionLost()
        self.assertTrue(self.transport.disconnecting)
        lose(self.protocol)
        self.assert_gone()

    def test_a_half_closed_client_waits_longer_than_the_close_timeout(self) -> None:
        """What is owed may take its time."""
        self.protocol.dataReceived(numbered(1))
        self.protocol.readConnectionLost()
        self.clock.advance(CLOSE_TIMEOUT * 10)
        self.assertFalse(self.transport.aborted)
        self.pending.finish()
        self.assertEqual(self.transport.value(), numbered(1))

    def test_a_half_closed_client_that_reads_slowly_is_waited_for(self) -> None:
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


class PeerLost(ClosingCase):
    """Messages of a lost client that were read whole are processed."""

    def test_a_lost_client_waits_for_no_room_in_the_output(self) -> None:
        """Frames that waited for room in the output are processed when there is no output."""
        producer = self.transport.producer
        assert producer is not None
        producer.pauseProducing()
        self.protocol.dataReceived(numbered(1))
        lose(self.protocol)
        self.pending.finish()
        self.assertEqual(len(self.pending.messages), 1)
        self.assert_gone()

    def test_a_processor_that_closes_ends_a_lost_connection(self) -> None:
        """The close is logged once."""
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

    def test_a_malformed_frame_of_a_lost_client_is_logged(self) -> None:
        """Nothing is written."""
        self.protocol.dataReceived(numbered(1) + MALFORMED + numbered(2))
        lose(self.protocol)
        with capturedLogs() as events:
            self.pending.finish()
        self.assertEqual(len(texts(events, LogLevel.error)), 1)
        self.assertEqual(self.transport.writes, [])
        self.assertEqual(len(self.pending.messages), 1)
        self.assert_gone()

    def test_a_finished_of_a_lost_client_ends_it_without_a_warning(self) -> None:
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

    def test_the_last_answers_leave_before_the_half_close(self) -> None:
        """In one write."""
        written: list[bytes] = []
        self.patch(
            self.transport,
            "loseWriteConnection",
            lambda: written.append(self.transport.value()),
        )
        self.protocol.dataReceived(batch_frame() + MALFORMED)
        self.assertEqual(written, [SUCCESS + FAIL + b"\x03"])
        self.assertEqual(len(self.transport.writes), 1)

    def test_what_comes_after_the_close_is_dropped(self) -> None:
        """It is neither processed nor kept."""
        self.protocol.dataReceived(MALFORMED + numbered(1))
        self.protocol.dataReceived(batch_frame()[:9])
        self.protocol.dataReceived(batch_frame()[9:] + numbered(2))
        self.assertEqual(self.transport.value(), FAIL + b"\x03")
        self.assertEqual(self.pending.messages, [])
        self.assertTrue(self.protocol.is_empty)

    def test_a_client_that_does_not_close_is_aborted_after_two_seconds(self) -> None:
        """A client that does not close is aborted after two seconds, and not before."""
        self.protocol.dataReceived(FINISHED)
        self.clock.advance(CLOSE_TIMEOUT - 0.01)
        self.assertFalse(self.transport.aborted)
        self.clock.advance(0.02)
        self.assertTrue(self.transport.aborted)
        self.assertEqual(CLOSE_TIMEOUT, 2)
        lose(self.protocol, ConnectionAborted())
        self.assert_gone()

    def test_a_close_is_not_started_twice(self) -> None:
        """The close timeout runs on."""
        self.protocol.dataReceived(FINISHED)
        self.clock.advance(1)
        self.protocol.end()
        self.protocol.end()
        self.assertEqual(len(self.clock.getDelayedCalls()), 1)
        self.clock.advance(1)
        self.assertTrue(self.transport.aborted)

    def test_tls_and_transports_without_half_close_get_a_plain_close(self) -> None:
        """The timeout is the same."""
        tls = TCPTransport()
        alsoProvides(tls, ISSLTransport)
        transports: tuple[Any, ...] = (tls, StringTransport())
        for transport in transports:
            protocol = OrchestratorProtocol(self.factory, None)
            protocol.makeConnection(transport)
            protocol.dataReceived(MALFORMED)
            self.assertEqual(transport.value(), FAIL + b"\x03")
            self.assertTrue(transport.disconnecting)
            self.assertFalse(getattr(transport, "half_closed", False))
            (timer,) = self.clock.getDelayedCalls()
            self.assertEqual(timer.getTime() - self.clock.seconds(), CLOSE_TIMEOUT)
            lose(protocol)
            self.factory.rate_limits.stop()
            self.assertEqual(self.clock.getDelayedCalls(), [])
