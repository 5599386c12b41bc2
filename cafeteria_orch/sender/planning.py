"""What is to be sent: every file is checked, and cut into batches, before any of it is sent."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import groupby

from .delivery import RESTORE_IT, PlannedFile, TableExports
from .exports import Export, ExportError
from .journal import FilePlan, Journal


def plan_exports(
    exports: Sequence[Export],
    errors: list[ExportError],
    journal: Journal,
    options: argparse.Namespace,
) -> tuple[list[TableExports], int]:
    """Read every file before any of it is sent: no part of a broken one is.

    :param errors: gets one for each file that cannot be sent.
    :param options: of the command.
    :return: what to send, and how many of its rows are not acknowledged yet.
    """
    tables, rows = [], 0
    for table, files in groupby(exports, lambda export: export.table):
        planned, whole = [], True
        for export in files:
            try:
                file = _plan_file(export, journal, options)
            except ExportError as error:
                errors.append(error)
                whole = False
            except OSError as error:
                errors.append(ExportError(export.path, None, str(error.strerror)))
                whole = False
            else:
                planned.append(file)
                rows += file.rows_left
        if planned:
            tables.append(TableExports(table, planned, whole))
    return tables, rows


def _plan_file(export: Export, journal: Journal, options: argparse.Namespace) -> PlannedFile:
    name = export.path.relative_to(options.directory).as_posix()
    plan = journal.plans.get(name)
    first = plan.first if plan else journal.next_number(export.table)
    batch_rows = plan.batch_rows if plan else options.batch_rows
    max_frame_bytes = plan.max_frame_bytes if plan else options.max_frame_bytes
    try:
        contents = export.check(first, batch_rows, max_frame_bytes)
    except ExportError as error:
        if plan is None:
            raise
        # When it was planned it had no fault.
        raise _changed_since(export, plan) from error
    if plan is None:
        plan = journal.add_plan(
            name,
            export.table,
            digest=contents.digest,
            batches=len(contents.rows),
            batch_rows=batch_rows,
            max_frame_bytes=max_frame_bytes,
        )
    elif (plan.digest, plan.batches) != (contents.digest, len(contents.rows)):
        raise _changed_since(export, plan)
    return PlannedFile(export, plan, contents)


def _changed_since(export: Export, plan: FilePlan) -> ExportError:
    batches = f"{len(plan.acknowledged)} of its {plan.batches} batches"
    what = f"it has changed since {batches} were acknowledged: {RESTORE_IT}"
    return ExportError(export.path, None, what)
