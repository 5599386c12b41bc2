"""What all console commands do alike."""

from __future__ import annotations

import argparse
import time
from typing import Any

from twisted.internet.testing import MemoryReactorClock
from twisted.trial.unittest import SynchronousTestCase

from cafeteria_orch.common import commands


class Clocks(SynchronousTestCase):
    """The time that a command measures."""

    def test_a_command_measures_by_a_clock_that_nobody_sets(self) -> None:
        """Its timeouts come in time where the wall clock is set back."""
        reactor = MemoryReactorClock()
        clocks: list[object] = []

        async def command(reactor: Any, _: argparse.Namespace) -> int:
            clocks.append(reactor.seconds)
            return 0

        running = commands._start(reactor, command, argparse.Namespace())
        self.failureResultOf(running, SystemExit)
        self.assertEqual(clocks, [time.monotonic])
