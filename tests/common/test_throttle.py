"""What happens very often is reported the first time, then its number now and then."""

from __future__ import annotations

from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from cafeteria_orch.common.rate_limit import REPORT_INTERVAL, Throttle


class ThrottleTests(SynchronousTestCase):
    """When a report is due, and of how many."""

    def test_each_kind(self) -> None:
        """Each kind has its own number and its own time."""
        clock = Clock()
        throttle = Throttle(clock)
        self.assertEqual([throttle.due("a") for _ in range(3)], [1, 0, 0])
        clock.advance(REPORT_INTERVAL / 2)
        self.assertEqual(throttle.due("b"), 1)
        clock.advance(REPORT_INTERVAL / 2)
        self.assertEqual((throttle.due("b"), throttle.due("a")), (0, 3))
        clock.advance(REPORT_INTERVAL)
        self.assertEqual((throttle.due("b"), throttle.due("a")), (2, 1))
