"""The world: one clock, one random choice, and the order of all that happens."""

from __future__ import annotations

import heapq
import random
from collections import Counter, deque
from collections.abc import Callable
from itertools import count
from typing import Any, NoReturn

START = 1_700_000_000.0
"""What time it is when a world begins, in seconds since the epoch."""

MAX_STORY = 400
"""How many events are kept, to be told when something is wrong."""


class Violation(AssertionError):
    """Something that must hold does not."""


class Event:
    """Something that happens at a time, unless it is cancelled."""

    __slots__ = ("call", "time")

    def __init__(self, time: float, call: Callable[[], object]) -> None:
        self.time = time
        self.call: Callable[[], object] | None = call

    def cancel(self) -> None:
        """It does not happen."""
        self.call = None


class World:
    """Time and chance.

    :param seed: decides everything.
    :ivar now: seconds since the beginning.
    :ivar wall_offset: how far an operator has set the wall clock, in seconds.
    :ivar chance: of the seed.
    :ivar faults: how many faults there were, by their kinds.
    :ivar is_calm: whether no more faults happen.
    :ivar strikes: how many faults there were that a client may notice.
    :ivar scale: how many times slower everybody is than in other worlds; faults are as seldom.
    :ivar is_large: whether many batches are large, so that memory is short.
    :ivar story: the last events, a line each.
    :ivar at_end: what is called when it ends, however that is.
    :ivar verbose: takes each line of the story as it happens.
    """

    def __init__(self, seed: int, verbose: Callable[[str], object] | None = None) -> None:
        self.seed = seed
        self.now = 0.0
        self.wall_offset = 0.0
        self.chance = random.Random(seed)
        self.faults: Counter[str] = Counter()
        self.is_calm = False
        self.strikes = 0
        self.is_large = self.chance.random() < 0.3
        self.scale = self.chance.choice((1, 1, 30))
        self.events = 0
        self.story: deque[str] = deque(maxlen=MAX_STORY)
        self.at_end: list[Callable[[], object]] = []
        self._verbose = verbose
        self._violation: Violation | None = None
        self._queue: list[tuple[float, float, int, Event]] = []
        self._number = count()

    def wall_time(self) -> float:
        """What the wall clock shows."""
        return START + self.now + self.wall_offset

    def at(self, time: float, call: Callable[[], object]) -> Event:
        """Have something happen at a time; chance decides the order of what happens together."""
        event = Event(max(time, self.now), call)
        entry = (event.time, self.chance.random(), next(self._number), event)
        heapq.heappush(self._queue, entry)
        return event

    def after(self, seconds: float, call: Callable[[], object]) -> Event:
        """Have something happen later."""
        return self.at(self.now + seconds, call)

    def tell(self, line: str) -> None:
        """Add a line to the story."""
        line = f"{self.now:14.6f}  {line}"
        self.story.append(line)
        if self._verbose is not None:
            self._verbose(line)

    def fault(self, kind: str, line: str | None = None) -> None:
        """Count a fault, and tell it if it is worth a line."""
        self.faults[kind] += 1
        if line is not None:
            self.tell(f"FAULT {kind}: {line}")

    def happens(self, probability: float) -> bool:
        """Whether a fault happens."""
        return not self.is_calm and self.chance.random() < probability

    def step(self) -> bool:
        """Let the next event happen; return whether there was one."""
        while self._queue:
            time, _, _, event = heapq.heappop(self._queue)
            call, event.call = event.call, None
            if call is not None:
                self.now = time
                self.events += 1
                call()
                if self._violation is not None:
                    # Whoever was called may have caught it, as a Deferred does.
                    raise self._violation
                return True
        return False

    def run_until(self, time: float, done: Callable[[], bool] = lambda: False) -> bool:
        """Let everything happen up to a time.

        :param done: ends it early.
        :return: whether it was done.
        """
        while self._queue and self._queue[0][0] <= time:
            self.step()
            if done():
                return True
        self.now = max(self.now, time)
        return done()

    def fail(self, what: str) -> NoReturn:
        """Something is wrong.

        :raises Violation: with what it is.
        """
        self.tell(f"VIOLATION {what}")
        self._violation = Violation(what)
        raise self._violation

    def pick(self, choices: Any) -> Any:
        """One of some."""
        return self.chance.choice(choices)
