"""``cafeorch-send``: a folder of CSV files to an orchestrator."""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import Any, NoReturn

from twisted.internet.defer import CancelledError, Deferred, DeferredSemaphore
from twisted.internet.endpoints import clientFromString, connectProtocol
from twisted.internet.error import (
    ConnectError,
    ConnectingCancelledError,
    ConnectionClosed,
    DNSLookupError,
)
from twisted.internet.interfaces import IStreamClientEndpoint
from twisted.internet.task import react
from twisted.python.failure import Failure

from . import __version__
from .client import Answer, OrchestratorClient
from .errors import ProtocolError
from .exports import Batch, Export, ExportError, find_exports
from .framing import DEFAULT_MAX_FRAME_BYTES
from .messages import BatchRecvFail, BatchRecvSuccess
from .opcodes import FailReason
from .tables import Table

_REASONS: dict[int | None, str] = {
    FailReason.TRY_AGAIN: "the server cannot take it now, send it again later",
    FailReason.REJECTED: "the server rejects it",
    FailReason.MALFORMED: "the server finds it malformed",
}


@dataclass
class Totals:
    """What has been acknowledged of a table."""

    files: int = 0
    rows: int = 0
    batches: int = 0
    bytes: int = 0


class Sender:
    """Sends files by one connection, a few batches ahead of their answers.

    :param client: the connection.
    :param window: how many batches may be on their way at once.
    :param batch_rows: most rows of a batch.
    :param max_frame_bytes: longest payload.
    :param acknowledged: called with the number of rows of each batch that was acknowledged.
    :ivar totals: what was acknowledged, by table.
    :ivar problems: what was not, a line each.
    :ivar unanswered: how many batches are on their way.
    """

    def __init__(
        self,
        client: OrchestratorClient,
        *,
        window: int,
        batch_rows: int,
        max_frame_bytes: int,
        acknowledged: Callable[[int], object],
    ) -> None:
        self.totals: dict[Table, Totals] = {}
        self.problems: list[str] = []
        self._client = client
        self._window_size = window
        self._window = DeferredSemaphore(window)
        self._batch_rows = batch_rows
        self._max_frame_bytes = max_frame_bytes
        self._acknowledged = acknowledged
        self._lost: Failure | None = None
        self.unanswered = 0

    async def send_table(self, table: Table, exports: Sequence[Export], *, whole: bool) -> None:
        """Send the files of a table, and that it ends there if all of it was acknowledged.

        :param whole: whether these files are all there are.
        :raises ConnectionClosed: if the connection ended before all was answered.
        """
        totals = self.totals[table] = Totals()
        problems = len(self.problems)
        number = 1
        for export in exports:
            totals.files += 1
            try:
                for batch in export.batches(number, self._batch_rows, self._max_frame_bytes):
                    await self._send(batch, export, totals)
                    number += 1
            except (ExportError, OSError) as error:
                self.problems.append(str(error))
        await self._all_answered()
        if whole and len(self.problems) == problems:
            answer = await self._client.send_eof(table)
            self._note_refusal(f"the end of {table.name}", answer)

    async def _send(self, batch: Batch, export: Export, totals: Totals) -> None:
        await self._window.acquire()
        if self._lost is not None:
            self._window.release()
            self._lost.raiseException()

        def answered(answer: Answer) -> None:
            self.unanswered -= 1
            lines = f"lines {batch.first_line} to {batch.last_line}"
            if self._note_refusal(f"{export.path}, {lines}", answer):
                return
            totals.rows += batch.amount
            totals.batches += 1
            totals.bytes += len(batch.payload)
            self._acknowledged(batch.amount)

        def lost(failure: Failure) -> None:
            self._lost = failure

        self.unanswered += 1
        sent = self._client.send_payload(batch.payload)
        sent.addCallback(answered).addErrback(lost).addBoth(lambda _: self._window.release())

    async def _all_answered(self) -> None:
        for _ in range(self._window_size):
            await self._window.acquire()
        for _ in range(self._window_size):
            self._window.release()
        if self._lost is not None:
            self._lost.raiseException()

    def _note_refusal(self, what: str, answer: Answer) -> bool:
        if isinstance(answer, BatchRecvSuccess):
            return False
        reason = answer.reason if isinstance(answer, BatchRecvFail) else None
        text = _REASONS.get(reason, "the server does not accept it")
        self.problems.append(f"{what}: {text}")
        return True


async def send_directory(reactor: Any, options: argparse.Namespace) -> int:
    """Check all files of a folder, send those that are right, and report.

    :param options: of :func:`main`.
    :return: the exit status: 0 if all that is in the folder was acknowledged.
    """
    started = reactor.seconds()
    exports, errors = find_exports(options.directory)
    if not exports and not errors:
        _say(f"{options.directory}: there is no CSV file in it")
        return 1
    good, rows = _check(exports, options, errors)
    for error in errors:
        _say(str(error))
    if not good:
        return 1
    try:
        client = await connectProtocol(options.connect(reactor), OrchestratorClient())
    except ConnectingCancelledError:
        _say("interrupted")
        return 1
    except (ConnectError, DNSLookupError) as error:
        _say(f"{error} Is the server running? --connect says where.")
        return 1
    with _progress(rows) as acknowledged:
        sender = Sender(
            client,
            window=options.window,
            batch_rows=options.batch_rows,
            max_frame_bytes=options.max_frame_bytes,
            acknowledged=acknowledged,
        )
        await _send_all(sender, client, good, exports, options)
    _report(sender.totals, reactor.seconds() - started)
    for problem in sender.problems:
        _say(problem)
    return 1 if errors or sender.problems else 0


def _check(
    exports: Sequence[Export], options: argparse.Namespace, errors: list[ExportError]
) -> tuple[list[Export], int]:
    """Read every file through before any of it is sent: a broken one is not sent in part."""
    good, rows = [], 0
    for export in exports:
        try:
            batches = export.batches(1, options.batch_rows, options.max_frame_bytes)
            rows += sum(batch.amount for batch in batches)
        except ExportError as error:
            errors.append(error)
        except OSError as error:
            errors.append(ExportError(export.path, None, str(error.strerror)))
        else:
            good.append(export)
    return good, rows


async def _send_all(
    sender: Sender,
    client: OrchestratorClient,
    good: Sequence[Export],
    exports: Sequence[Export],
    options: argparse.Namespace,
) -> None:
    incomplete = {export.table for export in exports if export not in good}
    try:
        for table, files in groupby(good, lambda export: export.table):
            await sender.send_table(table, list(files), whole=table not in incomplete)
        await client.finish(options.agency_id)
    except CancelledError:
        sender.problems.append(f"interrupted; {sender.unanswered} batches were unanswered")
    except (ConnectionClosed, ProtocolError) as error:
        sender.problems.append(f"{error} Not all was sent; see the server's log for why.")


class _PlainProgress:
    """Says in lines how far it is, where there is no terminal or no tqdm."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._done = 0

    def update(self, rows: int) -> None:
        """So many rows more are done: a line at every tenth."""
        tenth = self._done * 10 // max(1, self._total)
        self._done += rows
        if self._done * 10 // max(1, self._total) > tenth:
            _say(f"{self._done} of {self._total} rows acknowledged")


@contextmanager
def _progress(rows: int) -> Iterator[Callable[[int], object]]:
    if not (sys.stderr.isatty() and find_spec("tqdm")):
        yield _PlainProgress(rows).update
        return
    from tqdm import tqdm  # noqa: PLC0415 (of the extra "cli")

    with tqdm(total=rows, unit="row", unit_scale=True) as bar:
        yield bar.update


def _report(totals: Mapping[Table, Totals], seconds: float) -> None:
    print(f"{'table':18}{'files':>7}{'rows':>12}{'batches':>10}{'bytes':>16}")
    whole = Totals()
    for table, part in totals.items():
        print(_line(table.name, part))
        whole.files += part.files
        whole.rows += part.rows
        whole.batches += part.batches
        whole.bytes += part.bytes
    print(_line("acknowledged", whole), f"in {seconds:.1f} s")


def _line(name: str, totals: Totals) -> str:
    figures = f"{totals.files:>7}{totals.rows:>12}{totals.batches:>10}{totals.bytes:>16}"
    return f"{name:18}{figures}"


def _say(line: str) -> None:
    print(f"cafeorch-send: {line}", file=sys.stderr)


def _from(kind: Callable[[str], Any], least: float, most: float) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        value = kind(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text} is not from {least} to {most}")
        return value

    parse.__name__ = kind.__name__
    return parse


def _directory(text: str) -> Path:
    path = Path(text)
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is no folder")
    return path


def _endpoint(text: str) -> Callable[[Any], IStreamClientEndpoint]:
    def of(reactor: Any) -> IStreamClientEndpoint:
        endpoint: IStreamClientEndpoint = clientFromString(reactor, text)
        return endpoint

    try:
        of(None)
    except Exception as error:
        raise argparse.ArgumentTypeError(f"{text}: {error}") from error
    return of


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cafeorch-send",
        description="Send the CSV files of a folder to an orchestrator. A file belongs to the"
        " table that it or a folder around it is named for (menu_items, stores,"
        " transaction_items, transactions, users); its columns are found by its header."
        " The exit status is 0 if every row was acknowledged.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("directory", metavar="DIRECTORY", type=_directory, help="where the files are")
    add(
        "--connect",
        default="tcp:127.0.0.1:8080",
        type=_endpoint,
        help="the orchestrator, as a Twisted endpoint",
    )
    add(
        "--agency-id",
        type=_from(int, -(2**31), 2**31 - 1),
        default=1,
        help="the number of this agency",
    )
    add("--batch-rows", type=_from(int, 1, 2**31 - 1), default=4000, help="most rows of a batch")
    add(
        "--max-frame-bytes",
        type=_from(int, 1, 2**31 - 1),
        default=DEFAULT_MAX_FRAME_BYTES,
        help="longest frame; what the orchestrator has under this name",
    )
    add(
        "--window",
        type=_from(int, 1, 10_000),
        default=8,
        help="how many batches may be on their way at once",
    )
    add("--version", action="version", version=f"cafeteria_orch {__version__}")
    return parser


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command.

    :raises SystemExit: with its status.
    """
    options = _parser().parse_args(arguments)
    csv.field_size_limit(options.max_frame_bytes)
    react(_run, (options,))


def _run(reactor: Any, options: argparse.Namespace) -> Deferred[None]:
    sending = Deferred.fromCoroutine(send_directory(reactor, options))
    reactor.addSystemEventTrigger("before", "shutdown", sending.cancel)
    return sending.addCallback(sys.exit)
