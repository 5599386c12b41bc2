"""``--log-format json``: one object a line, the fields of the event as keys."""

from __future__ import annotations

import json
import signal
from datetime import datetime
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.logger import Logger, LogLevel, LogPublisher
from twisted.python import log
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase

from cafeteria_orch.observe import logs
from cafeteria_orch.observe.logs import BufferedLogObserver, as_json
from tests.support.builders import SUCCESS
from tests.support.logs import MemoryLog
from tests.support.processes import HELLO, ProcessTestCase

TIME = r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}[+-]\d\d:\d\d$"
LINE = "action: receive_message | result: success | ip: {ip} | opcode: {opcode}"


class JsonTests(SynchronousTestCase):
    """What stands in a line."""

    def setUp(self) -> None:
        self.file = MemoryLog()
        self.observer = BufferedLogObserver(self.file, LogLevel.info, as_json)
        self.log = Logger("shop", observer=LogPublisher(self.observer))

    def lines(self) -> list[dict[str, Any]]:
        """The lines that were written, each of them an object."""
        return [json.loads(line) for line in self.file.text.splitlines()]

    def test_fields_are_keys(self) -> None:
        """The seed's line is the message, and its fields stand beside it as what they are."""
        self.log.info(LINE, ip="10.0.0.1", opcode=8)
        (line,) = self.lines()
        self.assertRegex(line.pop("time"), TIME)
        self.assertEqual(
            line,
            {
                "level": "info",
                "namespace": "shop",
                "message": "action: receive_message | result: success | ip: 10.0.0.1 | opcode: 8",
                "action": "receive_message",
                "result": "success",
                "ip": "10.0.0.1",
                "opcode": 8,
                "table": "users",
            },
        )

    def test_action_and_result_are_those_of_the_message(self) -> None:
        """Only as far as the format says them: no field forges one, and fields win."""
        for text, fields, expected in (
            ("action: drain | result: success", {}, ("drain", "success")),
            ("action: stop", {}, ("stop", None)),
            ("{x} | result: fail", {"x": "action: forged"}, (None, "fail")),
            ("reaction: x | my result: y", {}, (None, None)),
            ("action: {what} | result: ok", {"what": "sell"}, (None, "ok")),
            ("action: a | result: b", {"result": "c"}, ("a", "c")),
            ("Starting factory", {}, (None, None)),
        ):
            self.file.calls.clear()
            self.log.info(text, **fields)
            (line,) = self.lines()
            self.assertEqual((line.get("action"), line.get("result")), expected, text)

    def test_formats_are_read_once(self) -> None:
        """A format that changes with each event does not fill the memory."""
        logs._literals.cache_clear()
        for number in range(10):
            self.log.info(LINE, ip="10.0.0.1", opcode=number)
        self.assertEqual(logs._literals.cache_info()[:2], (9, 1))
        for number in range(2 * logs.MAX_FORMATS):
            text = f"action: x{number}"
            self.log.info(text)
        self.assertEqual(logs._literals.cache_info().currsize, logs.MAX_FORMATS)

    def test_times_have_milliseconds(self) -> None:
        """The time is that of RFC 3339, cut to whole milliseconds; the next second is not shown."""
        for fraction in (0.0, 0.75, 0.9999998, 1.002):
            self.observer({"log_time": 1_700_000_000 + fraction, "log_format": "x"})
        moments = [datetime.fromisoformat(line["time"]) for line in self.lines()]
        self.assertEqual(
            [f"{moment:%M:%S.%f}"[:9] for moment in moments],
            ["13:20.000", "13:20.750", "13:20.999", "13:21.002"],
        )
        self.assertTrue(all(moment.tzinfo for moment in moments))

    def test_a_traceback_stands_in_its_line(self) -> None:
        """A traceback stands in the line of its event."""
        self.log.failure("it broke", Failure(KeyError("eggs")))
        (line,) = self.lines()
        self.assertEqual((line["level"], line["message"]), ("critical", "it broke"))
        self.assertIn("KeyError", line["traceback"])

    def test_older_logging_has_a_line(self) -> None:
        """What Twisted's older functions log has a line too."""
        publisher = log.LogPublisher(publishPublisher=LogPublisher(self.observer))
        publisher.msg("Starting factory")
        (line,) = self.lines()
        self.assertEqual((line["message"], line["level"]), ("Starting factory", "info"))

    def test_fields_that_are_no_json(self) -> None:
        """What no JSON can be made of stands there as text, and costs no line."""

        class Broken:
            def __str__(self) -> str:
                raise RuntimeError

            __repr__ = __str__

        circle: list[Any] = []
        circle.append(circle)
        for field in (Broken(), {b"key": 1}, circle, float("nan")):
            self.log.info("it is", field=field, opcode=field)
        lines = self.lines()
        self.assertEqual([line["message"] for line in lines], ["it is"] * 4)
        self.assertEqual({type(line["field"]) for line in lines}, {str})
        self.assertFalse([line for line in lines if "table" in line])

    def test_an_event_without_a_message_has_no_line(self) -> None:
        """An event without a message has no line."""
        self.observer({"log_time": 1.0, "log_level": LogLevel.info})
        self.assertEqual(self.file.text, "")

    # Each line has a thread of its own here, which may come late on a busy machine.
    @settings(deadline=None)
    @given(
        st.dictionaries(
            st.text("abcdefgh", min_size=1).map("field_{}".format),
            st.one_of(st.text(), st.integers(), st.binary(), st.builds(object), st.none()),
        )
    )
    def test_a_line_has_all_fields(self, fields: dict[str, Any]) -> None:
        """Whatever the fields are, a line is one object, and has them all."""
        self.file.calls.clear()
        self.log.info("it is", **fields)
        text = self.file.text
        self.assertEqual((text.count("\n"), text[-1]), (1, "\n"))
        self.assertLessEqual(fields.keys(), json.loads(text).keys())

    def test_lost_lines_are_an_object_too(self) -> None:
        """That lines were lost is said in JSON too."""
        line = json.loads(self.observer._describe_loss(3))
        self.assertEqual((line["lost"], line["level"]), (3, "error"))


class ServerTests(ProcessTestCase):
    """A real server that logs so."""

    def test_every_line_of_a_server_is_an_object(self) -> None:
        """Every line of its log is an object, from the first to the last."""
        server = self.launch("--port", "0", "--store", "none", "--log-format", "json")
        server.wait_until_logged('"address": "127.0.0.1:')
        lines = [json.loads(line) for line in server.log.splitlines()]
        (address,) = [line["address"] for line in lines if "address" in line]
        server.port = int(address.rpartition(":")[2])
        client = self.client(server)
        client.send(HELLO)
        self.assertEqual(client.read(5), SUCCESS)
        client.close()
        server.signal(signal.SIGTERM)
        server.wait_until_gone()
        lines = [json.loads(line) for line in server.log.splitlines()]
        self.assertEqual({line["connection"] for line in lines if "ip" in line}, {1})
        (received,) = [line for line in lines if line.get("action") == "receive_message"]
        self.assertEqual((received["ip"], received["opcode"]), ("127.0.0.1", 30))
        self.assertEqual(lines[-1]["message"], "Server Shut Down.")
