"""``cafeorch-send``: sends a folder of CSV files to an orchestrator."""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from itertools import groupby
from pathlib import Path
from typing import Any, NoReturn

from twisted.internet.defer import CancelledError
from twisted.internet.endpoints import clientFromString

from cafeteria_orch import __version__
from cafeteria_orch.common.arguments import DEFAULT_CONNECT, endpoint, number
from cafeteria_orch.common.commands import run
from cafeteria_orch.common.progress import showing_progress
from cafeteria_orch.wire.errors import ProtocolError
from cafeteria_orch.wire.framing import DEFAULT_MAX_FRAME_BYTES, FRAMINGS, INT32
from cafeteria_orch.wire.tables import Table

from .delivery import RESTORE_IT, Delivery, GaveUp, PlannedFile, TableExports, Totals
from .exports import Export, ExportError, find_exports
from .journal import FilePlan, Journal, JournalError
from .tls import ClientTLS, TLSError, host_of

STATE_NAME = ".cafeorch-send.state"
"""The state file's name, in the folder that is sent."""

_INTERRUPTED = "interrupted; run it again to send the rest"


async def send_directory(reactor: Any, options: argparse.Namespace) -> int:
    """Check all files of a folder, send what is not acknowledged yet, and report.

    :param options: of :func:`main`.
    :return: the exit status: 0 if everything in the folder is acknowledged.
    """
    started = reactor.seconds()
    exports, errors = find_exports(options.directory)
    if not exports and not errors:
        _say(f"{options.directory}: there is no CSV file in it")
        return 1
    state = getattr(options, "state", None) or options.directory / STATE_NAME
    problems: list[str] = []
    try:
        with closing(Journal(state, options.connect)) as journal:
            tables, rows = _plan(exports, errors, journal, options)
            if not errors and journal.is_finished:
                print(
                    f"All had been acknowledged before. To send everything again, remove {state}."
                )
            elif tables:
                with showing_progress(rows, "acknowledged", _say) as acknowledged:
                    delivery = _delivery(reactor, journal, options, acknowledged)
                    problems = await _deliver(delivery, tables, options)
                _report(delivery.totals, reactor.seconds() - started)
    except JournalError as error:
        problems = [str(error)]
    except KeyboardInterrupt:
        # Until the reactor runs, Python handles the signal.
        problems = [_INTERRUPTED]
    for problem in (*errors, *problems):
        _say(str(problem))
    return 1 if errors or problems else 0


def _delivery(
    reactor: Any,
    journal: Journal,
    options: argparse.Namespace,
    acknowledged: Callable[[int], object],
) -> Delivery:
    server = clientFromString(reactor, options.connect)
    tls: ClientTLS | None = getattr(options, "tls", None)
    return Delivery(
        reactor,
        tls.wrap(server) if tls else server,
        journal,
        framing=FRAMINGS[options.framing],
        window=options.window,
        retry_for=options.retry_for,
        acknowledged=acknowledged,
        say=_say,
        explain=tls.explain if tls else str,
    )


async def _deliver(
    delivery: Delivery, tables: Sequence[TableExports], options: argparse.Namespace
) -> list[str]:
    end: list[str] = []
    try:
        await delivery.send(tables, options.agency_id)
    except CancelledError:
        end = [_INTERRUPTED]
    except GaveUp as error:
        end = [f"{error} Gave up. Run it again when the server at {options.connect} is well."]
    except ProtocolError as error:
        end = [f"the server does not speak this protocol: {error}"]
    except (JournalError, TLSError) as error:
        end = [str(error)]
    return [*delivery.problems, *end]


def _plan(
    exports: Sequence[Export],
    errors: list[ExportError],
    journal: Journal,
    options: argparse.Namespace,
) -> tuple[list[TableExports], int]:
    """Read every file before any of it is sent: no part of a broken one is.

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


def _report(totals: Mapping[Table, Totals], seconds: float) -> None:
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


def _say(line: str) -> None:
    print(f"cafeorch-send: {line}", file=sys.stderr)


def _directory(text: str) -> Path:
    path = Path(text)
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is no folder")
    return path


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cafeorch-send",
        description="Send the CSV files of a folder to an orchestrator. A file belongs to the"
        " table that it or a folder around it is named for (menu_items, stores,"
        " transaction_items, transactions, users); its columns are found by its header."
        " What was acknowledged is remembered: after a stop, run it again, and it sends only the"
        " rest. The exit status is 0 if every row is acknowledged.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("directory", metavar="DIRECTORY", type=_directory, help="folder with the files")
    add(
        "--connect",
        default=DEFAULT_CONNECT,
        type=endpoint,
        help="the orchestrator, as a Twisted endpoint",
    )
    add(
        "--agency-id",
        type=number(int, -(2**31), 2**31 - 1),
        default=1,
        help="number of this agency",
    )
    add(
        "--batch-rows",
        type=number(int, 1, 2**31 - 1),
        default=4000,
        help="maximum number of rows of a batch",
    )
    add(
        "--max-frame-bytes",
        type=number(int, 1, 2**31 - 1),
        default=DEFAULT_MAX_FRAME_BYTES,
        help="maximum length of a frame; the orchestrator has the same option",
    )
    add(
        "--framing",
        choices=list(FRAMINGS),
        default=INT32.name,
        help="how frames look on the wire; an orchestrator recognises it by the first byte",
    )
    add(
        "--window",
        type=number(int, 1, 10_000),
        default=8,
        help="maximum number of unanswered batches",
    )
    add(
        "--state",
        type=Path,
        default=argparse.SUPPRESS,
        help=f"file that keeps what was acknowledged (default: {STATE_NAME} in DIRECTORY)",
    )
    add(
        "--retry-for",
        type=number(float, 0, 10**9),
        default=60.0,
        help="seconds to go on while the server is away or accepts nothing",
    )
    for name, what in (
        ("ca", "connect by TLS; the CAs that may have signed the server's certificate"),
        ("cert", "this client's certificate, where the server wants one"),
        ("key", "its private key (default: in the file of --tls-cert)"),
    ):
        add(f"--tls-{name}", metavar="FILE", type=Path, default=argparse.SUPPRESS, help=what)
    add("--version", action="version", version=f"cafeteria_orch {__version__}")
    return parser


def _tls(options: argparse.Namespace) -> ClientTLS | None:
    ca, cert, key = (getattr(options, f"tls_{name}", None) for name in ("ca", "cert", "key"))
    if cert is None and key is not None:
        raise TLSError("--tls-key is the key of a certificate: name that with --tls-cert")
    if ca is None:
        if cert is not None:
            raise TLSError("--tls-cert is for TLS: name the CA of the server with --tls-ca")
        return None
    hostname = host_of(options.connect)
    if hostname is None:
        raise TLSError(f"--tls-ca wants --connect tcp:HOST:PORT, not {options.connect}")
    return ClientTLS(hostname, ca, cert, key)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command.

    :raises SystemExit: with its status.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        options.tls = _tls(options)
    except TLSError as error:
        parser.error(str(error))
    csv.field_size_limit(options.max_frame_bytes)
    run(send_directory, options)
