"""What ``cafeorch-send`` tells its user."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, astuple
from typing import Any

from cafeteria_orch.common.progress import showing_progress
from cafeteria_orch.wire.tables import Table

from .delivery import Totals
from .plans import TableExports

_CHECK_DELAY = 1.0
"""Seconds in which no progress of the check of the files is shown."""


class Report:
    """Prints the remarks and the summary of a run, as its options have it.

    :param prog: the command, for the beginning of each line.
    :param is_quiet: prints problems only; a JSON object too, if there is to be one.
    :param is_json: prints the summary as a JSON object.
    """

    def __init__(self, prog: str, *, is_quiet: bool, is_json: bool) -> None:
        self._prog = prog
        self._is_quiet = is_quiet
        self._is_json = is_json

    def complain(self, line: str) -> None:
        """Print a problem."""
        print(f"{self._prog}: {line}", file=sys.stderr)

    def remark(self, line: str) -> None:
        """Print a line that a user may do without."""
        if not self._is_quiet:
            self.complain(line)

    @contextmanager
    def checking(self, total: int) -> Iterator[Callable[[int], object]]:
        """Show how many bytes of the files are checked, if it takes long."""
        with self._progress(total, "checked", unit="byte", delay=_CHECK_DELAY) as checked:
            yield checked

    @contextmanager
    def sending(self, tables: Sequence[TableExports]) -> Iterator[Callable[[int], object]]:
        """Show how many rows are acknowledged."""
        rows = sum(file.rows_left for exports in tables for file in exports.files)
        with self._progress(rows, "acknowledged") as acknowledged:
            yield acknowledged

    @contextmanager
    def _progress(self, total: int, what: str, **how: Any) -> Iterator[Callable[[int], object]]:
        if self._is_quiet:
            yield lambda _: None
            return
        with showing_progress(total, what, self.remark, **how) as update:
            yield update

    def print_line(self, line: str) -> None:
        """Print a line instead of a summary."""
        if not self._is_quiet and not self._is_json:
            print(line)

    def summarize(
        self, totals: Mapping[Table, Totals], what: str, seconds: float, **more: object
    ) -> None:
        """Print what was acknowledged, or would be sent, by table and in all.

        :param what: the heading of the sums.
        :param more: what the JSON object has beside it.
        """
        whole = Totals(*map(sum, zip(*map(astuple, totals.values()))))
        if self._is_json:
            tables = {table.name: asdict(part) for table, part in totals.items()}
            summary = {**more, what.replace(" ", "_"): asdict(whole), "tables": tables}
            print(json.dumps({**summary, "seconds": round(seconds, 3)}), flush=True)
        elif not self._is_quiet:
            print(f"{'table':18}{'files':>7}{'rows':>12}{'batches':>10}{'bytes':>16}")
            for table, part in totals.items():
                print(_line(table.name, part))
            print(_line(what, whole), f"in {seconds:.1f} s", flush=True)
            if whole.earlier:
                print(f"{whole.earlier} more batches had been acknowledged before.", flush=True)


def planned_totals(tables: Sequence[TableExports]) -> dict[Table, Totals]:
    """What would be sent, by table."""
    totals = {}
    for exports in tables:
        left = Totals(files=len(exports.files))
        for file in exports.files:
            left.earlier += len(file.plan.acknowledged)
            left.batches += file.plan.batches - len(file.plan.acknowledged)
            left.rows += file.rows_left
            left.bytes += file.bytes_left
        totals[exports.table] = left
    return totals


def _line(name: str, totals: Totals) -> str:
    figures = f"{totals.files:>7}{totals.rows:>12}{totals.batches:>10}{totals.bytes:>16}"
    return f"{name:18}{figures}"
