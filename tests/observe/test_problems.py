"""The last warnings and errors: by their kinds, bounded, and nothing of what failures hold."""

from __future__ import annotations

from twisted.internet.task import Clock
from twisted.logger import Logger, LogLevel
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase

from cafeteria_orch.common.rate_limit import REPORT_INTERVAL, RateLimitedLog, RateLimits
from cafeteria_orch.observe.problems import MAX_PROBLEMS, RecentProblems

SECRET = "5d41402abc4b"


class Problems(SynchronousTestCase):
    """The last warnings and errors."""

    def setUp(self) -> None:
        self.problems = RecentProblems()
        self.emitter = Logger("test", observer=self.problems)

    def texts(self) -> list[str]:
        return [problem["text"] for problem in self.problems.latest()]

    def test_warnings_and_errors_are_kept_the_newest_first(self) -> None:
        """Each has its level and time; what is less important is left out."""
        for level in (LogLevel.debug, LogLevel.info, LogLevel.warn, LogLevel.error):
            self.emitter.emit(level, "{what} happened", what=level.name)
        self.assertEqual(self.texts(), ["error happened", "warn happened"])
        first, _ = self.problems.latest()
        self.assertEqual(first["level"], "error")
        self.assertGreater(first["time"], 1.7e9)

    def test_the_text_of_a_failure_is_not_kept(self) -> None:
        """The line above the traceback is, or else the kind of the error."""
        failure = Failure(ValueError(SECRET))
        self.emitter.failure("it broke", failure)
        self.emitter.emit(LogLevel.critical, None, log_failure=failure)
        self.assertEqual(self.texts(), ["ValueError", "it broke"])

    def test_a_problem_is_one_short_line(self) -> None:
        """Control characters are left out."""
        self.emitter.warn("{text}", text="first\x1b[31m\u202e line\nsecond line")
        self.emitter.warn("long: {text}", text="x" * 10_000)
        long, first = self.texts()
        self.assertEqual(first, "first[31m line")
        self.assertEqual(len(long), 300)

    def test_events_of_a_format_are_one_line(self) -> None:
        """It has the last text, the first and the last time, and the number of events."""
        event = {"log_format": "a client sent {what}", "log_level": LogLevel.warn}
        for number in range(3):
            self.problems({**event, "what": number, "log_time": 10.0 + number})
        self.problems({**event, "log_level": LogLevel.error, "log_time": 20.0})
        error, warning = self.problems.latest()
        self.assertEqual((error["level"], error["count"]), ("error", 1))
        self.assertEqual(
            warning,
            {
                "time": 12.0,
                "first_time": 10.0,
                "level": "warn",
                "text": "a client sent 2",
                "count": 3,
            },
        )

    def test_a_line_of_a_rate_limited_log_counts_all_its_events(self) -> None:
        """Whether it says so itself or not."""
        clock = Clock()
        limited = RateLimitedLog(RateLimits(clock), self.emitter)
        for message in ("it is late", "{refused} were refused"):
            for number in range(6):
                limited.warn(message, message, ip=f"192.0.2.{number % 2}")
        clock.advance(REPORT_INTERVAL)
        self.assertEqual(self.texts(), ["2 were refused", "it is late | repeated: 2"])
        self.assertEqual([problem["count"] for problem in self.problems.latest()], [6, 6])

    def test_a_line_of_several_addresses_is_of_the_same_kind(self) -> None:
        """Those that have no line of their own share one, which says how many they are."""
        clock = Clock()
        limited = RateLimitedLog(RateLimits(clock), self.emitter)
        for number in range(40):
            limited.warn("late", "it is late", ip=f"192.0.2.{number}")
        clock.advance(REPORT_INTERVAL)
        (problem,) = self.problems.latest()
        self.assertIn("addresses:", problem["text"])
        self.assertEqual(problem["count"], 40)

    def test_a_client_displaces_no_other_line(self) -> None:
        """Neither by what it sends, nor where a processor makes formats of that."""
        self.emitter.error("the disk is full")
        careless = Logger("careless", observer=self.problems)
        for number in range(10 * MAX_PROBLEMS):
            self.emitter.warn("{text}", text=number)
            careless.warn(f"{number}")
        texts = self.texts()
        self.assertEqual(len(texts), MAX_PROBLEMS)
        self.assertEqual((texts[0], texts[1], texts[-1]), ("499", "499", "the disk is full"))

    def test_bounded(self) -> None:
        """The last fifty kinds are kept, each by a short format."""
        for number in range(MAX_PROBLEMS + 10):
            self.emitter.warn(f"{number}")
        self.assertEqual(self.texts(), [str(59 - number) for number in range(MAX_PROBLEMS)])
        self.emitter.warn("x" * 100_000)
        self.assertLess(max(len(kind[2]) for kind in self.problems._problems), 400)
