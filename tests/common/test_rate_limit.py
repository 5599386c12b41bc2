"""The rate-limited log: an event is reported at once, then its number once a minute."""

from __future__ import annotations

from twisted.internet.task import Clock
from twisted.logger import LogEvent, Logger
from twisted.trial.unittest import SynchronousTestCase

from cafeteria_orch.common.rate_limit import MAX_KINDS, REPORT_INTERVAL, RateLimitedLog


class RateLimitedLogTests(SynchronousTestCase):
    """When a line is due, and how many events it stands for."""

    def setUp(self) -> None:
        self.clock = Clock()
        self.events: list[LogEvent] = []
        logger = Logger("test", observer=self.events.append)  # type: ignore[arg-type]
        self.limited = RateLimitedLog(self.clock, logger)

    def warn(self, kind: str, times: int = 1) -> list[tuple[str, int]]:
        """Let events happen; the lines that they give: which one came last, and how many."""
        self.events.clear()
        for number in range(times):
            self.limited.warn(kind, "{refused} of {event}", event=f"{kind}{number}")
        return [(event["event"], event["refused"]) for event in self.events]

    def test_each_kind_has_its_own_number_and_time(self) -> None:
        """The first event of a kind is logged at once, and the next line comes a minute later."""
        self.assertEqual(self.warn("a", 3), [("a0", 1)])
        self.clock.advance(REPORT_INTERVAL / 2)
        self.assertEqual(self.warn("b"), [("b0", 1)])
        self.clock.advance(REPORT_INTERVAL / 2)
        self.assertEqual(self.warn("b") + self.warn("a"), [("a0", 3)])
        self.clock.advance(REPORT_INTERVAL)
        self.assertEqual(self.warn("b") + self.warn("a"), [("b0", 2), ("a0", 1)])

    def test_the_line_is_a_warning_of_the_given_logger(self) -> None:
        """Level, namespace and fields are those of a line that is not limited."""
        self.warn("a")
        (event,) = self.events
        self.assertEqual((event["log_namespace"], event["log_level"].name), ("test", "warn"))
        self.assertEqual(event["log_format"].format(**event), "1 of a0")

    def test_kinds_are_limited(self) -> None:
        """Beyond the limit all kinds share a line, so that new ones cannot flood the log."""
        lines = [self.warn(f"kind {number}") for number in range(MAX_KINDS + 100)]
        self.assertEqual(sum(map(len, lines)), MAX_KINDS + 1)
        self.clock.advance(REPORT_INTERVAL)
        self.assertEqual(self.warn("one more"), [("one more0", 100)])
        self.assertEqual(self.warn("kind 0"), [("kind 00", 1)])
