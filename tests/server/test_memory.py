"""The memory budget: what the frames of all connections take, and which go on when it is short."""

from __future__ import annotations

from collections.abc import Callable
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
from cafeteria_orch.server.memory import MAX_LAG, MemoryBudget, MemoryShare
from cafeteria_orch.server.reading import Pause
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
from tests.support.tracing import untraced

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


class MemoryCase(SynchronousTestCase):
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
        self.memory = self.factory.memory

    def connect(self, data: bytes = b"") -> tuple[OrchestratorProtocol, TCPTransport]:
        protocol, transport = connect(self.factory)
        protocol.dataReceived(data)
        return protocol, transport

    def half_frame(self, size: int = LONGEST, opcode: int = ECHO) -> bytes:
        """Half of the longest frame, or so much of it."""
        return frame(bytes([opcode]) + bytes(LONGEST - 1))[: 4 + size // 2]

    def rest(self, opcode: int = ECHO) -> bytes:
        return frame(bytes([opcode]) + bytes(LONGEST - 1))[len(self.half_frame()) :]

    def is_paused(self, transport: TCPTransport) -> bool:
        return transport.producerState == "paused"

    def fill(self) -> list[tuple[OrchestratorProtocol, TCPTransport]]:
        """Half frames of many, up to half of the limit: memory is short then."""
        return [self.connect(self.half_frame()) for _ in range(LIMIT // LONGEST)]


def shares_of(
    budget: MemoryBudget, granted: Callable[[], object], number: int
) -> list[MemoryShare]:
    """Shares whose connection does this when one gets its reservation."""
    protocol, _ = connect()
    protocol.resume = lambda _: granted()  # type: ignore[method-assign,assignment]
    return [MemoryShare(budget, protocol) for _ in range(number)]


class SharingTests(MemoryCase):
    """What is counted, and who goes on."""

    def test_what_is_counted(self) -> None:
        """The bytes of a frame count from its first one until it is processed."""
        protocol, _ = self.connect(self.half_frame(opcode=PENDING)[:2])
        self.assertEqual(self.memory.used, 2)
        protocol.dataReceived(self.half_frame(opcode=PENDING)[2:])
        self.assertEqual(self.memory.used, LONGEST // 2)
        protocol.dataReceived(self.rest(PENDING) + b"\0\0")
        self.assertEqual((self.memory.used, self.memory.in_progress), (LONGEST + 2, LONGEST))
        self.pending.finish()
        self.assertEqual((self.memory.used, self.memory.in_progress), (2, 0))

    def test_header_costs_nothing(self) -> None:
        """What a frame declares is not counted, what has come of it is."""
        for _ in range(3 * LIMIT // LONGEST):
            _, transport = self.connect(frame(bytes(LONGEST))[:4])
            self.assertFalse(self.is_paused(transport))
        self.assertEqual(self.memory.used, 0)

    def test_small_ones_go_on(self) -> None:
        """Who sends frames that are processed at once is not held, however short it is."""
        self.fill()
        _, transport = self.connect(frame(bytes([ECHO, 1])))
        self.assertEqual(transport.value(), frame(bytes([ECHO, 1])))
        self.assertFalse(self.is_paused(transport))

    def test_reservations_are_given_in_the_order_of_asking(self) -> None:
        """Beyond half of the limit a frame goes on when the ones before it left room for it."""
        self.fill()
        data = frame(bytes([ECHO]) + bytes(LONGEST - 1))
        waiting = [self.connect(data[:5]) for _ in range(9)]
        # More than these would exceed the limit if all of them ended.
        self.assertEqual(
            [self.is_paused(transport) for _, transport in waiting], [False] * 4 + [True] * 5
        )
        self.assertLessEqual(self.memory.used, LIMIT)
        for number, (protocol, transport) in enumerate(waiting):
            self.assertEqual(
                [self.is_paused(transport) for _, transport in waiting],
                [number + 4 <= other for other in range(9)],
            )
            protocol.dataReceived(data[5:])
            self.assertEqual(transport.value(), data)

    def test_the_first_bytes_of_a_frame_reserve_a_whole_one(self) -> None:
        """However few they are: a client that has said nothing of its length may send the most."""
        for first in range(1, 4):
            with self.subTest(first=first):
                self.setUp()
                self.fill()
                clients = [self.connect(self.half_frame()[:first]) for _ in range(30)]
                going_on = [each for each in clients if not self.is_paused(each[1])]
                self.assertEqual(len(going_on), (LIMIT // 2) // (LONGEST + 3))
                self.assertLessEqual(self.memory.used, LIMIT + 30 * first)

    def test_a_reservation_shrinks_when_the_length_is_known(self) -> None:
        """What a short frame does not need is there for others at once."""
        self.fill()
        short = frame(bytes([ECHO]) + bytes(9))
        clients = [self.connect(short[:3]) for _ in range(9)]
        self.assertEqual([self.is_paused(transport) for _, transport in clients].count(False), 4)
        before = self.memory.used
        clients[0][0].dataReceived(short[3:5])
        # It is short 9 bytes now, and one that waited has a whole frame.
        self.assertEqual([self.is_paused(transport) for _, transport in clients].count(False), 5)
        self.assertEqual(self.memory.used, before - LONGEST - 3 + 1 + 9 + LONGEST)

    def test_one_may_always_end(self) -> None:
        """Half frames alone fill it: one of them after the other may end all the same."""
        waiting = [self.connect(self.half_frame()) for _ in range(5 * LIMIT // LONGEST)]
        self.assertGreater(self.memory.used, LIMIT)
        for _ in range(len(waiting)):
            protocol, _ = next(
                client
                for client in waiting
                if not (client[1].value() or self.is_paused(client[1]))
            )
            protocol.dataReceived(self.rest())
        self.assertTrue(all(transport.value() for _, transport in waiting))
        self.assertEqual(self.memory.used, 0)

    def test_no_more_than_processors_can_take(self) -> None:
        """Where processors have what there is, nobody else begins before one of them is done."""
        while True:
            protocol, transport = self.connect(self.half_frame(opcode=PENDING))
            if self.is_paused(transport):
                break
            protocol.dataReceived(self.rest(PENDING))
        lose(protocol)
        self.assertEqual((len(self.pending.in_progress), self.memory.used), (10, LIMIT))
        late, transport = self.connect(self.half_frame())
        for _ in range(10):
            self.assertEqual(self.is_paused(transport), len(self.pending.in_progress) > 9)
            self.pending.finish()
        late.dataReceived(self.rest())
        self.assertEqual(len(transport.value()), 4 + LONGEST)

    def test_nobody_waits_for_a_client_between_two_frames(self) -> None:
        """A client that was paused between two frames and sends nothing more reserves nothing."""
        many = 3 * LIMIT // LONGEST
        waiting = [self.connect(self.half_frame()) for _ in range(many)]
        idle, transport = self.connect(frame(bytes([SHARED])))
        self.assertTrue(self.is_paused(transport))
        waiting += [self.connect(self.half_frame()) for _ in range(many)]
        self.pending.finish()
        for _ in waiting:
            protocol, _ = next(
                client
                for client in waiting
                if not (client[1].value() or self.is_paused(client[1]))
            )
            protocol.dataReceived(self.rest())
        self.assertFalse(self.is_paused(transport))
        # It has waited for no more than that: when it begins a frame, it waits like others.
        for _ in range(many):
            self.connect(self.half_frame())
        idle.dataReceived(self.half_frame())
        self.assertTrue(self.is_paused(transport))

    def test_who_leaves_makes_room(self) -> None:
        """A connection that is lost, closed or aborted gives back all that it had."""
        clients = [self.connect(self.half_frame()) for _ in range(5 * LIMIT // LONGEST)]
        ends: list[Any] = [lose, OrchestratorProtocol.abort, OrchestratorProtocol.end]
        for number, (protocol, _) in enumerate(clients):
            ends[number % 3](protocol)
            if number % 3:
                lose(protocol)
        self.assertEqual((self.memory.used, self.memory.in_progress), (0, 0))
        protocol, transport = self.connect(self.half_frame())
        self.assertFalse(self.is_paused(transport))

    def test_what_is_dropped_is_given_back_at_once(self) -> None:
        """A malformed message and what stands behind it is not counted until its peer is gone."""
        bad = frame(b"\x63" + bytes(LONGEST - 1))
        for data in (bad + self.half_frame(), frame(bytes([SHARED])) * 3 + bad, frame(b""), bad):
            protocol, _ = self.connect(data)
            while self.pending.in_progress:
                self.pending.finish()
            self.assertEqual((self.memory.used, self.memory.in_progress), (0, 0))
            lose(protocol)
            self.assertEqual((self.memory.used, self.memory.in_progress), (0, 0))

    def test_who_is_gone_does_not_wait(self) -> None:
        """A connection whose input has ended needs no more memory: it ends at once."""
        for _ in range(3 * LIMIT // LONGEST):
            self.connect(self.half_frame())
        for end in (lose, OrchestratorProtocol.readConnectionLost):
            protocol, transport = self.connect(frame(bytes([SHARED])) + self.half_frame())
            self.assertTrue(self.is_paused(transport))
            self.pending.finish()
            end(protocol)
            self.factory.pauseProducing()
            self.factory.resumeProducing()
            self.assertFalse(protocol.reading.reasons)

    def test_limit_below_a_frame(self) -> None:
        """However small the limit is, the longest frame gets through."""
        self.factory = OrchestratorFactory(
            Clock(), max_frame_bytes=LONGEST, max_in_flight_bytes=1, timeouts=PATIENT
        )
        self.factory.register_processor(ECHO, echo)
        for _ in range(3):
            protocol, transport = self.connect(self.half_frame())
            self.assertFalse(self.is_paused(transport))
            protocol.dataReceived(self.rest())
            self.assertTrue(transport.value())

    def test_what_a_paused_transport_still_delivers_is_counted(self) -> None:
        """At once: others may have to wait for it."""
        protocol, transport = self.connect(frame(bytes([PENDING])))
        self.assertTrue(self.is_paused(transport))
        protocol.dataReceived(self.half_frame())
        protocol.dataReceived(self.rest())
        self.assertEqual(self.memory.used, 1 + 4 + LONGEST)

    def test_what_a_paused_transport_still_delivers_is_processed(self) -> None:
        """TLS delivers what it has decrypted, though it is paused; memory was short before."""
        self.timeouts = Timeouts(frame=30, processing=None)
        message = frame(bytes([SHARED]) + bytes(LONGEST - 1))
        for is_held in (False, True):
            with self.subTest(is_held=is_held):
                self.setUp()
                self.memory.change(LIMIT // 2, 0)
                protocol, transport = self.connect(message)
                self.assertTrue(self.is_paused(transport))
                if is_held:
                    self.factory.pauseProducing()
                protocol.dataReceived(message)
                self.pending.finish()
                self.memory.change(-LIMIT // 2, 0)
                self.factory.resumeProducing()
                # No frame has begun: no client is waited for.
                self.assertEqual(self.clock.getDelayedCalls(), [])
                self.pending.finish()
                self.assertEqual(transport.value(), message * 2)
                self.assertFalse(self.is_paused(transport))
                self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_a_frame_that_is_whole_makes_no_room_before_it_is_processed(self) -> None:
        """Its reservation is given back when its bytes are counted, not before."""
        self.memory.change(LIMIT // 2, 0)
        clients = [self.connect(self.half_frame(opcode=PENDING)) for _ in range(5)]
        self.assertEqual(self.memory.used, LIMIT)
        _, transport = self.connect(frame(bytes([ECHO]) + bytes(9))[:5])
        self.assertTrue(self.is_paused(transport))
        clients[0][0].dataReceived(self.rest(PENDING))
        self.assertTrue(self.is_paused(transport))
        self.pending.finish()
        self.assertFalse(self.is_paused(transport))

    def test_who_waits_for_processors_goes_on_when_one_of_them_is_done(self) -> None:
        """Though in the same moment as much was received as was processed."""
        budget = MemoryBudget(Clock(), LIMIT, LONGEST, None)
        budget.change(LIMIT, LIMIT)
        granted: list[bool] = []
        (share,) = shares_of(budget, lambda: granted.append(True), 1)
        share.update(1, 0, LONGEST)
        share.ask()
        self.assertEqual(granted, [])
        budget.change(0, -LIMIT)
        self.assertEqual(granted, [True])


class DepthTests(SynchronousTestCase):
    """Very many at once."""

    def test_grants_do_not_nest(self) -> None:
        """However many are done as soon as they go on, they go on one after the other."""
        budget = MemoryBudget(Clock(), LIMIT, LONGEST, None)
        budget.change(LIMIT, LIMIT)
        granted: list[MemoryShare] = []

        def done() -> None:
            share = shares[len(granted)]
            granted.append(share)
            share.update(0, 0, 0)
            share.leave()

        shares = shares_of(budget, done, 5000)
        for share in shares:
            share.update(1, 0, 1)
            share.ask()
        self.assertEqual(granted, [])
        budget.change(-LIMIT, -LIMIT)
        self.assertEqual(granted, shares)
        self.assertEqual(budget.used, 0)


class PaceTests(MemoryCase):
    """Reservations that are not used, while others wait."""

    timeouts = Timeouts(frame=10 * MAX_LAG)

    def setUp(self) -> None:
        super().setUp()
        # One has a reservation, the next ones wait for it.
        half = self.half_frame()
        clients = [self.connect(half)[0] for _ in range(3 * LIMIT // LONGEST)]
        self.waiting = [client for client in clients if client.reading.reasons & Pause.MEMORY]
        self.admitted = [client for client in clients if client._memory.is_reserved]

    def pass_time(self) -> list[str]:
        """The warnings of an interval, one for each event."""
        self.factory.rate_limits.stop()
        with capturedLogs() as events:
            self.clock.pump([MAX_LAG / 8] * 8)
            # All of them have the same address.
            self.factory.rate_limits.stop()
        lines = texts(events, LogLevel.warn)
        return [line for line, event in zip(lines, events) for _ in range(event["refused"])]

    def test_silent(self) -> None:
        """Silence for an interval costs its connection, and the next ones have their turn."""
        (first, *_) = self.waiting
        warnings = self.pass_time()
        self.assertEqual(len(warnings), len(self.admitted))
        self.assertIn("too slowly while others waited for memory, 50 bytes were", warnings[0])
        for client in self.admitted:
            self.assertTrue(client.transport.half_closed)
        self.assertFalse(first.reading.reasons)
        self.assertEqual(self.factory.counters.limit_hits["frame_timeout"], len(warnings))

    def test_only_while_others_wait(self) -> None:
        """While there is room for all, the frame timeout alone counts."""
        for client in self.waiting:
            lose(client)
        for _ in range(3):
            self.assertEqual(self.pass_time(), [])

    def test_fast_enough(self) -> None:
        """A client that sends as fast as the frame timeout demands goes on."""
        for size in (5, 5, 5, 20):
            for client in self.admitted:
                client.dataReceived(bytes(size))
            self.assertEqual(self.pass_time(), [])
        # The many bytes of the last time do not make up for a silence.
        self.assertEqual(len(self.pass_time()), len(self.admitted))

    def test_too_slow(self) -> None:
        """A byte now and then does not help: the lag grows."""
        warnings = []
        for _ in range(2):
            for client in self.admitted:
                client.dataReceived(bytes(3))
            warnings += self.pass_time()
        self.assertEqual(len(warnings), len(self.admitted))

    def test_after_a_stop_of_the_process_what_has_come_is_read_first(self) -> None:
        """It may have come in time; whoever is still silent is closed after an interval."""
        with capturedLogs() as events:
            self.clock.advance(5 * MAX_LAG)
            for client in self.admitted:
                client.dataReceived(bytes(5))
            self.clock.pump([MAX_LAG / 8] * 7)
        self.assertEqual(texts(events, LogLevel.warn), [])
        self.assertEqual(len(self.pass_time()), len(self.admitted))

    def test_not_while_held(self) -> None:
        """That the server does not read it is not its fault."""
        self.factory.pauseProducing()
        for _ in range(3):
            self.assertEqual(self.pass_time(), [])
        self.factory.resumeProducing()
        self.assertEqual(len(self.pass_time()), len(self.admitted))

    def test_half_a_frame_at_once_is_fast_enough(self) -> None:
        """A client that had sent a part of its length, and sends much more than it had then."""
        for client in list(self.factory.connections):
            lose(client)
        for protocol, _ in self.fill():
            if protocol._memory.is_reserved:
                protocol.dataReceived(bytes(LONGEST // 4))
        half = self.half_frame()
        late = [self.connect(half[:2])[0] for _ in range(2 * LIMIT // LONGEST)]
        sent: set[OrchestratorProtocol] = set()
        # With its length known a frame needs less than was reserved: the next ones go on.
        while reserved := {each for each in late if each._memory.is_reserved} - sent:
            for client in reserved:
                client.dataReceived(half[2:])
            sent |= reserved
        self.assertTrue(0 < len(sent) < len(late))
        self.assertEqual(self.pass_time(), [])

    def test_a_client_is_judged_by_its_own_interval(self) -> None:
        """One that got its reservation a moment before others are judged is given its time."""
        with capturedLogs():
            self.clock.pump([MAX_LAG / 8] * 8)
        after = [client for client in self.waiting if client._memory.is_reserved]
        self.assertTrue(after)
        with capturedLogs() as events:
            self.clock.pump([MAX_LAG / 8] * 7)
        self.assertEqual(texts(events, LogLevel.warn), [])
        self.assertEqual(len(self.pass_time()), len(after))


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

    def send(self, most: int) -> None:
        chunk = self.transport.to_come[:most]
        self.transport.to_come = self.transport.to_come[most:]
        self.protocol.dataReceived(chunk)

    @property
    def held(self) -> int:
        """The bytes of it that the server holds outside of processors."""
        return self.protocol._decoder.holds()[0] + len(self.protocol._held or b"")


class MemoryMachine(RuleBasedStateMachine):
    """Clients that send any number of bytes at any time, and processors that end some day."""

    def __init__(self) -> None:
        super().__init__()
        self.factory = OrchestratorFactory(
            Clock(),
            max_frame_bytes=LONGEST,
            max_in_flight_bytes=LIMIT // 2,
            timeouts=PATIENT,
            log_level=LogLevel.critical,
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
    @rule(which=st.integers(0, 24), times=st.integers(1, 6), size=st.integers(1, CHUNK))
    def send(self, which: int, times: int, size: int) -> None:
        for _ in range(times):
            if sending := self.sending():
                sending[which % len(sending)].send(size)

    @rule(size=st.integers(1, 7) | st.integers(1, CHUNK))
    def everybody_sends(self, size: int) -> None:
        for client in self.sending():
            client.send(size)

    @precondition(lambda self: self.pending.in_progress)
    @rule()
    def finish(self) -> None:
        self.pending.finish()

    @rule(which=st.integers(0, 24))
    def lose(self, which: int) -> None:
        client = self.clients[which]
        lose(client.protocol)
        # Its messages in progress stay; a new client takes the place.
        self.clients[which] = Client(self.factory)

    @invariant()
    def bounded(self) -> None:
        """Beyond the limit there are a frame and a chunk of each connection at most."""
        budget = self.factory.memory
        in_progress = sum(client.size for _, client, _ in self.pending.in_progress)
        held = sum(client.held for client in self.clients)
        assert budget.in_progress == in_progress
        assert in_progress + held <= budget.used
        assert budget.used <= LIMIT // 2 + LONGEST + len(self.factory.connections) * CHUNK

    def teardown(self) -> None:
        """Nobody starves: if processors end and clients send, everything arrives."""
        while (sending := self.sending()) or self.pending.in_progress:
            for client in sending:
                client.send(LONGEST)
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
        assert self.factory.memory.used == self.factory.memory.in_progress == 0


class MemoryModelTests(SynchronousTestCase):
    """The machine above."""

    @untraced
    def test_whatever_happens(self) -> None:
        """It stays bounded, and nobody starves."""
        run_state_machine_as_test(
            MemoryMachine,
            settings=settings(
                max_examples=100,
                stateful_step_count=40,
                deadline=None,
                suppress_health_check=list(HealthCheck),
            ),
        )
