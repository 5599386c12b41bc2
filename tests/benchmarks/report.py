"""The figures of a benchmark, and the table of all."""

from __future__ import annotations

import os
import platform
import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

import twisted

HEADINGS = ("what", "ours", "the baseline or the limit", "ratio", "goal")


class BenchmarkError(Exception):
    """A benchmark that could not be run. Its text says why."""


class Goal(NamedTuple):
    """The goal of a ratio, ours by the other.

    :ivar is_max: whether the ratio may be no higher, rather than no lower.
    """

    ratio: float
    is_max: bool = False

    def is_met(self, ratio: float) -> bool:
        """Whether a ratio meets the goal."""
        return ratio <= self.ratio if self.is_max else ratio >= self.ratio

    def __str__(self) -> str:
        return f"{'≤' if self.is_max else '≥'} {self.ratio:g}"


class Figure(NamedTuple):
    """One row of the table.

    :ivar what: what was measured.
    :ivar unit: of both figures.
    :ivar ours: ``None`` if it was not measured: :attr:`remark` says why.
    :ivar other: the figure that it is compared with.
    :ivar goal: ``None`` if the figure is for information only.
    :ivar remark: a note on the other figure, or why there is none.
    """

    what: str
    unit: str
    ours: float | None
    other: float | None = None
    goal: Goal | None = None
    remark: str = ""

    @property
    def ratio(self) -> float | None:
        """Ours by the other."""
        return self.ours / self.other if self.ours is not None and self.other else None

    def cells(self) -> tuple[str, ...]:
        """The row as texts, one for each of :data:`HEADINGS`."""
        ours = self.remark if self.ours is None else f"{_number(self.ours)} {self.unit}"
        ratio = goal = "-"
        other = (self.ours is not None and self.remark) or "-"
        if self.other is not None:
            other = f"{_number(self.other)} {self.unit}"
            if self.ours is not None and self.remark:
                other += f" ({self.remark})"
        if self.goal is not None:
            goal = str(self.goal)
        if self.ratio is not None:
            ratio = _number(self.ratio)
            if self.goal is not None:
                goal += ": met" if self.goal.is_met(self.ratio) else ": MISSED"
        return self.what, ours, other, ratio, goal


class Effort(NamedTuple):
    """How much work goes into a figure.

    :ivar seconds: of load in each run of a server.
    :ivar repeat: how often each side is measured, in turns; the figures are medians.
    :ivar scale: of the work in one run of a micro-benchmark, and of the idle connections.
    """

    seconds: float = 3.0
    repeat: int = 3
    scale: float = 1.0

    def count(self, full: int) -> int:
        """Scale a count; the result is at least one."""
        return max(1, round(full * self.scale))

    def interleave(self, *measures: Callable[[], float]) -> tuple[float, ...]:
        """Measure all in turns, so that other work of the machine affects all of them.

        :return: the median of what each returned.
        """
        rounds = [[measure() for measure in measures] for _ in range(self.repeat)]
        return tuple(map(median, zip(*rounds)))


Benchmark = Callable[[Effort], Sequence[Figure]]


def table(figures: Sequence[Figure], *, markdown: bool) -> str:
    """All figures, one in each line."""
    rows = [figure.cells() for figure in figures]
    if markdown:
        lines = [HEADINGS, ("---",) * len(HEADINGS), *rows]
        return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    widths = [max(map(len, column)) for column in zip(HEADINGS, *rows)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(cells, widths)).rstrip()
        for cells in (HEADINGS, *rows)
    )


def machine() -> str:
    """The machine and the versions, in one line."""
    return ", ".join(
        (
            _cpu_model(),
            f"{len(os.sched_getaffinity(0))} cores",
            f"{platform.system()} {platform.release().partition('-')[0]}",
            f"Python {platform.python_version()}",
            f"SQLite {sqlite3.sqlite_version}",
            f"Twisted {twisted.__version__}",
        )
    )


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return " ".join(value.split())
    return platform.machine()


def _number(value: float) -> str:
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"
