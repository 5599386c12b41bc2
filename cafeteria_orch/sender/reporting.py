"""What ``cafeorch-send`` tells its user."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from cafeteria_orch.wire.tables import Table

from .delivery import Totals


def say(line: str) -> None:
    """Print a line about the run, on standard error."""
    print(f"cafeorch-send: {line}", file=sys.stderr)


def print_summary(totals: Mapping[Table, Totals], seconds: float) -> None:
    """Print what was acknowledged, by table and in all."""
    print(f"{'table':18}{'files':>7}{'rows':>12}{'batches':>10}{'bytes':>16}")
    whole = Totals()
    for table, part in totals.items():
        print(_line(table.name, part))
        whole.files += part.files
        whole.rows += part.rows
        whole.batches += part.batches
        whole.bytes += part.bytes
        whole.earlier += part.earlier
    print(_line("acknowledged", whole), f"in {seconds:.1f} s")
    if whole.earlier:
        print(f"{whole.earlier} more batches had been acknowledged before.")


def _line(name: str, totals: Totals) -> str:
    figures = f"{totals.files:>7}{totals.rows:>12}{totals.batches:>10}{totals.bytes:>16}"
    return f"{name:18}{figures}"
