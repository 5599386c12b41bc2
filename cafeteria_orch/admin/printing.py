"""What the commands print for people: tables in plain text, and sizes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def print_table(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table: numbers to the right, text to the left, ``-`` for ``None``."""

    def shown(cell: object) -> str:
        text = "-" if cell is None else str(cell)
        # A certificate's name may be anything; a terminal obeys some characters.
        return text if text.isprintable() else ascii(text)

    rows = [*rows]
    cells = [[*map(shown, row)] for row in rows]
    widths = [max(map(len, column)) for column in zip(headings, *cells)]
    is_number = [
        any(isinstance(row[place], int) for row in rows) for place in range(len(headings))
    ]
    for line in (headings, *cells):
        fitted = (
            cell.rjust(width) if to_the_right else cell.ljust(width)
            for cell, width, to_the_right in zip(line, widths, is_number)
        )
        print("  ".join(fitted).rstrip())


def size(number: int) -> str:
    """A number of bytes, as people say it."""
    if number < 1024:
        return f"{number} bytes"
    amount = float(number)
    for unit in ("KiB", "MiB", "GiB"):
        amount /= 1024
        if amount < 1024:
            return f"{amount:.1f} {unit}"
    return f"{amount / 1024:.1f} TiB"
