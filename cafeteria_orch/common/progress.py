"""How far a console command is, for the person who waits for it.

The extra ``cli`` brings the bar: it is imported where it is used.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from .clock import monotonic_time


class _PlainProgress:
    """Prints the progress in lines, without a terminal or without tqdm."""

    def __init__(
        self, total: int, done: int, what: str, say: Callable[[str], object], begin: float
    ) -> None:
        self._total = total
        self._done = done
        self._what = what
        self._say = say
        self._begin = begin

    def update(self, amount: int) -> None:
        """Count; print a line at every tenth of the total."""
        tenth = self._done * 10 // max(1, self._total)
        self._done += amount
        if self._done * 10 // max(1, self._total) > tenth and monotonic_time() >= self._begin:
            self._say(f"{self._done} of {self._total} {self._what}")


@contextmanager
def showing_progress(
    total: int,
    what: str,
    say: Callable[[str], object],
    done: int = 0,
    *,
    unit: str = "row",
    delay: float = 0.0,
) -> Iterator[Callable[[int], object]]:
    """Show the progress on standard error: a bar on a terminal, else lines.

    :param total: how many rows there are, or what else is counted.
    :param what: becomes of them, as ``acknowledged``.
    :param say: prints a line.
    :param done: how many are done at the start.
    :param unit: what is counted.
    :param delay: seconds in which nothing is shown: most may be done by then.
    :return: takes the number of further ones that are done.
    """
    if not (sys.stderr.isatty() and find_spec("tqdm")):
        begin = monotonic_time() + delay
        yield _PlainProgress(total, done, f"{unit}s {what}", say, begin).update
        return
    from tqdm import tqdm  # noqa: PLC0415 (of the extra "cli")

    with tqdm(
        total=total, initial=done, desc=what, unit=unit, unit_scale=True, delay=delay
    ) as bar:
        yield bar.update
