"""The files of a folder that is watched: which of them nobody writes any more."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from twisted.internet.task import deferLater

from cafeteria_orch.wire.tables import Table

from .exports import Export
from .reading import ExportError
from .stamps import Stamp

INTERVAL = 1.0
"""Seconds between two looks at the folder."""


class Found(NamedTuple):
    """What a folder has.

    :ivar exports: the files that can be sent, by table.
    :ivar errors: one for each file that cannot.
    :ivar unsettled: the tables that have a file which may still be written.
    """

    exports: list[Export]
    errors: list[ExportError]
    unsettled: frozenset[Table] = frozenset()


class FolderWatch:
    """Looks at a folder until there is something new in it.

    A file counts when it has not changed for a while. This is measured from the first look that
    saw it so: no clock of a file system is compared with another.

    :param find: what the folder has at this moment.
    :param settle: seconds that a file must not change.
    """

    def __init__(self, reactor: Any, find: Callable[[], Found], settle: float) -> None:
        self._reactor = reactor
        self._find = find
        self._settle = settle
        self._seen: dict[Path, tuple[Stamp, float]] = {}
        self._last: Any = None

    async def next(self) -> Found:
        """Wait for something that was not there at the last call."""
        while True:
            found = self._look()
            this = [(export.path, self._seen[export.path][0]) for export in found.exports]
            errors = [str(error) for error in found.errors]
            if (this or errors) and (this, errors) != self._last:
                self._last = this, errors
                return found
            await deferLater(self._reactor, INTERVAL)

    def _look(self) -> Found:
        found, now = self._find(), self._reactor.seconds()
        seen: dict[Path, tuple[Stamp, float]] = {}
        settled, unsettled = [], set()
        for export in found.exports:
            try:
                stamp = Stamp.of(export.path)
            except OSError:
                # It is gone already.
                continue
            before, since = self._seen.get(export.path, (None, now))
            seen[export.path] = stamp, since if before == stamp else now
            if now - seen[export.path][1] >= self._settle:
                settled.append(export)
            else:
                unsettled.add(export.table)
        self._seen = seen
        return Found(settled, found.errors, frozenset(unsettled))
