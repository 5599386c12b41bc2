"""The log observer: the same lines as Twisted's, filtered by level."""

from __future__ import annotations

import re
from io import StringIO
from typing import Any

from twisted.logger import (
    FileLogObserver,
    ILogObserver,
    LogEvent,
    Logger,
    LogLevel,
    LogPublisher,
    formatEventAsClassicLogText,
    globalLogPublisher,
)
from twisted.python import log
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase
from zope.interface.verify import verifyObject

from cafeteria_orch.observe import log_writer
from cafeteria_orch.observe.logs import BufferedLogObserver
from tests.support.logs import MemoryLog
from tests.support.processes import wait_until

NOW = 1_700_000_000.75
LINE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4} \[shop#(\w+)\] (.*)")


class Money:
    """A field with something to read, to call, and to show."""

    amount = 7

    def text(self) -> str:
        """What ``{money.text()}`` shows."""
        return "seven"

    def __str__(self) -> str:
        return "7 of them"

    def __repr__(self) -> str:
        return "Money(7)"


def boom() -> Failure:
    """A failure with a traceback."""
    try:
        int("no\nsuch thing")
    except ValueError:
        return Failure()
    raise AssertionError


def event(level: Any = LogLevel.info, text: str = "hello", **fields: Any) -> LogEvent:
    """An event as a ``Logger`` makes it."""
    return {
        "log_level": level,
        "log_format": text,
        "log_namespace": "shop",
        "log_time": NOW,
        "log_source": None,
        **fields,
    }


class LogCase(SynchronousTestCase):
    """A test with an observer of its own."""

    def setUp(self) -> None:
        self.file = MemoryLog()
        self.observer = BufferedLogObserver(self.file)
        self.source = Logger(namespace="shop", observer=LogPublisher(self.observer))


class Form(LogCase):
    """What a line looks like."""

    def assert_as_twisted(self, logged: LogEvent) -> None:
        """An event is written as Twisted's own observer writes it."""
        expected = StringIO()
        FileLogObserver(expected, formatEventAsClassicLogText)(logged)
        self.file.calls.clear()
        self.observer(logged)
        self.assertEqual(self.file.text, expected.getvalue())

    def test_it_is_an_observer(self) -> None:
        """It is an observer as Twisted knows it."""
        verifyObject(ILogObserver, self.observer)

    def test_a_line_has_time_namespace_level_and_text(self) -> None:
        """Time, namespace, level, text; a line break at the end."""
        self.source.info("action: {what} | n: {n}", what="stop", n=3)
        text = self.file.text
        match = LINE.fullmatch(text.rstrip("\n"))
        assert match is not None
        self.assertEqual(match.groups(), ("info", "action: stop | n: 3"))
        self.assertEqual(text.count("\n"), 1)

    def test_a_line_names_its_level(self) -> None:
        """A line names its level."""
        observer = BufferedLogObserver(self.file, LogLevel.debug)
        for level in LogLevel.iterconstants():
            observer(event(level))
        names = re.findall(r"\[shop#(\w+)\]", self.file.text)
        self.assertEqual(names, ["debug", "info", "warn", "error", "critical"])

    def test_lines_are_those_of_twisted(self) -> None:
        """Lines are Twisted's own, letter by letter, for everything that Twisted can format."""
        for text, fields in (
            ("hello", {}),
            ("{n} of {n:>5}, {n!r}, {n!s}", {"n": "3"}),
            ("{money}, {money!r}, {money.amount}", {"money": Money()}),
            ("{money.text()} and {call()}", {"money": Money(), "call": lambda: "called"}),
            ("{rows[0]} {{braces}}", {"rows": [5]}),
            ("{missing}", {}),
            ("{broken", {}),
            ("ñ 🍵 {x}", {"x": "抹茶"}),
            ("two\nlines {x}", {"x": "and\na third"}),
            ("percent %s %d", {}),
            ("a failure", {"log_failure": boom()}),
            ("{x}", {"x": 1, "log_system": "Agency,3,192.0.2.7"}),
        ):
            self.assert_as_twisted(event(text=text, **fields))

    def test_incomplete_events_are_lines_too(self) -> None:
        """What has no format, no level or no namespace is written as Twisted writes it."""
        self.assert_as_twisted(event(text="bytes"))
        for missing in ("log_format", "log_level", "log_namespace"):
            incomplete = event()
            del incomplete[missing]
            self.assert_as_twisted(incomplete)
        self.assert_as_twisted(event(log_format=None))
        self.assert_as_twisted(event(log_format=b"bytes {n}", n=1))

    def test_each_line_has_the_time_of_its_event(self) -> None:
        """Each line has the time of its own event, whatever the order they come in."""
        for moment in (NOW, NOW + 0.2, NOW + 1, NOW, NOW + 3600):
            self.assert_as_twisted(event(log_time=moment))

    def test_older_logging_is_written_too(self) -> None:
        """What ``twisted.python.log`` is told is written too."""
        globalLogPublisher.addObserver(self.observer)
        self.addCleanup(globalLogPublisher.removeObserver, self.observer)
        log.msg("of the old kind", system="old")
        self.assertRegex(self.file.text, r"(?m)^\S+ \[old\] of the old kind$")

    def test_a_field_forges_no_line(self) -> None:
        """A line break in a field begins no line that looks like one of ours."""
        forged = "x\n2024-01-01T00:00:00+0000 [shop#info] action: forged"
        self.source.info("ip: {ip}", ip=forged)
        self.source.info(forged.replace("{", ""))
        self.source.failure("{x}", Failure(ValueError(forged)), x=forged)
        lines = self.file.text.split("\n")
        self.assertGreater(sum("forged" in line for line in lines), 3)
        for line in lines:
            if "forged" in line:
                self.assertEqual(line[0], "\t")

    def test_a_traceback_is_indented_below_its_line(self) -> None:
        """A failure comes with its traceback, indented below its line."""
        self.source.failure("that went wrong", boom())
        first, *rest = self.file.text.splitlines()
        self.assertTrue(first.endswith("[shop#critical] that went wrong"), first)
        self.assertTrue(all(line.startswith("\t") for line in rest), rest)
        self.assertIn("\tTraceback (most recent call last):", rest)
        self.assertTrue(any("ValueError: invalid literal" in line for line in rest))

    def test_a_field_that_cannot_be_shown_costs_no_line(self) -> None:
        """A field whose text raises costs neither the line nor the program."""

        class Broken:
            def __str__(self) -> str:
                raise RuntimeError

            __repr__ = __str__

        self.source.info("here: {x}", x=Broken())
        self.assertEqual(self.file.text.count("[shop#info]"), 1)


class Levels(LogCase):
    """What is less important than the level is dropped."""

    def test_events_below_the_level_are_dropped(self) -> None:
        """What is written is what is as important as the level, or more."""
        levels = list(LogLevel.iterconstants())
        for place, least in enumerate(levels):
            file = MemoryLog()
            observer = BufferedLogObserver(file, least)
            for level in levels:
                observer(event(level))
            written = re.findall(r"#(\w+)\]", file.text)
            self.assertEqual(written, [level.name for level in levels[place:]])

    def test_what_is_dropped_is_not_formatted(self) -> None:
        """The text of what is dropped is not even put together."""
        asked: list[str] = []

        class Curious:
            def __str__(self) -> str:
                asked.append("str")
                return ""

        self.source.debug("{x}", x=Curious())
        self.assertEqual((asked, self.file.text), ([], ""))


class Writing(LogCase):
    """When lines are written; the rest is :mod:`.test_log_writer`'s."""

    def test_an_error_does_not_wait(self) -> None:
        """An error is written at once, and what was said before it."""
        self.patch(log_writer, "FLUSH_INTERVAL", 3600.0)
        self.observer.start()
        self.addCleanup(self.observer.stop)
        self.source.info("one")
        self.source.error("two")
        wait_until(lambda: "two" in self.file.text, "the error is written")
        self.assertEqual(LINE.findall(self.file.text), [("info", "one"), ("error", "two")])

    def test_a_clock_set_back_holds_no_line(self) -> None:
        """Where the wall clock goes back an hour, lines are written all the same, so dated."""
        self.patch(log_writer, "FLUSH_INTERVAL", 0.01)
        self.observer.start()
        self.addCleanup(self.observer.stop)
        for moment in (NOW, NOW - 3600, NOW - 3599.5):
            self.observer(event(log_time=moment))
        wait_until(lambda: self.file.text.count("hello") == 3, "all lines are written")
        minutes = [line[:16] for line in self.file.text.splitlines()]
        self.assertNotEqual(minutes[0], minutes[1])
        self.assertEqual(minutes[1], minutes[2])

    def test_lost_lines_are_an_error_of_their_own(self) -> None:
        """That lines were lost stands in a line of the usual form."""
        self.assertRegex(
            self.observer._describe_loss(3).decode(),
            r"^\S+ \[cafeteria_orch\.observe\.logs#error\] 3 lines were lost\n$",
        )

    def test_text_that_cannot_be_encoded_costs_no_line(self) -> None:
        """What is no Unicode is escaped."""
        for word in ("one", "\ud800", "ñ 🍵"):
            self.observer(event(text="{word}", word=word))
        texts = [text for _, text in LINE.findall(self.file.text)]
        self.assertEqual(texts, ["one", "\\ud800", "ñ 🍵"])
