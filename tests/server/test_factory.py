"""The factory: what an opcode may have registered, who decides, and what is logged."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from constantly import NamedConstant
from twisted.internet.task import Clock
from twisted.logger import LogEvent, LogLevel, capturedLogs, formatEvent
from twisted.trial.unittest import SynchronousTestCase

from cafeteria_orch.server import responses
from cafeteria_orch.server.factory import OrchestratorFactory
from cafeteria_orch.server.responses import Exchange
from cafeteria_orch.wire.messages import Finished, RawMessage, TableBatch, encode, end_of_table
from cafeteria_orch.wire.opcodes import Opcode
from tests.support.builders import (
    ECHO,
    FAIL,
    SUCCESS,
    USER_ROW,
    TCPTransport,
    batch,
    batch_frame,
    connect,
    frame,
    lose,
    numbered,
    texts,
)

FINISHED = frame(encode(Finished(12)))


def accept(message: object, client: Exchange) -> None:
    """A processor that accepts whatever comes."""
    responses.send_success(client)


async def accept_later(message: object, client: Exchange) -> None:
    """The same as a coroutine."""
    responses.send_success(client)


class Collect:
    """A processor that keeps what it is given and returns what it is told to."""

    def __init__(self, result: object = True) -> None:
        self.result = result
        self.messages: list[Any] = []
        self.opcodes: list[int] = []

    def __call__(self, message: Any, client: Exchange) -> object:
        self.messages.append(message)
        self.opcodes.append(client.opcode)
        responses.send_success(client)
        return self.result


class Registering(SynchronousTestCase):
    """``register_processor`` refuses what cannot work, and says why."""

    def setUp(self) -> None:
        self.factory = OrchestratorFactory(Clock())

    def refusal(self, kind: type[Exception], *args: Any, **kwargs: Any) -> str:
        """The text of the error that this registration gives."""
        error = self.assertRaises(kind, self.factory.register_processor, *args, **kwargs)
        return str(error)

    def test_opcode_is_one_byte(self) -> None:
        """An opcode outside 0 to 255 is refused by its number; the ends are accepted."""
        for opcode in (-1, 256):
            self.assertIn(f"opcode {opcode}", self.refusal(ValueError, opcode, accept))
        for opcode in (0, 255):
            self.factory.register_processor(opcode, accept)

    def test_opcode_is_a_number(self) -> None:
        """An opcode that is no number, a bool among them, is refused by its type."""
        for opcode, name in ((True, "bool"), ("40", "str"), (4.0, "float"), (None, "NoneType")):
            self.assertIn(name, self.refusal(TypeError, opcode, accept))

    def test_processor_is_callable(self) -> None:
        """A processor that cannot be called is refused, with its opcode."""
        for processor in (None, "module:function"):
            text = self.refusal(TypeError, ECHO, processor)
            self.assertIn(f"opcode {ECHO}: the processor {processor!r}", text)

    def test_decoder_is_callable(self) -> None:
        """A decoder that cannot be called is refused, with its opcode."""
        text = self.refusal(TypeError, ECHO, accept, decoder="json")
        self.assertIn(f"opcode {ECHO}: the decoder 'json'", text)

    def test_a_coroutine_function_cannot_be_blocking(self) -> None:
        """A coroutine function cannot be blocking as well."""
        text = self.refusal(TypeError, ECHO, accept_later, blocking=True)
        self.assertIn(f"opcode {ECHO}", text)
        self.assertIn("async", text)

    def test_a_second_processor_of_an_opcode_is_refused(self) -> None:
        """The error names the first, and the way out."""
        self.factory.register_processor(ECHO, accept)
        text = self.refusal(ValueError, ECHO, Collect())
        for word in (f"opcode {ECHO}", f"{__name__}.accept", "replace=True"):
            self.assertIn(word, text)

    def test_refused_registration_changes_nothing(self) -> None:
        """What was refused left neither a processor nor a decoder behind."""
        first = Collect()
        self.factory.register_processor(ECHO, first)
        self.refusal(ValueError, ECHO, accept, decoder=json.loads)
        self.refusal(TypeError, 41, accept, decoder=3)
        protocol, transport = connect(self.factory)
        protocol.dataReceived(frame(bytes([ECHO]) + b"{}") + frame(b"\x29"))
        self.assertEqual(first.messages, [RawMessage(ECHO, b"{}")])
        self.assertEqual(transport.value(), SUCCESS + FAIL + b"\x03")

    def test_replace_takes_the_place_of_a_processor(self) -> None:
        """Of its decoder and its terms, too."""
        first, second = Collect(), Collect()
        self.factory.register_processor(ECHO, first, decoder=json.loads, answers=False)
        self.factory.register_processor(ECHO, second, replace=True)
        protocol, _ = connect(self.factory)
        protocol.dataReceived(frame(bytes([ECHO]) + b"{}"))
        self.assertEqual((first.messages, second.messages), ([], [RawMessage(ECHO, b"{}")]))
        self.assertTrue(self.factory.must_answer(ECHO))

    def test_replace_is_no_error_without_a_processor(self) -> None:
        """``replace=True`` is no error where there is nothing to replace."""
        self.factory.register_processor(ECHO, accept, replace=True)
        self.assertEqual(self.factory.processor_name(ECHO), f"{__name__}.accept")

    def test_factories_share_nothing(self) -> None:
        """What is registered with one factory is unknown to another."""
        self.factory.register_processor(ECHO, accept)
        protocol, transport = connect()
        protocol.dataReceived(frame(bytes([ECHO])))
        self.assertEqual(transport.value(), FAIL + b"\x03")

    def test_each_kind_of_callable_has_a_name_for_the_log(self) -> None:
        """A processor has a name for the log, whatever kind of callable it is."""
        processors: tuple[Any, ...] = (
            accept,
            Collect(),
            lambda *_: True,
            self.test_each_kind_of_callable_has_a_name_for_the_log,
        )
        for processor in processors:
            self.factory.register_processor(ECHO, processor, replace=True)
            name = self.factory.processor_name(ECHO)
            self.assertIn(__name__, name)
        self.assertEqual(self.factory.processor_name(Opcode.EOF), "the default handling")


class Dispatching(SynchronousTestCase):
    """What decides about a message, in the order of the seed."""

    def exchange(
        self, data: bytes, *registrations: tuple[int, Callable[..., Any]]
    ) -> TCPTransport:
        """What a new connection does with these bytes; ``self.events`` are its events."""
        factory = OrchestratorFactory(Clock())
        for opcode, processor in registrations:
            factory.register_processor(opcode, processor)
        with capturedLogs() as self.events:
            protocol, transport = connect(factory)
            protocol.dataReceived(data)
        return transport

    def test_registered_processor_decides(self) -> None:
        """A processor comes before any default, whatever kind of opcode it is for."""
        for opcode, body, kind in (
            (Opcode.NEW_USERS, encode(batch())[1:], TableBatch),
            (Opcode.FINISHED, b"", Finished),
            (Opcode.DATA_BATCH, b"x", RawMessage),
            (ECHO, b"x", RawMessage),
        ):
            processor = Collect()
            transport = self.exchange(frame(bytes([opcode]) + body), (opcode, processor))
            self.assertEqual([type(message) for message in processor.messages], [kind])
            self.assertEqual(processor.opcodes, [opcode])
            self.assertEqual(transport.value(), SUCCESS)
            self.assertFalse(transport.half_closed)

    def test_processor_of_a_response(self) -> None:
        """A response opcode that has a processor gives no warning."""
        processor = Collect()
        self.exchange(frame(b"\x02\x01"), (Opcode.BATCH_RECV_FAIL, processor))
        self.assertEqual(processor.opcodes, [2])
        self.assertEqual(texts(self.events, LogLevel.warn), [])

    def test_true_and_none_keep_a_connection_and_false_closes_it(self) -> None:
        """After the answer."""
        for result, closed in ((True, False), (None, False), (False, True)):
            transport = self.exchange(frame(bytes([ECHO])), (ECHO, Collect(result)))
            self.assertEqual(transport.value(), SUCCESS)
            self.assertEqual(transport.half_closed, closed)

    def test_a_processor_of_finished_may_keep_the_connection(self) -> None:
        """It returns ``True``."""
        transport = self.exchange(FINISHED + batch_frame(), (Opcode.FINISHED, Collect()))
        self.assertEqual(transport.value(), SUCCESS + SUCCESS)
        self.assertFalse(transport.half_closed)

    def test_a_data_message_is_acknowledged_by_default(self) -> None:
        """Of every kind."""
        data = b"".join(
            frame(encode(message))
            for message in (batch(), batch(rows=(), status=77), end_of_table("users"))
        )
        transport = self.exchange(data)
        self.assertEqual(transport.value(), SUCCESS * 3)
        self.assertFalse(transport.half_closed)

    def test_finished_closes_and_is_not_acknowledged(self) -> None:
        """FINISHED closes the connection and is not acknowledged."""
        transport = self.exchange(FINISHED)
        self.assertEqual(transport.value(), b"")
        self.assertTrue(transport.half_closed)

    def test_a_response_from_a_client_is_ignored(self) -> None:
        """A warning, no answer, and the connection stays."""
        for response in (b"\x01", b"\x02", b"\x02\x03"):
            transport = self.exchange(frame(response) + batch_frame())
            self.assertEqual(transport.value(), SUCCESS)
            self.assertFalse(transport.half_closed)
            (warning,) = texts(self.events, LogLevel.warn)
            self.assertIn(f"opcode: {response[0]}", warning)

    def test_a_processor_gets_what_its_decoder_makes(self) -> None:
        """A processor gets what the opcode's decoder makes of the body."""
        factory = OrchestratorFactory(Clock())
        processor = Collect()
        factory.register_processor(ECHO, processor, decoder=json.loads)
        protocol, transport = connect(factory)
        protocol.dataReceived(frame(bytes([ECHO]) + b'{"a": [1]}'))
        self.assertEqual(processor.messages, [{"a": [1]}])
        self.assertEqual(transport.value(), SUCCESS)

    def test_decoder_of_a_wire_opcode(self) -> None:
        """A decoder may take the place of the wire's own; the opcode stands on the client."""
        factory = OrchestratorFactory(Clock())
        processor = Collect()
        factory.register_processor(Opcode.NEW_USERS, processor, decoder=len)
        protocol, _ = connect(factory)
        protocol.dataReceived(batch_frame())
        self.assertEqual(processor.messages, [len(encode(batch())) - 1])
        self.assertEqual(processor.opcodes, [8])

    def test_status_text(self) -> None:
        """The three statuses have the seed's names, any other its number."""
        factory = OrchestratorFactory(Clock())
        self.assertEqual(
            [factory.get_status_text(status) for status in (0, 1, 2, 3, 255)],
            ["Continue", "EOF", "Cancel", "Unknown(3)", "Unknown(255)"],
        )

    def test_is_data_message(self) -> None:
        """Data is all but FINISHED and the two responses."""
        factory = OrchestratorFactory(Clock())
        others = [opcode for opcode in range(256) if not factory.is_data_message(opcode)]
        self.assertEqual(others, [1, 2, 3])

    def test_development_example(self) -> None:
        """The design's example of an extension works as it stands there."""
        seen: list[tuple[str, int]] = []

        def process_promotions(promotions: Any, client: Exchange) -> bool:
            seen.append((client.ip, len(promotions)))
            responses.send_success(client)
            return True

        factory = OrchestratorFactory(Clock())
        factory.register_processor(ECHO, process_promotions, decoder=json.loads)
        protocol, transport = connect(factory)
        protocol.dataReceived(frame(bytes([ECHO]) + b"[1, 2]"))
        self.assertEqual(seen, [(protocol.session.ip, 2)])
        self.assertEqual(transport.value(), SUCCESS)


class Logging(SynchronousTestCase):
    """The seed's lines, and nothing that the level leaves out."""

    def events(self, level: NamedConstant, data: bytes) -> Sequence[LogEvent]:
        """All events of a connection that sends these bytes and closes."""
        factory = OrchestratorFactory(Clock(), log_level=level)
        with capturedLogs() as events:
            protocol, _ = connect(factory)
            protocol.dataReceived(data)
            lose(protocol)
        return events

    def test_lines_of_a_batch(self) -> None:
        """A batch gives these lines, in this order, in the seed's form."""
        events = self.events(LogLevel.debug, batch_frame(batch_number=5, status=1))
        preview = (
            "action: batch_preview | batch_number: 5 | status: EOF | opcode: 8"
            " | keys: ['user_id', 'gender', 'birthdate', 'registered_at']"
            f" | sample_count: 1 | sample: {[list(USER_ROW)]}"
        )
        self.assertEqual(
            [(event["log_level"], formatEvent(event)) for event in events[:4]],
            [
                (LogLevel.info, "action: accept_connections | result: success | ip: 192.0.2.7"),
                (
                    LogLevel.info,
                    "action: receive_message | result: success | ip: 192.0.2.7 | opcode: 8",
                ),
                (
                    LogLevel.info,
                    "action: data_message_received | opcode: 8 | amount: 1 | status: EOF",
                ),
                (LogLevel.debug, preview),
            ],
        )

    def test_close_is_debug_only(self) -> None:
        """That a client has closed between frames is one line, at debug."""
        events = self.events(LogLevel.debug, b"")
        self.assertEqual(
            [(event["log_level"], formatEvent(event)) for event in events[1:]],
            [(LogLevel.debug, "action: close_connection | result: success | ip: 192.0.2.7")],
        )

    def test_unknown_status(self) -> None:
        """A status that has no name is shown as ``Unknown(n)``."""
        line = texts(self.events(LogLevel.info, batch_frame(status=9)), LogLevel.info)[-1]
        self.assertEqual(
            line, "action: data_message_received | opcode: 8 | amount: 1 | status: Unknown(9)"
        )

    def test_finished_is_logged_with_the_number_of_the_agency(self) -> None:
        """FINISHED is logged, with the agency's number."""
        line = texts(self.events(LogLevel.info, FINISHED), LogLevel.info)[-1]
        self.assertRegex(line, r"ip: 192\.0\.2\.7 .*12$")

    def test_preview_of_two_rows(self) -> None:
        """The preview shows the first two rows of many, and counts what it shows."""
        rows = [(str(number), "g", "b", "r") for number in range(50)]
        (line,) = [
            text
            for text in texts(self.events(LogLevel.debug, batch_frame(rows=rows)), LogLevel.debug)
            if "batch_preview" in text
        ]
        self.assertIn(f"sample_count: 2 | sample: {[list(row) for row in rows[:2]]}", line)
        self.assertNotIn("['2'", line)

    def test_preview_of_no_rows(self) -> None:
        """An empty batch has a preview too, of nothing."""
        events = self.events(LogLevel.debug, batch_frame(rows=()))
        self.assertIn("sample_count: 0 | sample: []", texts(events, LogLevel.debug)[0])

    def test_no_rows_at_info(self) -> None:
        """At info no event holds a row, not even in a field that its text does not show."""
        events = self.events(LogLevel.info, batch_frame() + FINISHED)
        self.assertEqual(texts(events, LogLevel.debug), [])
        for cell in USER_ROW[1:]:
            self.assertNotIn(cell, repr(events))

    def test_only_the_preview_has_rows(self) -> None:
        """At debug the preview alone holds rows."""
        events = self.events(LogLevel.debug, batch_frame() + FINISHED)
        others = [event for event in events if "batch_preview" not in event["log_format"]]
        self.assertEqual(len(others), len(events) - 1)
        self.assertNotIn(USER_ROW[2], repr(others))

    def test_nothing_below_the_level_is_emitted(self) -> None:
        """At warn neither info nor debug events; warnings are."""
        events = self.events(LogLevel.warn, batch_frame() + frame(b"\x01") + FINISHED)
        self.assertEqual([event["log_level"] for event in events], [LogLevel.warn])


class PausedByASink(SynchronousTestCase):
    """A sink that is full for a moment delays no message for ever."""

    def test_a_sink_that_pauses_and_resumes_within_a_call_stops_nothing(self) -> None:
        """Paused and resumed while a message is being processed, the next ones still come."""
        factory = OrchestratorFactory(Clock())

        def processor(message: object, client: Exchange) -> None:
            factory.pauseProducing()
            factory.resumeProducing()
            responses.send_success(client)

        factory.register_processor(ECHO, processor)
        protocol, transport = connect(factory)
        protocol.dataReceived(numbered(1, 2, 3))
        self.assertEqual(transport.value(), SUCCESS * 3)
        self.assertEqual(transport.producerState, "producing")
