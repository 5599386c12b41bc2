"""How far a console command is, for the person who waits for it.

The extra ``cli`` brings the bar: it is imported where it is used.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec


class _PlainProgress:
    """Prints the progress in lines, without a terminal or without tqdm."""

    def __init__(
        self, total: int, done: int, unit: str, what: str, say: Callable[[str], object]
    ) -> None:
        self._total = total
        self._unit = unit
        self._done = done
        self._what = what
        self._say = say

    def update(self, number: int) -> None:
        """Count further ones; print a line at every tenth of the total."""
        tenth = self._done * 10 // max(1, self._total)
        self._done += number
        if self._done * 10 // max(1, self._total) > tenth:
            self._say(f"{self._done} of {self._total} {self._unit}s {self._what}")


@contextmanager
def showing_progress(
    total: int, what: str, say: Callable[[str], object], done: int = 0, unit: str = "row"
) -> Iterator[Callable[[int], object]]:
    """Show the progress on standard error: a bar on a terminal, else lines.

    :param total: how many there are.
    :param what: becomes of them, as ``acknowledged``.
    :param say: prints a line.
    :param done: how many are done at the start.
    :param unit: what is counted.
    :return: takes the number of further ones that are done.
    """
    if not (sys.stderr.isatty() and find_spec("tqdm")):
        yield _PlainProgress(total, done, unit, what, say).update
        return
    from tqdm import tqdm  # noqa: PLC0415 (of the extra "cli")

    with tqdm(total=total, initial=done, desc=what, unit=unit, unit_scale=True) as bar:
        yield bar.update
