"""The lines that a connection causes have its number and its session, and floods are counted."""

from __future__ import annotations

from typing import Any

from twisted.internet.error import ConnectionLost
from twisted.internet.task import Clock
from twisted.logger import LogEvent, LogLevel, capturedLogs
from twisted.trial.unittest import SynchronousTestCase

from cafeteria_orch.common.rate_limit import LOST_BATCHES, REPORT_INTERVAL, TRAFFIC
from cafeteria_orch.server.factory import OrchestratorFactory
from cafeteria_orch.server.timeouts import Timeouts
from cafeteria_orch.wire.errors import BatchRejected
from cafeteria_orch.wire.opcodes import Opcode
from tests.support.builders import ECHO, batch_frame, connect, frame, lose, numbered, texts
from tests.support.processes import HELLO

FINISHED = frame(bytes([Opcode.FINISHED]))
RESPONSE = frame(bytes([Opcode.BATCH_RECV_SUCCESS]))
TIMEOUTS = Timeouts(5, 5, 5)


class LineTestCase(SynchronousTestCase):
    """A factory that logs all there is."""

    def setUp(self) -> None:
        self.clock = Clock()
        self.factory = OrchestratorFactory(self.clock, log_level=LogLevel.debug, timeouts=TIMEOUTS)

    def converse(self, *sent: bytes, seconds: float = 0, reset: bool = False) -> list[LogEvent]:
        """The events of one connection, from its beginning to its end."""
        with capturedLogs() as events:
            protocol, _ = connect(self.factory)
            for data in sent:
                protocol.dataReceived(data)
            self.clock.advance(seconds)
            lose(protocol, ConnectionLost() if reset else None)
        return list(events)


class Fields(LineTestCase):
    """What a line says beside its text."""

    def test_every_line_has_the_number_of_its_connection(self) -> None:
        """From accepting to closing, whatever happens in between."""

        def fail(*_: object) -> None:
            raise KeyError("a bug")

        self.factory.register_processor(ECHO, fail)
        self.factory.register_processor(ECHO + 1, lambda *_: None)
        self.factory.register_processor(ECHO + 2, print, decoder=fail)
        conversations: list[dict[str, Any]] = [
            {"sent": [HELLO, batch_frame(), RESPONSE, numbered(1), FINISHED]},
            {"sent": [frame(bytes([ECHO + 1]))]},
            {"sent": [frame(bytes([ECHO + 2]))]},
            {"sent": [frame(b"\x63")]},
            {"sent": [batch_frame()[:-1]], "reset": True},
            {"sent": [batch_frame()[:-1]], "seconds": TIMEOUTS.frame},
            {"sent": [], "seconds": TIMEOUTS.idle},
        ]
        seen = set()
        for number, conversation in enumerate(conversations, 1):
            events = self.converse(*conversation.pop("sent"), **conversation)
            self.assertGreaterEqual(len(events), 3)
            for event in events:
                self.assertEqual(event["connection"], number, event["log_format"])
                self.assertIsNone(event["session"], event["log_format"])
                seen.add((event["log_level"].name, event["log_format"].partition(" | ")[0]))
        for expected in (
            ("info", "action: accept_connections"),
            ("info", "action: receive_message"),
            ("info", "action: data_message_received"),
            ("info", "action: finished"),
            ("info", "action: close_connection"),
            ("debug", "action: batch_preview"),
            ("debug", "action: close_connection"),
            ("debug", "action: message_processing"),
            ("error", "action: message_processing"),
            ("error", "action: receive_message"),
            ("warn", "action: receive_message"),
            ("warn", "action: send_response"),
            ("critical", "action: receive_message"),
        ):
            self.assertIn(expected, seen)
        self.flushLoggedErrors(KeyError)

    def test_lines_have_the_session_once_it_is_stored(self) -> None:
        """The store tells its id after the commit; later lines have it."""
        protocol, _ = connect(self.factory)
        with capturedLogs() as events:
            protocol.dataReceived(batch_frame())
            protocol.session.stored_id = 17
            protocol.dataReceived(batch_frame() + FINISHED)
        sessions = [event["session"] for event in events if event["log_level"] is LogLevel.info]
        self.assertEqual(sessions, [None, None, 17, 17, 17, 17])


class Floods(LineTestCase):
    """What one client causes again and again."""

    def test_bugs_are_counted(self) -> None:
        """A decoder that fails for each message gives one traceback a minute."""

        def fail(_: bytes) -> None:
            raise KeyError("a bug")

        self.factory.register_processor(ECHO, print, decoder=fail)
        with capturedLogs() as events:
            for _ in range(50):
                self.converse(frame(bytes([ECHO])))
            self.clock.advance(REPORT_INTERVAL)
        first, second = [each for each in events if each["log_level"] is LogLevel.critical]
        self.assertEqual((first["refused"], second["refused"]), (1, 49))
        self.assertIn("log_failure", first)
        self.flushLoggedErrors(KeyError)

    def test_each_batch_that_is_lost_has_its_line(self) -> None:
        """A client in the field does not send it again: its number is in the log, up to a limit."""

        def reject(*_: object) -> None:
            raise BatchRejected("no")

        self.factory.register_processor(Opcode.NEW_USERS, reject)
        with capturedLogs() as events:
            protocol, _ = connect(self.factory)
            for number in range(LOST_BATCHES.lines + 20):
                protocol.dataReceived(batch_frame(batch_number=number))
            self.clock.advance(0)
            self.factory.rate_limits.stop()
        lines = texts(events, LogLevel.error)
        self.assertEqual(len(lines), LOST_BATCHES.lines + 1)
        for number, line in enumerate(lines[:-1]):
            self.assertIn(f"batch_number: {number} |", line)
        self.assertTrue(lines[-1].endswith("| repeated: 20"), lines[-1])
        self.flushLoggedErrors(BatchRejected)

    def test_ordinary_lines_are_counted_too(self) -> None:
        """Connections, FINISHED and responses have their lines, up to a limit; data always has."""
        many = TRAFFIC.lines + 30
        with capturedLogs() as events:
            for _ in range(many):
                protocol, _ = connect(self.factory)
                protocol.dataReceived(batch_frame() + RESPONSE + FINISHED)
                lose(protocol)
        lines = texts(events, LogLevel.info)
        for text, expected in (
            ("action: accept_connections", TRAFFIC.lines),
            ("action: finished", TRAFFIC.lines),
            ("action: receive_message | result: success | ip: 192.0.2.7 | opcode: 8", many),
            ("action: data_message_received", many),
        ):
            self.assertEqual(sum(line.startswith(text) for line in lines), expected, text)
        control = [line for line in lines if line.endswith(("opcode: 1", "opcode: 3"))]
        self.assertEqual(len(control), TRAFFIC.lines)
