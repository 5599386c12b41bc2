"""What the frames of all connections may take together, and who goes on when it is short."""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from twisted.internet.task import Clock
from twisted.logger import LogLevel, capturedLogs
from twisted.trial.unittest import SynchronousTestCase

from cafeteria_orch.server.connection import OrchestratorProtocol
from cafeteria_orch.server.factory import OrchestratorFactory
from cafeteria_orch.server.memory import PACE_INTERVAL, InFlight
from cafeteria_orch.server.timeouts import Timeouts
from tests.support.builders import (
    ECHO,
    PATIENT,
    Pending,
    TCPTransport,
    connect,
    echo,
    frame,
    lose,
    texts,
)

LONGEST = 100
LIMIT = 10 * LONGEST
CHUNK = 20
"""What a client of these tests sends at once."""

PENDING = 41
SHARED = 42


class ReadTransport(TCPTransport):
    """A transport with a peer that sends as long as it is read."""

    def __init__(self) -> None:
        super().__init__()
        self.to_come = b""

    @property
    def is_read(self) -> bool:
        return self.producerState == "producing" and not (self.aborted or self.half_closed)


class InFlightTests(SynchronousTestCase):
    """A factory whose connections have little memory together."""

    timeouts = PATIENT

    def setUp(self) -> None:
        self.clock = Clock()
        self.factory = OrchestratorFactory(
            self.clock, max_frame_bytes=LONGEST, max_in_flight_bytes=LIMIT, timeouts=self.timeouts
        )
        self.pending = Pending()
        self.factory.register_processor(ECHO, echo)
        self.factory.register_processor(PENDING, self.pending)
        self.factory.register_processor(SHARED, self.pending, pipelined=True)
        self.in_flight = self.factory.in_flight

    def connect(self, data: bytes = b"") -> tuple[OrchestratorProtocol, TCPTransport]:
        protocol, transport = connect(self.factory)
        protocol.dataReceived(data)
        return protocol, transport

    def half_frame(self, size: int = LONGEST, opcode: int = ECHO) -> bytes:
        """Half of the longest frame, or so much of it."""
        return frame(bytes([opcode]) + bytes(LONGEST - 1))[: 4 + size // 2]

    def rest(self, opcode: int = ECHO) -> bytes:
        return frame(bytes([opcode]) + bytes(LONGEST - 1))[len(self.half_frame()) :]

    def is_held(self, transport: TCPTransport) -> bool:
        return transport.producerState == "paused"

    def fill(self) -> list[tuple[OrchestratorProtocol, TCPTransport]]:
        """Half frames of many, up to half of the limit."""
        return [self.connect(self.half_frame()) for _ in range(LIMIT // LONGEST)]


class SharingTests(InFlightTests):
    """What is counted, and who goes on."""

    def test_what_is_counted(self) -> None:
        """The bytes of a frame count from its first one until it is processed."""
        protocol, _ = self.connect(self.half_frame(opcode=PENDING)[:2])
        self.assertEqual(self.in_flight.bytes, 2)
        protocol.dataReceived(self.half_frame(opcode=PENDING)[2:])
        self.assertEqual(self.in_flight.bytes, LONGEST // 2)
        protocol.dataReceived(self.rest(PENDING) + b"\0\0")
        self.assertEqual((self.in_flight.bytes, self.in_flight.in_progress), (LONGEST + 2, LONGEST))
        self.pending.finish()
        self.assertEqual((self.in_flight.bytes, self.in_flight.in_progress), (2, 0))

    def test_header_costs_nothing(self) -> None:
        """What a frame declares is not counted, what has come of it is."""
        for _ in range(3 * LIMIT // LONGEST):
            _, transport = self.connect(frame(bytes(LONGEST))[:4])
            self.assertFalse(self.is_held(transport))
        self.assertEqual(self.in_flight.bytes, 0)

    def test_small_ones_go_on(self) -> None:
        """Who sends frames that are processed at once is not held, however short it is."""
        self.fill()
        _, transport = self.connect(frame(bytes([ECHO, 1])))
        self.assertEqual(transport.value(), frame(bytes([ECHO, 1])))
        self.assertFalse(self.is_held(transport))

    def test_in_turn(self) -> None:
        """Beyond half of it one frame after the other is let in, in the order they came."""
        self.fill()
        data = frame(bytes([ECHO]) + bytes(LONGEST - 1))
        waiting = [self.connect(data[:5]) for _ in range(9)]
        held = [self.is_held(transport) for _, transport in waiting]
        # The others would fill the limit if they ended.
        self.assertEqual(held, [False] * 4 + [True] * 5)
        self.assertLessEqual(self.in_flight.bytes, LIMIT)
        for number, (protocol, transport) in enumerate(waiting):
            self.assertEqual(
                [self.is_held(transport) for _, transport in waiting],
                [number + 4 <= other for other in range(9)],
            )
            protocol.dataReceived(data[5:])
            self.assertEqual(transport.value(), data)

    def test_one_may_always_end(self) -> None:
        """Half frames alone fill it: one of them after the other may end all the same."""
        waiting = [self.connect(self.half_frame()) for _ in range(5 * LIMIT // LONGEST)]
        self.assertGreater(self.in_flight.bytes, LIMIT)
        for _ in range(len(waiting)):
            protocol, _ = next(
                client for client in waiting if not (client[1].value() or self.is_held(client[1]))
            )
            protocol.dataReceived(self.rest())
        self.assertTrue(all(transport.value() for _, transport in waiting))
        self.assertEqual(self.in_flight.bytes, 0)

    def test_no_more_than_processors_can_take(self) -> None:
        """Where processors have what there is, nobody else begins before one of them is done."""
        while True:
            protocol, transport = self.connect(self.half_frame(opcode=PENDING))
            if self.is_held(transport):
                break
            protocol.dataReceived(self.rest(PENDING))
        lose(protocol)
        self.assertEqual(len(self.pending.in_progress), 9)
        late, transport = self.connect(self.half_frame())
        for _ in range(9):
            self.assertEqual(self.is_held(transport), len(self.pending.in_progress) > 8)
            self.pending.finish()
        late.dataReceived(self.rest())
        self.assertEqual(len(transport.value()), 4 + LONGEST)

    def test_nobody_waits_for_the_idle(self) -> None:
        """A client that waited between two frames and sends nothing more holds nobody up."""
        many = 3 * LIMIT // LONGEST
        waiting = [self.connect(self.half_frame()) for _ in range(many)]
        idle, transport = self.connect(frame(bytes([SHARED])))
        self.assertTrue(self.is_held(transport))
        waiting += [self.connect(self.half_frame()) for _ in range(many)]
        self.pending.finish()
        for _ in waiting:
            protocol, _ = next(
                client for client in waiting if not (client[1].value() or self.is_held(client[1]))
            )
            protocol.dataReceived(self.rest())
        self.assertFalse(self.is_held(transport))
        # It has waited for no more than that: when it begins a frame, it waits like others.
        for _ in range(many):
            self.connect(self.half_frame())
        idle.dataReceived(self.half_frame())
        self.assertTrue(self.is_held(transport))

    def test_who_leaves_makes_room(self) -> None:
        """A connection that is lost, closed or aborted gives back all that it had."""
        clients = [self.connect(self.half_frame()) for _ in range(5 * LIMIT // LONGEST)]
        ends: list[Any] = [lose, OrchestratorProtocol.abort, OrchestratorProtocol.drain]
        for number, (protocol, _) in enumerate(clients):
            ends[number % 3](protocol)
            lose(protocol)
        self.assertEqual((self.in_flight.bytes, self.in_flight.in_progress), (0, 0))
        protocol, transport = self.connect(self.half_frame())
        self.assertFalse(self.is_held(transport))

    def test_what_is_dropped_is_given_back(self) -> None:
        """Messages behind a malformed one, or behind the end, are not counted for ever."""
        bad = frame(b"\x63")
        for data in (bad + self.half_frame(), frame(bytes([SHARED])) * 3 + bad, frame(b"")):
            protocol, _ = self.connect(data)
            while self.pending.in_progress:
                self.pending.finish()
            lose(protocol)
            self.assertEqual((self.in_flight.bytes, self.in_flight.in_progress), (0, 0))

    def test_who_is_gone_does_not_wait(self) -> None:
        """A connection whose input has ended needs no more memory: it ends at once."""
        for _ in range(3 * LIMIT // LONGEST):
            self.connect(self.half_frame())
        for end in (lose, OrchestratorProtocol.readConnectionLost):
            protocol, transport = self.connect(frame(bytes([SHARED])) + self.half_frame())
            self.assertTrue(self.is_held(transport))
            self.pending.finish()
            end(protocol)
            self.factory.pauseProducing()
            self.factory.resumeProducing()
            self.assertFalse(protocol._holds)

    def test_limit_below_a_frame(self) -> None:
        """However small the limit is, the longest frame gets through."""
        self.factory = OrchestratorFactory(
            Clock(), max_frame_bytes=LONGEST, max_in_flight_bytes=1, timeouts=PATIENT
        )
        self.factory.register_processor(ECHO, echo)
        for _ in range(3):
            protocol, transport = self.connect(self.half_frame())
            self.assertFalse(self.is_held(transport))
            protocol.dataReceived(self.rest())
            self.assertTrue(transport.value())


class Hasty:
    """A waiter that is done as soon as it is admitted."""

    missing = 1

    def __init__(self, in_flight: InFlight) -> None:
        self.in_flight = in_flight

    def admit(self) -> None:
        self.in_flight.change(-1)
        self.in_flight.leave(self)

    def keep_pace(self) -> None:
        """It never has the time."""


class DepthTests(SynchronousTestCase):
    """Very many at once."""

    def test_not_one_inside_the_other(self) -> None:
        """However many are done at once, they are admitted one after the other."""
        in_flight = InFlight(Clock(), LIMIT, LONGEST)
        many = 5000
        in_flight.change(LIMIT + many)
        in_flight.in_progress = LIMIT
        for _ in range(many):
            in_flight.wait(Hasty(in_flight))
        in_flight.in_progress = 0
        in_flight.change(-1)
        self.assertEqual(in_flight.bytes, LIMIT - 1)


class PaceTests(InFlightTests):
    """Who was admitted, and does not send, while others wait."""

    timeouts = Timeouts(frame=10 * PACE_INTERVAL)

    def setUp(self) -> None:
        super().setUp()
        # One is admitted, the next one waits for it.
        half = self.half_frame()
        clients = [self.connect(half)[0] for _ in range(3 * LIMIT // LONGEST)]
        self.waiting = [client for client in clients if client._holds]
        self.admitted = [client for client in clients if client._admitted]

    def pass_time(self) -> list[str]:
        with capturedLogs() as events:
            self.clock.advance(PACE_INTERVAL)
        return texts(events, LogLevel.warn)

    def test_silent(self) -> None:
        """Silence for an interval costs its connection, and the next ones have their turn."""
        (first, *_) = self.waiting
        warnings = self.pass_time()
        self.assertEqual(len(warnings), len(self.admitted))
        self.assertIn("too slowly while others waited for memory, 50 bytes were", warnings[0])
        for client in self.admitted:
            self.assertTrue(client.transport.half_closed)
        self.assertFalse(first._holds)
        self.assertEqual(self.factory.counters.limit_hits["frame_timeout"], len(warnings))

    def test_only_while_others_wait(self) -> None:
        """While there is room for all, the frame timeout alone counts."""
        for client in self.waiting:
            lose(client)
        for _ in range(3):
            self.assertEqual(self.pass_time(), [])

    def test_fast_enough(self) -> None:
        """Who sends as fast as the frame timeout demands goes on, and is asked again."""
        for size in (5, 5, 5, 20):
            for client in self.admitted:
                client.dataReceived(bytes(size))
            self.assertEqual(self.pass_time(), [])
        # What came before an interval does not count in it.
        self.assertEqual(len(self.pass_time()), len(self.admitted))

    def test_too_slow(self) -> None:
        """A byte now and then does not help."""
        for client in self.admitted:
            client.dataReceived(bytes(4))
        self.assertEqual(len(self.pass_time()), len(self.admitted))

    def test_not_while_held(self) -> None:
        """That the server does not read it is not its fault."""
        self.factory.pauseProducing()
        for _ in range(3):
            self.assertEqual(self.pass_time(), [])
        self.factory.resumeProducing()
        self.assertEqual(len(self.pass_time()), len(self.admitted))


class Client:
    """A client with a stream of frames to send, and how far it has come."""

    def __init__(self, factory: OrchestratorFactory) -> None:
        protocol = factory.buildProtocol(None)
        assert protocol is not None
        self.protocol = protocol
        self.transport = ReadTransport()
        protocol.makeConnection(self.transport)
        self.sent = 0
        self.expected = 0

    def begin(self, opcode: int, size: int) -> None:
        self.transport.to_come += frame(bytes([opcode]) + bytes(size - 1))
        self.expected += 1

    def send(self) -> None:
        chunk = self.transport.to_come[:CHUNK]
        self.transport.to_come = self.transport.to_come[CHUNK:]
        self.protocol.dataReceived(chunk)


class InFlightMachine(RuleBasedStateMachine):
    """Clients that send frames in chunks, and processors that end some day."""

    def __init__(self) -> None:
        super().__init__()
        self.factory = OrchestratorFactory(
            Clock(), max_frame_bytes=LONGEST, max_in_flight_bytes=LIMIT // 2, timeouts=PATIENT
        )
        self.pending = Pending()
        self.factory.register_processor(PENDING, self.pending)
        self.factory.register_processor(SHARED, self.pending, pipelined=True)
        self.clients: list[Client] = [Client(self.factory) for _ in range(25)]

    def sending(self) -> list[Client]:
        return [c for c in self.clients if c.transport.to_come and c.transport.is_read]

    @rule(
        which=st.integers(0, 24),
        opcode=st.sampled_from((PENDING, SHARED)),
        size=st.sampled_from((1, 15, LONGEST, LONGEST)),
    )
    def begin(self, which: int, opcode: int, size: int) -> None:
        self.clients[which].begin(opcode, size)

    @rule()
    def all_begin(self) -> None:
        for client in self.clients:
            client.begin(PENDING, LONGEST)

    @precondition(lambda self: self.sending())
    @rule(which=st.integers(0, 24), times=st.integers(1, 6))
    def send(self, which: int, times: int) -> None:
        for _ in range(times):
            if sending := self.sending():
                sending[which % len(sending)].send()

    @rule()
    def everybody_sends(self) -> None:
        for client in self.sending():
            client.send()

    @precondition(lambda self: self.pending.in_progress)
    @rule()
    def finish(self) -> None:
        self.pending.finish()

    @rule(which=st.integers(0, 24))
    def lose(self, which: int) -> None:
        client = self.clients[which]
        lose(client.protocol)
        # What is in hand stays there; a new client takes the place.
        self.clients[which] = Client(self.factory)

    @invariant()
    def bounded(self) -> None:
        """A chunk of each connection beyond the limit at most; nothing is counted twice."""
        most = LIMIT // 2 + len(self.factory.connections) * (CHUNK + 4)
        in_hand = sum(client.size for _, client, _ in self.pending.in_progress)
        in_flight = self.factory.in_flight
        assert in_hand <= in_flight.in_progress <= in_flight.bytes <= most

    def teardown(self) -> None:
        """Nobody starves: if processors end and clients send, everything arrives."""
        while (sending := self.sending()) or self.pending.in_progress:
            for client in sending:
                client.send()
            if self.pending.in_progress:
                self.pending.finish()
        for client in self.clients:
            assert not client.transport.to_come
            answers = client.transport.value()
            count = 0
            while answers:
                count += 1
                answers = answers[4 + int.from_bytes(answers[:4], "big") :]
            assert count == client.expected
        assert self.factory.memory.used == self.factory.in_flight.in_progress == 0


class InFlightModelTests(SynchronousTestCase):
    """The machine above."""

    def test_whatever_happens(self) -> None:
        """It stays bounded, and nobody starves."""
        run_state_machine_as_test(
            InFlightMachine,
            settings=settings(
                max_examples=100,
                stateful_step_count=40,
                deadline=None,
                suppress_health_check=list(HealthCheck),
            ),
        )
