"""Processors that take their time: Deferreds, coroutines, threads."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from twisted.internet import reactor as installed_reactor
from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.task import Clock
from twisted.logger import LogLevel, capturedLogs
from twisted.trial.unittest import SynchronousTestCase, TestCase

from cafeteria_orch.server import responses
from cafeteria_orch.server.factory import OrchestratorFactory
from cafeteria_orch.server.responses import Exchange
from cafeteria_orch.server.timeouts import Timeouts
from cafeteria_orch.wire.errors import BatchRejected, TryAgainLater
from cafeteria_orch.wire.messages import RawMessage
from tests.support.builders import (
    ECHO,
    FAIL,
    PATIENT,
    SUCCESS,
    Pending,
    TCPTransport,
    batch_frame,
    connect,
    echo,
    frame,
    lose,
    texts,
    until,
)

# Its type is that of a module, which has none of a reactor's methods.
reactor: Any = installed_reactor


class Boom(Exception):
    """What no processor should raise."""


def exchange(processor: Callable[..., Any]) -> TCPTransport:
    """Have this processor handle one message of a new connection."""
    factory = OrchestratorFactory(Clock())
    factory.register_processor(ECHO, processor)
    protocol, transport = connect(factory)
    protocol.dataReceived(frame(bytes([ECHO])))
    return transport


class Undecided:
    """The result of a processor that is neither true nor false."""

    def __bool__(self) -> bool:
        raise Boom


def raise_boom(message: object, client: Exchange) -> None:
    raise Boom


class Faults(SynchronousTestCase):
    """What fails after a processor has returned is a fault of our own: FAIL, and a close."""

    def test_it_costs_no_answer_and_is_logged_once(self) -> None:
        """At once or later; what came before in the same chunk is answered, and after it dropped."""
        for is_later in (False, True):
            for answers in (True, False):
                with self.subTest(is_later=is_later, answers=answers):
                    self.check(is_later=is_later, answers=answers)

    def check(self, *, is_later: bool, answers: bool) -> None:
        factory = OrchestratorFactory(Clock())
        deferred: Deferred[object] = Deferred()

        def processor(_: object, client: Exchange) -> object:
            if answers:
                responses.send_success(client)
            return deferred if is_later else Undecided()

        factory.register_processor(ECHO, processor)
        protocol, transport = connect(factory)
        protocol.dataReceived(batch_frame() + frame(bytes([ECHO])) + batch_frame())
        if is_later:
            deferred.callback(Undecided())
        self.assertEqual(len(self.flushLoggedErrors(Boom)), 1)
        own = SUCCESS if answers else FAIL + b"\x02"
        self.assertEqual(transport.value(), SUCCESS + own)
        self.assertTrue(transport.half_closed)
        lose(protocol)
        self.assertEqual(factory.connections, set())

    def test_a_message_that_cannot_be_named_in_the_log(self) -> None:
        """Its processor raises, and so does what the log says of the message."""

        class Nameless:
            @property
            def batch_number(self) -> int:
                raise Boom

        for is_later in (False, True):
            factory, pending = OrchestratorFactory(Clock()), Pending()
            processor = pending if is_later else raise_boom
            factory.register_processor(ECHO, processor, decoder=lambda _: Nameless())
            protocol, transport = connect(factory)
            protocol.dataReceived(batch_frame() + frame(bytes([ECHO])) + batch_frame())
            if is_later:
                pending.in_progress.pop()[2].errback(KeyError())
            self.assertEqual(len(self.flushLoggedErrors(Boom)), 1)
            self.assertEqual(transport.value(), SUCCESS + FAIL + b"\x02")
            self.assertTrue(transport.half_closed)


class TimesOut(SynchronousTestCase):
    """A processor may have a patience of its own: ``times_out=False``."""

    def test_the_processing_timeout_does_not_hold_for_it(self) -> None:
        """Another one that is in progress beside it is answered in its place all the same."""
        for others in (0, 1):
            clock = Clock()
            factory = OrchestratorFactory(clock, timeouts=Timeouts(None, None, 60))
            patient, other = Pending(), Pending()
            factory.register_processor(ECHO, patient, pipelined=True, times_out=False)
            factory.register_processor(ECHO + 1, other, pipelined=True)
            protocol, transport = connect(factory)
            protocol.dataReceived(frame(bytes([ECHO + 1])) * others + frame(bytes([ECHO])))
            self.assertEqual(len(clock.getDelayedCalls()), others)
            with capturedLogs() as events:
                clock.pump([10] * 100)
            self.assertEqual(transport.value(), (FAIL + b"\x01") * others)
            self.assertEqual(len(texts(events, LogLevel.warn)), others)
            self.assertEqual(factory.counters.limit_hits["processing_timeout"], others)
            patient.finish()
            self.assertEqual(transport.value(), (FAIL + b"\x01") * others + frame(bytes([ECHO])))
            self.assertEqual(clock.getDelayedCalls(), [])


def answers_and_gives(result: object) -> Callable[..., object]:
    """A processor that answers, and returns this."""

    def processor(message: object, client: Exchange) -> object:
        responses.send_success(client)
        return result

    return processor


async def awaited(result: bool | None) -> bool | None:
    """The result of a coroutine."""
    return result


class Results(SynchronousTestCase):
    """A processor may return a Deferred or a coroutine of what it would have returned."""

    def test_keeps_or_closes(self) -> None:
        """``True`` and ``None`` keep the connection, ``False`` closes it; once it is there."""
        for result, closed in ((True, False), (None, False), (False, True)):
            later: Deferred[object] = Deferred()
            transport = exchange(answers_and_gives(later))
            self.assertFalse(transport.half_closed)
            later.callback(result)
            transports = [
                transport,
                exchange(answers_and_gives(result)),
                exchange(answers_and_gives(succeed(result))),
                exchange(answers_and_gives(awaited(result))),
            ]
            for transport in transports:
                self.assertEqual((transport.value(), transport.half_closed), (SUCCESS, closed))

    def test_fails(self) -> None:
        """A Deferred that fails is a processor that raises: FAIL with the error's reason."""
        for error, reason in ((Boom(), 2), (TryAgainLater("busy"), 1), (BatchRejected("no"), 2)):
            for now in (True, False):
                deferred = fail(error) if now else Deferred[bool]()
                transport = exchange(lambda message, client, result=deferred: result)
                if not now:
                    deferred.errback(error)
                self.flushLoggedErrors(type(error))
                self.assertEqual(transport.value(), FAIL + bytes([reason]))
                self.assertFalse(transport.half_closed)

    def test_nothing_is_left_unhandled(self) -> None:
        """The Deferred that came in has no failure left in it when all is done."""
        deferred: Deferred[bool] = Deferred()
        exchange(lambda message, client: deferred)
        deferred.errback(Boom())
        self.flushLoggedErrors(Boom)
        self.successResultOf(deferred)

    def test_awaits_a_deferred(self) -> None:
        """A coroutine may await a Deferred, and answers once that has fired."""
        deferred: Deferred[int] = Deferred()

        async def processor(message: object, client: Exchange) -> None:
            responses.send(client, await deferred)

        transport = exchange(processor)
        self.assertEqual(transport.value(), b"")
        deferred.callback(77)
        self.assertEqual(transport.value(), frame(b"\x4d"))

    def test_a_coroutine_raises(self) -> None:
        """At once or later: FAIL 2, the connection stays, and the log says where it was."""
        for deferred in (succeed(None), Deferred[None]()):

            async def processor(
                message: object, client: Exchange, waits_for: Deferred[None] = deferred
            ) -> None:
                await waits_for
                raise Boom

            with capturedLogs() as events:
                transport = exchange(processor)
                if not deferred.called:
                    self.assertEqual(transport.value(), b"")
                    deferred.callback(None)
            self.flushLoggedErrors(Boom)
            self.assertEqual(transport.value(), FAIL + b"\x02")
            self.assertFalse(transport.half_closed)
            (line,) = texts(events, LogLevel.error)
            self.assertRegex(line, r"error: Boom at test_processors\.py:\d+$")


class BlockingProcessors(TestCase):
    """``blocking=True``: in a thread, in order, while other connections go on."""

    timeout = 20

    def setUp(self) -> None:
        self.factory = OrchestratorFactory(reactor, timeouts=PATIENT)
        self.addCleanup(self.factory.stop_threads)
        self.go = threading.Event()
        self.addCleanup(self.go.set)
        self.threads: list[threading.Thread] = []

    def waits(self, message: RawMessage, client: Exchange) -> None:
        """A processor that blocks until the test lets it go on."""
        self.threads.append(threading.current_thread())
        self.go.wait(10)
        echo(message, client)

    async def test_others_go_on(self) -> None:
        """While it blocks, other connections are served and its own waits."""
        self.factory.register_processor(ECHO, self.waits, blocking=True)
        slow, slow_transport = connect(self.factory)
        quick, quick_transport = connect(self.factory)
        slow.dataReceived(frame(bytes([ECHO])) + batch_frame())
        quick.dataReceived(batch_frame())
        self.assertEqual(quick_transport.value(), SUCCESS)
        await until(reactor, lambda: self.threads)
        self.assertEqual(slow_transport.value(), b"")
        self.assertEqual(slow_transport.producerState, "paused")
        self.go.set()
        await until(reactor, lambda: slow_transport.value().endswith(SUCCESS))
        self.assertEqual(slow_transport.value(), frame(bytes([ECHO])) + SUCCESS)
        self.assertEqual(slow_transport.producerState, "producing")

    async def test_own_pool_of_daemon_threads(self) -> None:
        """It runs in a daemon thread that is not of the reactor's own pool."""
        self.factory.register_processor(ECHO, self.waits, blocking=True)
        self.go.set()
        protocol, transport = connect(self.factory)
        protocol.dataReceived(frame(bytes([ECHO])))
        await until(reactor, transport.value)
        (thread,) = self.threads
        self.assertIsNot(thread, threading.current_thread())
        self.assertTrue(thread.daemon)
        self.assertNotIn(thread, reactor.getThreadPool().threads)

    async def test_answers_in_order(self) -> None:
        """Its answers stand among those of other processors in the messages' order."""
        self.factory.register_processor(ECHO, self.waits, blocking=True)
        self.factory.register_processor(ECHO + 1, echo)
        self.go.set()
        frames = [frame(bytes([ECHO + number % 2, number])) for number in range(20)]
        protocol, transport = connect(self.factory)
        protocol.dataReceived(b"".join(frames))
        await until(reactor, lambda: len(transport.value()) >= len(b"".join(frames)))
        self.assertEqual(transport.value(), b"".join(frames))

    async def test_raises(self) -> None:
        """One that raises gives FAIL 2 and the connection stays; the line says where it was."""

        def processor(message: object, client: Exchange) -> None:
            raise Boom

        self.factory.register_processor(ECHO, processor, blocking=True)
        protocol, transport = connect(self.factory)
        with capturedLogs() as events:
            protocol.dataReceived(frame(bytes([ECHO])) + batch_frame())
            await until(reactor, lambda: transport.value().endswith(SUCCESS))
        self.flushLoggedErrors(Boom)
        self.assertEqual(transport.value(), FAIL + b"\x02" + SUCCESS)
        (line,) = texts(events, LogLevel.error)
        self.assertRegex(line, r"error: Boom at test_processors\.py:\d+$")

    async def test_answers_and_raises(self) -> None:
        """An answer that its thread gave before an error is the only one."""

        def processor(message: object, client: Exchange) -> None:
            responses.send_success(client)
            raise Boom

        self.factory.register_processor(ECHO, processor, blocking=True)
        protocol, transport = connect(self.factory)
        protocol.dataReceived(frame(bytes([ECHO])) + frame(b"\x03"))
        await until(reactor, lambda: transport.half_closed)
        self.flushLoggedErrors(Boom)
        self.assertEqual(transport.value(), SUCCESS)
        lose(protocol)

    async def test_returns_false(self) -> None:
        """What it returns counts: ``False`` closes once its answer is sent."""

        def processor(message: RawMessage, client: Exchange) -> bool:
            echo(message, client)
            return False

        self.factory.register_processor(ECHO, processor, blocking=True)
        protocol, transport = connect(self.factory)
        protocol.dataReceived(frame(bytes([ECHO])) + batch_frame())
        await until(reactor, lambda: transport.half_closed)
        self.assertEqual(transport.value(), frame(bytes([ECHO])))
        lose(protocol)

    async def test_hung_thread_is_not_waited_for(self) -> None:
        """Letting go of the threads returns at once while one of them hangs."""
        self.factory.register_processor(ECHO, self.waits, blocking=True)
        protocol, transport = connect(self.factory)
        protocol.dataReceived(frame(bytes([ECHO])))
        await until(reactor, lambda: self.threads)
        self.factory.stop_threads()
        self.assertTrue(self.threads[0].is_alive())
        self.go.set()
        await until(reactor, transport.value)
