"""Two clocks: a monotonic one for durations, and the wall clock for what time it is."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

WallTime = Callable[[], float]
"""Seconds since the epoch. An operator may set this clock: it measures no duration."""

wall_time: WallTime = time.time

monotonic_time: Callable[[], float] = time.monotonic
"""Seconds of a clock that nobody can set: of programs without a reactor."""


def measure_monotonic_time(reactor: Any) -> None:
    """Make a reactor measure its delays by a clock that nobody can set.

    Twisted's reactors measure them by the wall clock: when that is set back by an hour, each
    delayed call comes an hour late. Call it before anything is delayed.
    """
    reactor.seconds = monotonic_time
