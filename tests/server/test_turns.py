"""Long frames of many clients are decoded one in each iteration of the reactor, in fair turn."""

from __future__ import annotations

from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.trial.unittest import SynchronousTestCase

from cafeteria_orch.server.connection import LONG_PAYLOAD, OrchestratorProtocol
from cafeteria_orch.server.factory import OrchestratorFactory
from cafeteria_orch.server.turns import ITERATIONS
from tests.support.builders import SUCCESS, Pending, batch_frame, connect, frame, lose

BLOB = 41


class IteratedClock(Clock):
    """A clock that makes a reactor's iterations: what is called later is not called at once."""

    def iterate(self) -> None:
        due = list(self.calls)
        self.calls.clear()
        for call in due:
            call.func(*call.args, **call.kw)

    def next_turn(self) -> None:
        for _ in range(ITERATIONS):
            self.iterate()


class TurnTests(SynchronousTestCase):
    """Whose frame is decoded now, and whose later."""

    def setUp(self) -> None:
        self.clock = IteratedClock()
        self.factory = OrchestratorFactory(self.clock)
        self.decoded: list[int] = []
        self.factory.register_processor(BLOB, lambda *_: True, decoder=self.decode, answers=False)
        self.clients = [self.connect() for _ in range(4)]

    def connect(self) -> tuple[OrchestratorProtocol, StringTransport]:
        return connect(self.factory)

    def decode(self, body: bytes) -> int:
        self.decoded.append(body[0])
        return body[0]

    def blob(self, number: int) -> bytes:
        """A frame that takes a turn."""
        return frame(bytes([BLOB, number]) + bytes(LONG_PAYLOAD))

    def send_all(self) -> None:
        """Every client sends two blobs."""
        for number, (protocol, _) in enumerate(self.clients):
            protocol.dataReceived(self.blob(number) * 2)

    def test_one_long_frame_is_decoded_every_few_iterations(self) -> None:
        """The first at once, then connections in turn."""
        self.send_all()
        # The second of client 0 asked before the others came.
        for expected in (0, 0, 1, 2, 3, 1, 2, 3):
            self.assertEqual(self.decoded, [expected])
            for _ in range(ITERATIONS - 1):
                self.clock.iterate()
            self.assertEqual(self.decoded, [expected])
            self.decoded.clear()
            self.clock.iterate()

    def test_a_short_batch_does_not_wait_for_long_ones(self) -> None:
        """A short batch is decoded and answered while long ones wait for their turns."""
        self.send_all()
        quick, transport = self.connect()
        quick.dataReceived(batch_frame())
        self.assertEqual((transport.value(), len(self.decoded)), (SUCCESS, 1))

    def test_a_connection_that_waits_for_its_turn_is_not_read(self) -> None:
        """Who waits for a turn is read no further, and is read on after it."""
        self.send_all()
        _, transport = self.clients[3]
        self.assertEqual(transport.producerState, "paused")
        for _ in range(8):
            self.clock.next_turn()
        self.assertEqual(transport.producerState, "producing")

    def test_messages_behind_a_long_one_stay_behind_it(self) -> None:
        """A short message behind a long one that waits is handled after it."""
        self.send_all()
        protocol, transport = self.clients[3]
        protocol.dataReceived(batch_frame())
        self.assertEqual(transport.value(), b"")
        for _ in range(8):
            self.clock.next_turn()
        self.assertEqual((self.decoded.count(3), transport.value()), (2, SUCCESS))

    def test_a_client_that_is_alone_waits_for_no_turn(self) -> None:
        """A client that has the reactor for itself waits for no turn of another."""
        protocol, _ = self.clients[0]
        for _ in range(3):
            protocol.dataReceived(self.blob(7))
            self.clock.next_turn()
        self.assertEqual(self.decoded, [7, 7, 7])
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_a_lost_client_keeps_its_turn(self) -> None:
        """What was read whole is processed."""
        self.send_all()
        lose(self.clients[3][0])
        for _ in range(8):
            self.clock.next_turn()
        self.assertEqual(self.decoded.count(3), 2)
        self.assertEqual(len(self.factory.connections), 3)

    def test_a_closed_connection_loses_its_turn(self) -> None:
        """No other connection does."""
        self.send_all()
        self.clients[1][0].end()
        self.clients[2][0].abort()
        for _ in range(8):
            self.clock.next_turn()
        self.assertEqual(sorted(self.decoded), [0, 0, 3, 3])

    def test_a_full_sink_uses_no_turns(self) -> None:
        """The reactor is not kept busy meanwhile."""
        self.send_all()
        self.factory.pauseProducing()
        for _ in range(8):
            self.clock.next_turn()
        self.assertEqual((self.decoded, self.clock.getDelayedCalls()), ([0], []))
        self.factory.resumeProducing()
        for _ in range(8):
            self.clock.next_turn()
        self.assertEqual(sorted(self.decoded), [0, 0, 1, 1, 2, 2, 3, 3])

    def test_a_drain_drops_a_message_that_waits_for_its_turn(self) -> None:
        """What waits behind a message in progress is not begun any more when we drain."""
        pending = Pending()
        self.factory.register_processor(BLOB + 1, pending, pipelined=True, answers=False)
        protocol, _ = self.clients[0]
        protocol.dataReceived(frame(bytes([BLOB + 1])))
        self.clients[1][0].dataReceived(self.blob(1))
        protocol.dataReceived(self.blob(0))
        protocol.end()
        self.clock.next_turn()
        self.assertEqual(self.decoded, [1])
        pending.finish()
        self.clock.next_turn()
        self.assertEqual(self.decoded, [1])
