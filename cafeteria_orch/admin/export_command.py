"""``cafeorch store export``: what is new in a store, as files for other programs."""

from __future__ import annotations

import argparse
import json
from contextlib import closing
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

from cafeteria_orch.common.arguments import BadArgument, number
from cafeteria_orch.common.progress import showing_progress
from cafeteria_orch.wire.tables import TABLES

from .connections import Connection
from .export_folder import ExportFolder
from .export_formats import FORMATS, PRECISION, SCALE, check_format
from .exporting import Export, Wanted
from .reading import open_connection
from .running import Say, add_command

_DESCRIPTION = """
Write what is new in a store since the last export into DIR: files by table, agency and day (on
which the batches came, UTC), such as
transactions/agency=7/day=2024-01-31/batches-1-240.parquet. The cells have the meanings of the
typed views. Run it again for what has come since, or after an interruption: every batch is in one
file. A server may run meanwhile.
"""


def add_to(commands: Any) -> None:
    """Add the command to those of a parser.

    :param commands: what ``add_subparsers`` has returned.
    """
    parser = add_command(
        commands, "export", run, "write what is new into files for other programs", _DESCRIPTION
    )
    parser.add_argument(
        "folder", metavar="DIR", type=Path, help="takes the files; is made if it is missing"
    )
    parser.add_argument(
        "--format",
        choices=[*FORMATS],
        required=True,
        help="of the files; parquet needs the extra export",
    )
    parser.add_argument(
        "--table",
        action="append",
        dest="tables",
        choices=[table.name for table in TABLES],
        help="export this table alone; may be repeated",
    )
    parser.add_argument(
        "--agency", metavar="N", type=number(int, -(2**31), 2**31 - 1), help="this agency alone"
    )
    parser.add_argument(
        "--day",
        metavar="YYYY-MM-DD",
        type=_day,
        help="what came on this day alone (UTC)",
    )
    parser.add_argument(
        "--unfinished",
        action="store_true",
        help="also batches whose client has not said its agency and may still do so: there it"
        " stays NULL for ever",
    )


def _day(text: str) -> str:
    try:
        if date.fromisoformat(text).isoformat() == text:
            return text
    except ValueError:
        pass
    raise BadArgument(f"{text!r} is not a day such as 2024-01-31")


def run(options: argparse.Namespace, say: Say) -> int:
    """Export what is new.

    :return: the exit status.
    """
    check_format(options.format)
    connection, _ = open_connection(options.store, read_only=True)
    with closing(connection), closing(ExportFolder(options.folder)) as folder:
        export = _export(connection, folder, options)
        with showing_progress(export.rows, "exported", say) as exported:
            export.run(exported)
    report = export.report
    if report.numbers_left_out:
        say(
            f"{report.numbers_left_out} numbers have more digits than"
            f" DECIMAL({PRECISION}, {SCALE}) holds, and are NULL: export them with --format csv"
        )
    if options.json:
        result = {"store": connection.name, "directory": str(options.folder), **asdict(report)}
        print(json.dumps(result, indent=2))
        return 0
    for name, written in report.tables.items():
        print(f"{name}: {written.batches} batches, {written.rows} rows, {written.files} files")
    if not report.tables:
        print("Nothing is new.")
    if report.waiting:
        print(
            f"{report.waiting} batches wait until their clients have said their agency;"
            " --unfinished exports them without one."
        )
    return 0


def _export(connection: Connection, folder: ExportFolder, options: argparse.Namespace) -> Export:
    tables = tuple(table for table in TABLES if table.name in (options.tables or [table.name]))
    wanted = Wanted(tables, options.agency, options.day, options.unfinished)
    return Export(connection, folder, options.format, wanted)
