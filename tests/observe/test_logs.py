"""The log observer: the same lines as Twisted's, fewer writes."""

from __future__ import annotations

import re
import threading
import time
from io import StringIO
from pathlib import Path
from typing import Any

from twisted.internet.task import Clock
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
from twisted.python.logfile import LogFile
from twisted.trial.unittest import SynchronousTestCase
from zope.interface.verify import verifyObject

from cafeteria_orch.observe.logs import FLUSH_INTERVAL, BufferedLogObserver

NOW = 1_700_000_000.75
LINE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4} \[shop#(\w+)\] (.*)")


class FullDisk(StringIO):
    """A file whose disk may be full."""

    full = False

    def write(self, text: str) -> int:
        if self.full:
            raise OSError(28, "No space left on device")
        return super().write(text)


class Counting(StringIO):
    """A file that keeps what each call wrote."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def write(self, text: str) -> int:
        self.calls.append(text)
        return super().write(text)


class Slow(StringIO):
    """A file that lets other threads go on while it is written."""

    def write(self, text: str) -> int:
        time.sleep(0.001)
        return super().write(text)


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
        self.clock = Clock()
        self.file: Any = Counting()
        self.observer = BufferedLogObserver(self.file)
        self.source = Logger(namespace="shop", observer=self.observer)

    def texts(self) -> list[str]:
        """What is written so far: the text of each line, which must have the right form."""
        found = []
        for line in self.file.getvalue().splitlines():
            match = LINE.fullmatch(line)
            assert match is not None, line
            found.append(match[2])
        return found


class Form(LogCase):
    """What a line looks like."""

    def assert_as_twisted(self, logged: LogEvent) -> None:
        """An event is written as Twisted's own observer writes it."""
        expected = StringIO()
        FileLogObserver(expected, formatEventAsClassicLogText)(logged)
        self.file.seek(0)
        self.file.truncate()
        self.observer(logged)
        self.assertEqual(self.file.getvalue(), expected.getvalue())

    def test_interface(self) -> None:
        """It is an observer as Twisted knows it."""
        verifyObject(ILogObserver, self.observer)

    def test_line(self) -> None:
        """Time, namespace, level, text; a line break at the end."""
        self.source.info("action: {what} | n: {n}", what="stop", n=3)
        text = self.file.getvalue()
        match = LINE.fullmatch(text.rstrip("\n"))
        assert match is not None
        self.assertEqual(match.groups(), ("info", "action: stop | n: 3"))
        self.assertEqual(text.count("\n"), 1)

    def test_every_level(self) -> None:
        """A line names its level."""
        observer = BufferedLogObserver(self.file, LogLevel.debug)
        for level in LogLevel.iterconstants():
            observer(event(level))
        names = re.findall(r"\[shop#(\w+)\]", self.file.getvalue())
        self.assertEqual(names, ["debug", "info", "warn", "error", "critical"])

    def test_as_twisted(self) -> None:
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

    def test_incomplete_events(self) -> None:
        """What has no format, no level or no namespace is written as Twisted writes it."""
        self.assert_as_twisted(event(text="bytes"))
        for missing in ("log_format", "log_level", "log_namespace"):
            incomplete = event()
            del incomplete[missing]
            self.assert_as_twisted(incomplete)
        self.assert_as_twisted(event(log_format=None))
        self.assert_as_twisted(event(log_format=b"bytes {n}", n=1))

    def test_times(self) -> None:
        """Each line has the time of its own event, whatever the order they come in."""
        for moment in (NOW, NOW + 0.2, NOW + 1, NOW, NOW + 3600):
            self.assert_as_twisted(event(log_time=moment))

    def test_legacy(self) -> None:
        """What ``twisted.python.log`` is told is written too."""
        globalLogPublisher.addObserver(self.observer)
        self.addCleanup(globalLogPublisher.removeObserver, self.observer)
        log.msg("of the old kind", system="old")
        self.assertRegex(self.file.getvalue(), r"(?m)^\S+ \[old\] of the old kind$")

    def test_forged_line(self) -> None:
        """A line break in a field begins no line that looks like one of ours."""
        forged = "x\n2024-01-01T00:00:00+0000 [shop#info] action: forged"
        self.source.info("ip: {ip}", ip=forged)
        self.source.info(forged.replace("{", ""))
        self.source.failure("{x}", Failure(ValueError(forged)), x=forged)
        lines = self.file.getvalue().split("\n")
        self.assertGreater(sum("forged" in line for line in lines), 3)
        for line in lines:
            if "forged" in line:
                self.assertEqual(line[0], "\t")

    def test_traceback(self) -> None:
        """A failure comes with its traceback, indented below its line."""
        self.source.failure("that went wrong", boom())
        first, *rest = self.file.getvalue().splitlines()
        self.assertTrue(first.endswith("[shop#critical] that went wrong"), first)
        self.assertTrue(all(line.startswith("\t") for line in rest), rest)
        self.assertIn("\tTraceback (most recent call last):", rest)
        self.assertTrue(any("ValueError: invalid literal" in line for line in rest))

    def test_field_that_cannot_be_shown(self) -> None:
        """A field whose text raises costs neither the line nor the program."""

        class Broken:
            def __str__(self) -> str:
                raise RuntimeError

            __repr__ = __str__

        self.source.info("here: {x}", x=Broken())
        self.assertEqual(self.file.getvalue().count("[shop#info]"), 1)


class Levels(LogCase):
    """What is less important than the level is dropped."""

    def test_filter(self) -> None:
        """What is written is what is as important as the level, or more."""
        levels = list(LogLevel.iterconstants())
        for place, least in enumerate(levels):
            file = StringIO()
            observer = BufferedLogObserver(file, least)
            for level in levels:
                observer(event(level))
            written = re.findall(r"#(\w+)\]", file.getvalue())
            self.assertEqual(written, [level.name for level in levels[place:]])

    def test_nothing_is_formatted(self) -> None:
        """The text of what is dropped is not even put together."""
        asked: list[str] = []

        class Curious:
            def __str__(self) -> str:
                asked.append("str")
                return ""

        self.source.debug("{x}", x=Curious())
        self.assertEqual((asked, self.file.getvalue()), ([], ""))


class Buffering(LogCase):
    """Lines wait for each other, though not for long."""

    def test_before_the_start(self) -> None:
        """Before it is started each line is written at once."""
        self.source.info("one")
        self.assertEqual(self.texts(), ["one"])

    def test_waits(self) -> None:
        """Lines wait half a second at most, and are written together."""
        self.assertEqual(FLUSH_INTERVAL, 0.5)
        self.observer.start(self.clock)
        self.addCleanup(self.observer.stop)
        self.source.info("one")
        self.source.warn("two")
        self.clock.advance(0.49)
        self.assertEqual(self.file.calls, [])
        self.clock.advance(0.01)
        self.assertEqual(self.texts(), ["one", "two"])
        self.assertEqual(len(self.file.calls), 1)
        self.source.info("three")
        self.clock.advance(0.5)
        self.assertEqual(self.texts(), ["one", "two", "three"])

    def test_idle(self) -> None:
        """Where nothing is said nothing is written."""
        self.observer.start(self.clock)
        self.clock.pump([0.5] * 5)
        self.observer.stop()
        self.assertEqual(self.file.calls, [])

    def test_errors_do_not_wait(self) -> None:
        """An error is in the file at once, and what was said before it, in order."""
        self.observer.start(self.clock)
        self.addCleanup(self.observer.stop)
        self.source.info("one")
        self.source.error("two")
        self.assertEqual(self.texts(), ["one", "two"])
        self.source.critical("three")
        self.assertEqual(self.texts(), ["one", "two", "three"])

    def test_flush(self) -> None:
        """Whoever needs the lines now can have them."""
        self.observer.start(self.clock)
        self.addCleanup(self.observer.stop)
        self.source.info("one")
        self.observer.flush()
        self.assertEqual(self.texts(), ["one"])

    def test_stop(self) -> None:
        """A stop writes what waits; from then on no line waits and no timer is left."""
        self.observer.start(self.clock)
        self.source.info("one")
        self.observer.stop()
        self.assertEqual(self.texts(), ["one"])
        self.source.info("two")
        self.assertEqual(self.texts(), ["one", "two"])
        self.assertEqual(self.clock.getDelayedCalls(), [])
        self.observer.stop()

    def test_file_with_a_buffer(self) -> None:
        """What is written is in the file, not in a buffer of the file's own."""
        path = Path(self.mktemp())
        with path.open("w", encoding="utf-8") as file:
            BufferedLogObserver(file)(event(text="one"))
            self.assertIn("one", path.read_text(encoding="utf-8"))

    def test_log_file(self) -> None:
        """It writes to the file that twistd's ``--logfile`` names, which may be rotated."""
        path = Path(self.mktemp())
        file = LogFile.fromFullPath(str(path))
        self.addCleanup(file.close)
        observer = BufferedLogObserver(file)
        observer(event(text="one ñ"))
        file.rotate()
        observer(event(text="two"))
        rotated = Path(f"{path}.1").read_text(encoding="utf-8")
        self.assertTrue(rotated.endswith("[shop#info] one ñ\n"), rotated)
        self.assertTrue(path.read_text(encoding="utf-8").endswith("[shop#info] two\n"))

    def test_threads(self) -> None:
        """Many threads that log at the same time lose no line, nor break one."""
        self.file = Slow()
        self.observer = BufferedLogObserver(self.file)
        self.source = Logger(namespace="shop", observer=self.observer)
        self.observer.start(self.clock)
        start = threading.Barrier(9)

        def work(thread: int) -> None:
            start.wait(5)
            for number in range(200):
                self.source.info("{thread}-{number}", thread=thread, number=number)
                if number % 50 == 49:
                    self.source.error("{thread}-error", thread=thread)

        threads = [threading.Thread(target=work, args=(thread,)) for thread in range(8)]
        for thread in threads:
            thread.start()
        start.wait(5)
        while any(thread.is_alive() for thread in threads):
            self.clock.advance(0.5)
        for thread in threads:
            thread.join()
        self.observer.stop()
        texts = self.texts()
        self.assertEqual(len(texts), 8 * 204)
        for thread_number in range(8):
            mine = [text for text in texts if text.startswith(f"{thread_number}-")]
            numbers = [text for text in mine if not text.endswith("error")]
            self.assertEqual(numbers, [f"{thread_number}-{number}" for number in range(200)])


class Trouble(LogCase):
    """A file that cannot be written costs as little as can be."""

    def setUp(self) -> None:
        super().setUp()
        self.file = FullDisk()
        self.observer = BufferedLogObserver(self.file)
        self.source = Logger(namespace="shop", observer=self.observer)

    def test_full_for_a_while(self) -> None:
        """What was said while the disk was full is written later, in order."""
        self.observer.start(self.clock)
        self.addCleanup(self.observer.stop)
        self.file.full = True
        self.source.info("one")
        self.clock.advance(0.5)
        self.source.error("two")
        self.source.info("three")
        self.clock.advance(0.5)
        self.assertEqual(self.file.getvalue(), "")
        self.file.full = False
        self.clock.advance(0.5)
        self.assertEqual(self.texts(), ["one", "two", "three"])

    def test_full_before_the_start(self) -> None:
        """A line that could not be written at once comes with the next one that can."""
        self.file.full = True
        self.source.info("one")
        self.file.full = False
        self.source.info("two")
        self.assertEqual(self.texts(), ["one", "two"])

    def test_full_at_the_stop(self) -> None:
        """A stop on a full disk raises nothing."""
        self.observer.start(self.clock)
        self.source.info("one")
        self.file.full = True
        self.observer.stop()
        self.assertEqual(self.file.getvalue(), "")

    def test_full_for_long(self) -> None:
        """What does not fit in memory is lost, and how much it was is written afterwards."""
        self.observer.start(self.clock)
        self.addCleanup(self.observer.stop)
        self.file.full = True
        said = 0
        for _ in range(8):
            for _ in range(10_000):
                self.observer(event())
            said += 10_000
            self.clock.advance(0.5)
        self.source.info("before")
        self.file.full = False
        self.clock.advance(0.5)
        text = self.file.getvalue()
        (lost,) = re.findall(r"(?m)^\S+ \[[\w.]+#error\] (\d+) lines were lost$", text)
        self.assertEqual(text.count("hello") + int(lost), said)
        self.assertGreater(int(lost), 40_000)
        self.assertIn("before", text)
        self.source.info("after")
        self.clock.advance(0.5)
        self.assertEqual(self.file.getvalue().count("were lost"), 1)

    def test_text_that_the_file_refuses(self) -> None:
        """A line that cannot be encoded costs no other line, then or later."""
        path = Path(self.mktemp())
        file = LogFile.fromFullPath(str(path))
        self.addCleanup(file.close)
        observer = BufferedLogObserver(file)
        # As Twisted has it: whatever an observer raises is nobody's trouble but its own.
        publish = LogPublisher(observer)
        observer.start(self.clock)
        publish(event(text="one"))
        publish(event(text="{x}", x="\ud800"))
        publish(event(text="two"))
        self.clock.advance(0.5)
        self.flushLoggedErrors(UnicodeEncodeError)
        publish(event(text="three"))
        self.clock.advance(0.5)
        observer.stop()
        words = re.findall(r"(?m)\] (one|two|three)$", path.read_text(encoding="utf-8"))
        self.assertEqual(words, ["one", "two", "three"])
