"""Any conversation: whatever is sent, cut and fired, each message has one answer, in order."""

from __future__ import annotations

import struct
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.logger import LogLevel
from twisted.trial.unittest import SynchronousTestCase

from cafeteria_orch.server.factory import OrchestratorFactory
from cafeteria_orch.server.responses import Exchange
from cafeteria_orch.wire.messages import RawMessage
from tests.support.builders import FAIL, connect, echo, frame, lose
from tests.support.strategies import chunkings
from tests.support.tracing import untraced

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

    @untraced
    @given(st.data())
    def test_each_message_has_one_answer_in_order(self, data: st.DataObject) -> None:
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
