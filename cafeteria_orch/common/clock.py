"""Two clocks: one that durations are measured by, and one that says what time it is."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

WallTime = Callable[[], float]
"""Seconds since the epoch. Somebody may set this clock back: no duration is measured by it."""

wall_time: WallTime = time.time


def measure_monotonic_time(reactor: Any) -> None:
    """Have a reactor measure all its delays by a clock that nobody can set.

    Twisted's reactors measure them by the wall clock: where that is set back by an hour, each
    delayed call comes an hour late. To be called before anything is delayed.
    """
    reactor.seconds = time.monotonic
