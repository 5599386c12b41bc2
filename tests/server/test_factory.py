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
from cafeteria_orch.wire.messages import (
    BatchRecvFail,
    Finished,
    RawMessage,
    TableBatch,
    encode,
    end_of_table,
)
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

    def test_what_cannot_work_is_refused(self) -> None:
        """The error names the opcode, or the type of what is none, and what is wrong."""
        refused: tuple[tuple[type[Exception], tuple[Any, ...], dict[str, Any], str], ...] = (
            (ValueError, (-1, accept), {}, "opcode -1"),
            (ValueError, (256, accept), {}, "opcode 256"),
            *(
                (TypeError, (opcode, accept), {}, type(opcode).__name__)
                for opcode in (True, "40", 4.0, None)
            ),
            (TypeError, (ECHO, None), {}, "opcode 40: the processor None"),
            (TypeError, (ECHO, "module:function"), {}, "the processor 'module:function'"),
            (TypeError, (ECHO, accept), {"decoder": "json"}, "opcode 40: the decoder 'json'"),
            (TypeError, (ECHO, accept_later), {"blocking": True}, "opcode 40: .*async"),
        )
        for kind, arguments, terms, pattern in refused:
            self.assertRegex(self.refusal(kind, *arguments, **terms), pattern)
        for opcode in (0, 255):
            self.factory.register_processor(opcode, accept)

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
            # Without one it is a warning.
            (Opcode.BATCH_RECV_FAIL, b"\x01", BatchRecvFail),
        ):
            processor = Collect()
            transport = self.exchange(frame(bytes([opcode]) + body), (opcode, processor))
            self.assertEqual([type(message) for message in processor.messages], [kind])
            self.assertEqual(processor.opcodes, [opcode])
            self.assertEqual(transport.value(), SUCCESS)
            self.assertFalse(transport.half_closed)
            self.assertEqual(texts(self.events, LogLevel.warn), [])

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
        """A decoder may take the place of the wire's own; the opcode stands on the client."""
        data = encode(batch())
        for payload, decoder, message in (
            (bytes([ECHO]) + b'{"a": [1]}', json.loads, {"a": [1]}),
            (data, len, len(data) - 1),
        ):
            factory = OrchestratorFactory(Clock())
            processor = Collect()
            factory.register_processor(payload[0], processor, decoder=decoder)
            protocol, transport = connect(factory)
            protocol.dataReceived(frame(payload))
            self.assertEqual((processor.messages, processor.opcodes), ([message], [payload[0]]))
            self.assertEqual(transport.value(), SUCCESS)

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
        for sent in (rows, []):
            events = self.events(LogLevel.debug, batch_frame(rows=sent))
            (line,) = [text for text in texts(events, LogLevel.debug) if "batch_preview" in text]
            shown = [list(row) for row in sent[:2]]
            self.assertTrue(line.endswith(f"sample_count: {len(shown)} | sample: {shown}"), line)

    def test_only_the_preview_has_rows(self) -> None:
        """No other event holds one, not even in a field that its text does not show."""
        for level, previews in ((LogLevel.debug, 1), (LogLevel.info, 0)):
            events = self.events(level, batch_frame() + FINISHED)
            others = [event for event in events if "batch_preview" not in event["log_format"]]
            self.assertEqual(len(others), len(events) - previews)
            for cell in USER_ROW[1:]:
                self.assertNotIn(cell, repr(others))

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
