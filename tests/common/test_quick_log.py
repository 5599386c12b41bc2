"""The quick way to log is Twisted's own, but for its time."""

from __future__ import annotations

from typing import cast

from twisted.logger import ILogObserver, LogEvent, Logger
from twisted.trial.unittest import SynchronousTestCase

from cafeteria_orch.common.quick_log import InfoLine


class QuickLogTests(SynchronousTestCase):
    """An event, and who gets it."""

    def test_the_event_is_twisted_s_own(self) -> None:
        """The same fields with the same values, but for the time, which is taken in between."""
        events: list[LogEvent] = []
        logger = Logger("a.namespace", source=self, observer=cast("ILogObserver", events.append))
        logger.info("{one} of {two}", one=1, two="b")
        InfoLine(logger, "{one} of {two}").log({"one": 1, "two": "b"})
        logger.info("{one} of {two}", one=1, two="b")
        before, at, after = (event.pop("log_time") for event in events)
        self.assertEqual(events[1], events[0])
        self.assertLessEqual(before, at)
        self.assertLessEqual(at, after)
