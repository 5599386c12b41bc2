"""What is to be sent: every file is checked, and cut into batches, before any of it is sent."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import groupby
from typing import Any

from twisted.internet.task import deferLater

from .exports import Contents, Cut, Export
from .journal import Journal
from .plans import RESTORE_IT, FilePlan, PlannedFile, TableExports
from .reading import BadRow, ExportError, Reject
from .rejects import Rejects
from .stamps import Stamp

_TURN = 0.05
"""Seconds after which the reactor has a turn, for Ctrl-C, while files are checked."""


class Planner:
    """Reads every file before any of it is sent: no part of a broken one is.

    :param rejects: gets the rows that cannot be sent; if it is ``None``, a file with one is not
        sent, or ``options`` say that this is a dry run.
    :ivar rejected: how many rows of new files cannot be sent.
    """

    def __init__(
        self,
        reactor: Any,
        journal: Journal,
        options: argparse.Namespace,
        rejects: Rejects | None,
    ) -> None:
        self.rejected = 0
        self._reactor = reactor
        self._journal = journal
        self._options = options
        self._rejects = rejects

    def bytes_to_check(self, exports: Sequence[Export]) -> int:
        """How much :meth:`plan` has to read."""
        size = 0
        for export in exports:
            # What has just vanished is named when its turn comes.
            with suppress(OSError):
                size += 0 if self._known(export) else export.path.stat().st_size
        return size

    async def plan(
        self,
        exports: Sequence[Export],
        errors: list[ExportError],
        checked: Callable[[int], object],
    ) -> list[TableExports]:
        """Check the files that are new, or have changed.

        :param errors: gets one for each file that cannot be sent.
        :param checked: called with the number of bytes that were read.
        """
        names = {self._name(export) for export in exports}
        tables = []
        for table, files in groupby(exports, lambda export: export.table):
            planned, whole = [], True
            for export in files:
                try:
                    planned.append(await self._plan_file(export, names, checked))
                except ExportError as error:
                    errors.append(error)
                    whole = False
                except OSError as error:
                    errors.append(ExportError(export.path, None, str(error.strerror)))
                    whole = False
            if planned:
                tables.append(TableExports(table, planned, whole))
        return tables

    async def _plan_file(
        self, export: Export, names: set[str], checked: Callable[[int], object]
    ) -> PlannedFile:
        known = self._known(export)
        if known is not None:
            return known
        name, stamp = self._name(export), Stamp.of(export.path)
        is_settled = stamp.is_settled
        plan = self._journal.plans.get(name) or self._renamed(export, names)
        cut = plan.cut if plan else self._new_cut(export)
        try:
            steps = export.check(cut, None if plan else self._reject(export))
            contents = await self._exhaust(steps, checked)
        except ExportError as error:
            if plan is None:
                raise
            # When it was planned it had no fault.
            raise _changed_since(export, plan) from error
        if plan is None:
            if self._rejects is not None:
                self._rejects.flush()
            plan = self._journal.add_plan(name, export.table, cut, contents)
        elif (plan.digest, plan.batches) != (contents.digest, len(contents.rows)):
            raise _changed_since(export, plan)
        if is_settled:
            self._journal.note_check(plan, contents, stamp)
        return PlannedFile(export, plan, contents)

    def _known(self, export: Export) -> PlannedFile | None:
        """A file that was checked in an earlier run, and has not changed since."""
        plan = self._journal.plans.get(self._name(export))
        if plan is None or plan.checked is None:
            return None
        stamp, contents = plan.checked
        return PlannedFile(export, plan, contents) if stamp == Stamp.of(export.path) else None

    def _renamed(self, export: Export, names: set[str]) -> FilePlan | None:
        """The plan of a file that had another name, if it has the same bytes."""
        gone = {
            plan.digest: plan
            for plan in self._journal.plans.values()
            if plan.table == export.table.name and plan.file not in names
        }
        plan = gone.get(export.digest()) if gone else None
        if plan is not None:
            self._journal.rename(plan, self._name(export))
        return plan

    def _new_cut(self, export: Export) -> Cut:
        options = self._options
        first = self._journal.next_number(export.table)
        skips_bad_rows = options.rejects is not None
        return Cut(first, options.batch_rows, options.max_frame_bytes, skips_bad_rows)

    def _reject(self, export: Export) -> Reject:
        def reject(row: BadRow) -> None:
            self.rejected += 1
            if self._rejects is not None:
                self._rejects.add(export.path, row)

        return reject

    async def _exhaust(self, steps: Any, checked: Callable[[int], object]) -> Contents:
        position, began = 0, self._reactor.seconds()
        while True:
            try:
                read = next(steps)
            except StopIteration as end:
                contents: Contents = end.value
                return contents
            checked(read - position)
            position = read
            if self._reactor.seconds() - began > _TURN:
                await deferLater(self._reactor, 0)
                began = self._reactor.seconds()

    def _name(self, export: Export) -> str:
        return export.path.relative_to(self._options.directory).as_posix()


def _changed_since(export: Export, plan: FilePlan) -> ExportError:
    batches = f"{len(plan.acknowledged)} of its {plan.batches} batches"
    what = f"it has changed since {batches} were acknowledged: {RESTORE_IT}"
    return ExportError(export.path, None, what)
