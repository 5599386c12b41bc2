"""The rate-limited log: an event is reported at once, then its number once a minute."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.task import Clock
from twisted.logger import LogEvent, Logger, formatEvent
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase

from cafeteria_orch.common.rate_limit import (
    FAILURES,
    LOST_BATCHES,
    MAX_COUNTED_ADDRESSES,
    MAX_KINDS,
    REPORT_INTERVAL,
    TRAFFIC,
    RateLimitedLog,
    RateLimits,
)


class RateLimitTestCase(SynchronousTestCase):
    """A log on a clock, whose events are collected."""

    def setUp(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Begin with a new log."""
        self.clock = Clock()
        self.events: list[LogEvent] = []
        self.limits = RateLimits(self.clock)
        self.limited = self.log_of("test")

    def log_of(self, namespace: str) -> RateLimitedLog:
        """The log of a module."""
        logger = Logger(namespace, observer=self.events.append)  # type: ignore[arg-type]
        return RateLimitedLog(self.limits, logger)

    def lines(self) -> list[str]:
        """What was logged since the last call."""
        lines = [formatEvent(event) for event in self.events]
        self.events.clear()
        return lines

    def warn(self, kind: str, ip: str | None = "a", times: int = 1) -> list[str]:
        """Let events happen; the lines that they give at once."""
        self.lines()
        for number in range(times):
            self.limited.warn(kind, "{refused} of {ip}, {n}", ip=ip, n=number)
        return self.lines()

    def advance(self, seconds: float) -> list[str]:
        """Let time pass; the lines that it gives."""
        self.lines()
        self.clock.advance(seconds)
        return self.lines()


class Intervals(RateLimitTestCase):
    """When a line is due, and how many events it stands for."""

    def test_the_first_is_logged_at_once_and_the_others_a_minute_later(self) -> None:
        """The line after a minute comes by itself, with the number of events since the first."""
        self.assertEqual(self.warn("x", times=4), ["1 of a, 0"])
        self.assertEqual(self.advance(REPORT_INTERVAL - 1), [])
        self.assertEqual(self.warn("x", times=2), [])
        self.assertEqual(self.advance(1), ["5 of a, 1"])

    def test_a_flood_gives_a_line_a_minute(self) -> None:
        """The line of a minute is the first of the next one."""
        self.warn("x")
        for _ in range(3):
            self.assertEqual(self.warn("x", times=9), [])
            self.assertEqual(self.advance(REPORT_INTERVAL), ["9 of a, 8"])

    def test_after_a_quiet_minute_the_next_is_logged_at_once(self) -> None:
        """Nothing is remembered, and no timer runs, when nothing was counted for a minute."""
        self.warn("x", times=2)
        self.assertEqual(self.advance(REPORT_INTERVAL), ["1 of a, 1"])
        self.assertEqual(self.advance(REPORT_INTERVAL), [])
        self.assertEqual(self.clock.getDelayedCalls(), [])
        self.assertEqual(self.warn("x"), ["1 of a, 0"])

    def test_each_pair_has_its_own_minute(self) -> None:
        """A kind, and an address, has its line a minute after its own first."""
        self.warn("x", times=2)
        self.clock.advance(20)
        self.assertEqual(self.warn("y", times=3), ["1 of a, 0"])
        self.clock.advance(20)
        self.assertEqual(self.warn("x", "b", times=4), ["1 of b, 0"])
        self.assertEqual(self.advance(20), ["1 of a, 1"])
        self.assertEqual(self.advance(20), ["2 of a, 2"])
        self.assertEqual(self.advance(20), ["3 of b, 3"])

    def test_no_timer_runs_while_nothing_is_counted(self) -> None:
        """Most of the time every event has its line; the timer is that of the first line due."""
        self.warn("x")
        self.clock.advance(1)
        self.warn("y", times=2)
        (timer,) = self.clock.getDelayedCalls()
        self.assertEqual(timer.getTime(), 1 + REPORT_INTERVAL)
        self.warn("x")
        self.assertEqual([each.getTime() for each in self.clock.getDelayedCalls()], [60])
        self.assertEqual(self.advance(REPORT_INTERVAL - 1), ["1 of a, 0"])
        self.assertEqual(self.advance(1), ["1 of a, 1"])

    def test_a_stop_reports_what_was_counted(self) -> None:
        """A drain does not lose the number of a flood that it ends, and leaves no timer."""
        self.warn("x", times=3)
        self.warn("y")
        self.limits.stop()
        self.assertEqual(self.lines(), ["2 of a, 2"])
        self.assertEqual(self.clock.getDelayedCalls(), [])
        self.assertEqual(self.warn("x"), ["1 of a, 0"])

    def test_more_lines_at_once(self) -> None:
        """A limit may allow several lines of a minute at once; its last one has the rest."""
        for number in range(LOST_BATCHES.lines + 7):
            self.limited.error("x", "batch {n}", LOST_BATCHES, ip="a", n=number)
        self.assertEqual(len(self.lines()), LOST_BATCHES.lines)
        self.assertEqual(self.advance(REPORT_INTERVAL), ["batch 106 | repeated: 7"])


class Forms(RateLimitTestCase):
    """What a line looks like."""

    def test_lines_have_the_level_and_the_namespace_of_their_module(self) -> None:
        """They are those of a line that is not limited; modules do not share their kinds."""
        self.limited.info("x", "one", ip="a")
        self.log_of("other").error("x", "two", ip="a")
        seen = [(event["log_namespace"], event["log_level"].name) for event in self.events]
        self.assertEqual(seen, [("test", "info"), ("other", "error")])

    def test_a_number_that_the_format_lacks_is_added(self) -> None:
        """Where a line speaks for several events, it says so."""
        for _ in range(3):
            self.limited.warn("x", "it broke", ip="a")
        self.assertEqual(self.lines() + self.advance(60), ["it broke", "it broke | repeated: 2"])

    def test_a_traceback_comes_once(self) -> None:
        """A failure that is only counted is not kept: it refers to all that its frames had."""
        for _ in range(3):
            self.limited.failure("x", "a bug", Failure(ValueError()), ip="a")
        (first,) = self.events
        self.assertIn("log_failure", first)
        self.clock.advance(REPORT_INTERVAL)
        self.assertNotIn("log_failure", self.events[-1])
        self.assertEqual(self.lines()[-1], "a bug | repeated: 2")


class Bounds(RateLimitTestCase):
    """However many kinds and addresses there are, the lines of a minute are few."""

    def test_one_address_leaves_the_lines_of_the_others(self) -> None:
        """A client that floods costs no other client its line."""
        self.warn("x", "flood", times=1000)
        self.assertEqual(self.warn("x", "honest"), ["1 of honest, 0"])

    def test_many_addresses_share_a_line(self) -> None:
        """Beyond the limit addresses have one line together, which says how many they are."""
        many = FAILURES.addresses + 50
        lines = [line for number in range(many) for line in self.warn("x", f"ip {number}", 2)]
        self.assertEqual(len(lines), FAILURES.addresses + 1)
        self.assertEqual(self.advance(REPORT_INTERVAL)[-1], "99 of ip 65, 1 | addresses: 50")

    def test_addresses_are_counted_up_to_a_limit(self) -> None:
        """The memory for that is bounded."""
        for number in range(3 * MAX_COUNTED_ADDRESSES):
            self.limited.warn("x", "x", ip=f"{number}")
        self.assertLessEqual(len(self.events), FAILURES.addresses + 1)
        *_, last = self.advance(REPORT_INTERVAL)
        self.assertTrue(last.endswith(f"| addresses: {MAX_COUNTED_ADDRESSES}"), last)

    def test_kinds_are_limited(self) -> None:
        """Beyond the limit all kinds share a line, so that new ones cannot flood the log."""
        lines = [self.warn(f"kind {number}", None) for number in range(MAX_KINDS + 100)]
        self.assertEqual(sum(map(len, lines)), MAX_KINDS + 1)
        self.assertEqual(self.advance(REPORT_INTERVAL), ["99 of None, 0"])

    def test_room_is_made_again(self) -> None:
        """Addresses that are quiet again leave their places to others."""
        for number in range(FAILURES.addresses + 1):
            self.warn("x", f"{number}")
        self.advance(REPORT_INTERVAL)
        self.assertEqual(self.warn("x", "new", 2), ["1 of new, 0"])
        self.assertEqual(self.advance(REPORT_INTERVAL), ["1 of new, 1"])

    @given(
        st.lists(
            st.tuples(
                st.sampled_from("xyz"),
                st.integers(0, 2 * FAILURES.addresses),
                st.integers(1, 3),
                st.sampled_from([0, 0, 0, 1, 25, 59, 60]),
            ),
            max_size=80,
        )
    )
    def test_no_event_is_lost_and_no_minute_has_more_lines(
        self, happenings: list[tuple[str, int, int, int]]
    ) -> None:
        """Lines speak for as many events as there were; each minute of a kind has few of them."""
        self.begin()
        total = 0
        moments: dict[str, list[tuple[float, int]]] = {}

        def note() -> None:
            for event in self.events:
                moments.setdefault(event["of"], []).append(
                    (self.clock.seconds(), event["refused"])
                )
            self.events.clear()

        for kind, address, times, seconds in happenings:
            for _ in range(times):
                self.limited.warn(kind, "x", ip=f"{address}", of=kind)
            total += times
            note()
            self.clock.advance(seconds)
            note()
        self.limits.stop()
        reported = [refused for each in moments.values() for _, refused in each]
        self.assertEqual(sum(reported) + sum(event["refused"] for event in self.events), total)
        for each in moments.values():
            for began, _ in each:
                inside = [now for now, _ in each if began <= now < began + REPORT_INTERVAL]
                self.assertLessEqual(len(inside), FAILURES.addresses + 1)

    def test_traffic_has_more_room(self) -> None:
        """Normal operation is logged as it comes, up to some lines of each address."""
        for number in range(TRAFFIC.lines + 1):
            self.limited.info("x", "connected", ip="a", n=number)
        for number in range(TRAFFIC.addresses - 1):
            self.limited.info("x", "connected", ip=f"{number}")
        self.assertEqual(len(self.events), TRAFFIC.lines + TRAFFIC.addresses - 1)
