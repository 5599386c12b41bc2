"""Any conversation: whatever is sent, cut and fired, each message has one answer, in order."""

from __future__ import annotations

import struct
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from hypothesis.strategies import SearchStrategy
from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionLost
from twisted.internet.task import Clock
from twisted.logger import LogLevel
from twisted.trial.unittest import SynchronousTestCase

from cafeteria_orch.server.factory import OrchestratorFactory
from cafeteria_orch.server.responses import Exchange
from cafeteria_orch.wire.messages import RawMessage
from tests.support.builders import FAIL, PATIENT, connect, echo, frame, lose
from tests.support.strategies import chunkings

DONE, RAISES, WAITS, FAILS_LATER, MALFORMED = range(200, 205)
"""Opcodes, each for a kind of processor; the last one has none."""

FINISHED = 3


class Boom(Exception):
    """What some processors raise."""


def message(opcode: int, number: int) -> bytes:
    """The frame of a message that carries its number, unless it has no body."""
    return frame(bytes([opcode]) + (b"" if opcode == FINISHED else struct.pack(">H", number)))


def answer(opcode: int, number: int) -> bytes:
    """The frame of the one answer that this message has."""
    if opcode == MALFORMED:
        return FAIL + b"\x03"
    return FAIL + b"\x02" if opcode in {RAISES, FAILS_LATER} else message(opcode, number)


def number_of(raw: RawMessage) -> int:
    """What :func:`message` put into it."""
    (number,) = struct.unpack(">H", raw.body)
    return int(number)


def raises(raw: RawMessage, client: Exchange) -> None:
    """A processor that fails."""
    raise Boom


class Conversations(SynchronousTestCase):
    """Properties of one connection."""

    @given(st.data())
    def test_one_answer_each_in_order(self, data: st.DataObject) -> None:
        """However the stream is cut and in whatever order Deferreds fire."""
        kinds = data.draw(st.lists(st.sampled_from((DONE, RAISES, WAITS, FAILS_LATER))))
        if data.draw(st.booleans()):
            kinds.append(MALFORMED)
        deferreds: list[Deferred[Any]] = [Deferred() for _ in kinds]
        delivered: list[int] = []

        def waits(raw: RawMessage, client: Exchange) -> Deferred[Any]:
            delivered.append(number_of(raw))
            return deferreds[delivered[-1]].addCallback(lambda _: echo(raw, client))

        factory = OrchestratorFactory(Clock(), log_level=LogLevel.error)
        factory.register_processor(DONE, echo)
        factory.register_processor(RAISES, raises)
        factory.register_processor(WAITS, waits)
        factory.register_processor(FAILS_LATER, waits)
        protocol, transport = connect(factory)
        chunks = data.draw(
            chunkings(b"".join(message(kind, number) for number, kind in enumerate(kinds)))
        )
        # A Deferred may fire before its message has even come.
        firings = data.draw(st.permutations(range(len(kinds))))
        turns = data.draw(st.permutations([True] * len(chunks) + [False] * len(firings)))
        for is_chunk in turns:
            if is_chunk:
                protocol.dataReceived(chunks.pop(0))
                continue
            number = firings.pop(0)
            if kinds[number] == FAILS_LATER:
                deferreds[number].errback(Boom())
            else:
                deferreds[number].callback(None)
        for number, deferred in enumerate(deferreds):
            # One whose message was never delivered has nobody to take its failure.
            if number not in delivered:
                deferred.addErrback(lambda failure: failure.trap(Boom))
        lose(protocol)
        self.flushLoggedErrors(Boom)
        self.assertEqual(
            transport.value(), b"".join(answer(kind, number) for number, kind in enumerate(kinds))
        )
        self.assertEqual(
            delivered, [n for n, kind in enumerate(kinds) if kind in {WAITS, FAILS_LATER}]
        )
        self.assertEqual(factory.connections, set())

    def test_whatever_happens(self) -> None:
        """The rules of :class:`ConnectionMachine` in any order keep its invariants."""
        run_state_machine_as_test(
            ConnectionMachine, settings=settings(max_examples=200, stateful_step_count=30)
        )
        self.flushLoggedErrors(Boom)


def some_messages(least: int) -> SearchStrategy[list[int]]:
    """The opcodes of some messages; many of them wait, and few are the last."""
    kinds = (DONE, RAISES, WAITS)
    opcodes = st.lists(st.sampled_from((*kinds, WAITS)), min_size=least, max_size=6)
    return opcodes | st.lists(st.sampled_from((*kinds, FINISHED)), min_size=least, max_size=6)


class ConnectionMachine(RuleBasedStateMachine):
    """A connection, and what its client and its processors do to it."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.factory = OrchestratorFactory(self.clock, timeouts=PATIENT, log_level=LogLevel.error)
        self.factory.register_processor(DONE, self.done)
        self.factory.register_processor(RAISES, self.raises)
        self.factory.register_processor(WAITS, self.waits)
        self.protocol, self.transport = connect(self.factory)
        # What the client has sent: its messages, those of them that are whole here, the rest.
        self.sent: list[tuple[int, int]] = []
        self.unsent = b""
        self.ends: list[int] = []
        self.received = 0
        # What became of it.
        self.delivered: list[int] = []
        self.in_progress: list[tuple[RawMessage, Exchange, Deferred[Any]]] = []
        self.output_full = False
        self.violations: list[str] = []
        self.answers = b""
        self.we_stop = False
        self.half_closed = False
        self.lost = False

    @property
    def whole(self) -> list[tuple[int, int]]:
        """The messages that have come whole."""
        return [sent for sent, end in zip(self.sent, self.ends) if end <= self.received]

    def deliver(self, raw: RawMessage) -> None:
        """What holds whenever a message is delivered."""
        # An error raised here would be taken for one of the processor.
        if self.in_progress:
            self.violations.append("two messages in hand")
        if self.transport.half_closed or self.transport.disconnecting:
            self.violations.append("delivered after our close")
        self.delivered.append(number_of(raw))

    def expect(self, raw: RawMessage, opcode: int) -> None:
        """The client gets this answer if it is still there."""
        if not (self.lost or self.transport.aborted):
            self.answers += answer(opcode, number_of(raw))

    def done(self, raw: RawMessage, client: Exchange) -> None:
        self.deliver(raw)
        self.expect(raw, DONE)
        echo(raw, client)

    def raises(self, raw: RawMessage, client: Exchange) -> None:
        self.deliver(raw)
        self.expect(raw, RAISES)
        raise Boom

    def waits(self, raw: RawMessage, client: Exchange) -> Deferred[Any]:
        self.deliver(raw)
        deferred: Deferred[Any] = Deferred()
        self.in_progress.append((raw, client, deferred))
        return deferred

    def receive(self, data: bytes) -> None:
        """The client's bytes come in."""
        self.received += len(data)
        self.protocol.dataReceived(data)

    # Without messages to begin with, nearly every run would be over before it has begun.
    @initialize(kinds=some_messages(1), kept=st.integers(0, 12))
    def begin(self, kinds: list[int], kept: int) -> None:
        self.send(kinds, kept)

    @precondition(lambda self: not (self.half_closed or self.lost))
    @rule(kinds=some_messages(0), kept=st.integers(0, 12))
    def send(self, kinds: list[int], kept: int) -> None:
        """The client sends some messages; the end of the last may be still on its way."""
        for kind in kinds:
            number = len(self.sent)
            self.sent.append((kind, number))
            self.unsent += message(kind, number)
            self.ends.append(self.received + len(self.unsent))
        cut = max(0, len(self.unsent) - kept)
        data, self.unsent = self.unsent[:cut], self.unsent[cut:]
        self.receive(data)

    @precondition(lambda self: self.in_progress)
    @rule(how=st.sampled_from(("keep", "keep", "twice", "fail", "close")))
    def settle(self, how: str) -> None:
        """The message in hand is done."""
        raw, client, deferred = self.in_progress.pop()
        if how == "fail":
            self.expect(raw, RAISES)
            deferred.errback(Boom())
            return
        self.expect(raw, WAITS)
        echo(raw, client)
        if how == "twice":
            echo(raw, client)
        self.we_stop |= how == "close"
        deferred.callback(how != "close")

    @precondition(lambda self: not (self.half_closed or self.lost))
    @rule()
    def half_close(self) -> None:
        self.half_closed = True
        self.protocol.readConnectionLost()

    @precondition(lambda self: not self.lost)
    @rule(error=st.sampled_from((None, ConnectionLost())))
    def lose(self, error: Exception | None) -> None:
        self.lost = True
        lose(self.protocol, error)

    # Of an idle connection it would mostly be the end before anything has happened.
    @precondition(lambda self: self.in_progress and not (self.we_stop or self.lost))
    @rule(how=st.sampled_from(("drain", "abort")))
    def stop(self, how: str) -> None:
        """The server wants to end."""
        self.we_stop = True
        if how == "abort":
            self.factory.abort()
        else:
            self.factory.drain()

    @precondition(lambda self: self.transport.producer is not None and not self.lost)
    @rule()
    def output(self) -> None:
        """The client does not read its answers; or does again."""
        producer = self.transport.producer
        assert producer is not None
        self.output_full = not self.output_full
        (producer.pauseProducing if self.output_full else producer.resumeProducing)()

    @precondition(lambda self: self.clock.getDelayedCalls() and not self.lost)
    @rule()
    def time_passes(self) -> None:
        self.clock.advance(3)
        assert self.transport.aborted
        self.lose(ConnectionLost())

    @precondition(lambda self: self.lost and not self.in_progress)
    @rule()
    def over(self) -> None:
        """Nothing happens any more."""

    @property
    def closed(self) -> bool:
        """Whether the connection is closed, or on its way to be."""
        transport = self.transport
        return self.lost or transport.half_closed or transport.disconnecting or transport.aborted

    @invariant()
    def check(self) -> None:
        """What holds between any two events."""
        assert self.violations == []
        assert self.transport.value() == self.answers
        self.check_deliveries()
        self.check_reading()
        # It is known until it is gone and nothing of it is in hand.
        known = {self.protocol} if self.in_progress or not self.lost else set()
        assert self.factory.connections == known

    def check_deliveries(self) -> None:
        """In order, without a gap, nothing behind a FINISHED; all of it if nobody waits."""
        due: list[int] = []
        finished = False
        for kind, number in self.whole:
            finished = kind == FINISHED
            if finished:
                break
            due.append(number)
        assert self.delivered == due[: len(self.delivered)]
        if self.we_stop:
            assert self.closed == (self.lost or self.transport.aborted or not self.in_progress)
        elif self.in_progress:
            assert self.closed == self.lost
        elif self.lost or not self.output_full:
            assert self.delivered == due
            assert self.closed == (finished or self.half_closed or self.lost)

    def check_reading(self) -> None:
        """Paused while a message is in hand or the output is full; nothing is kept at the end."""
        if not (self.half_closed or self.closed):
            paused = self.transport.producerState == "paused"
            assert paused == bool(self.in_progress or self.output_full)
        if self.closed and not self.lost:
            assert self.protocol.is_empty

    def teardown(self) -> None:
        """In the end nothing is left of it."""
        for _ in range(2):
            while self.in_progress:
                self.settle("keep")
                self.check()
            if not self.lost:
                self.lose(None)
                self.check()
        assert self.factory.connections == set()
        assert self.clock.getDelayedCalls() == []
