"""The file of ``--rejects``: rows that cannot be sent, and why."""

from __future__ import annotations

import csv
import os
from pathlib import Path

from .reading import BadRow

COLUMNS = ("file", "line", "reason", "row")


class RejectsError(Exception):
    """A file that cannot be written. Its text names the reason and the remedy."""


class Rejects:
    """A CSV file that gets the bad rows, at its end.

    :param path: the file; it is created if it is missing.
    :raises RejectsError: if it cannot be written.
    :ivar amount: how many rows it got.
    """

    def __init__(self, path: Path) -> None:
        self.amount = 0
        self.path = path
        try:
            # What is not UTF-8 is written as it came.
            self._file = path.open("a", encoding="utf-8", errors="surrogateescape", newline="")
            self._writer = csv.writer(self._file)
            if not self._file.tell():
                self._writer.writerow(COLUMNS)
                self.flush()
        except OSError as error:
            raise self._error(error) from error

    def add(self, file: Path, row: BadRow) -> None:
        """Write a row."""
        text = row.text.decode("utf-8", "surrogateescape")
        try:
            self._writer.writerow((file, row.line, row.what, text.rstrip("\r\n")))
        except OSError as error:
            raise self._error(error) from error
        self.amount += 1

    def flush(self) -> None:
        """Have on disk what was written."""
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._error(error) from error

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _error(self, error: OSError) -> RejectsError:
        return RejectsError(f"--rejects {self.path}: {error.strerror}: name another file")
