"""A run of ``cafeorch-send``: check the files of a folder, send what is left, report."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from math import inf
from pathlib import Path
from typing import Any, NamedTuple

from twisted.internet.defer import CancelledError
from twisted.internet.endpoints import clientFromString

from cafeteria_orch.wire.errors import ProtocolError
from cafeteria_orch.wire.framing import FRAMINGS
from cafeteria_orch.wire.tables import Table

from .client import AgencyRefused
from .delivery import Delivery, GaveUp, StoreRestored, Totals
from .finding import find_exports
from .journal import STATE_NAME, Journal, JournalError
from .planning import Planner
from .plans import TableExports
from .probing import TLSProbe
from .reading import ExportError
from .rejects import Rejects, RejectsError
from .reporting import Report, planned_totals
from .tls import TLSError
from .watching import FolderWatch, Found

INTERRUPTED = 130
"""The exit status after Ctrl-C."""

_INTERRUPTED = "interrupted; run it again to send the rest"


async def send_directory(reactor: Any, options: argparse.Namespace) -> int:
    """Check all files of a folder, send what is not acknowledged yet, and report.

    :param options: of the command.
    :return: the exit status: 0 if everything in the folder is acknowledged.
    """
    report = Report(options.prog, is_quiet=options.quiet, is_json=options.json)

    def find() -> Found:
        return Found(*find_exports(options.directory, options.rejects))

    found = find()
    if not (found.exports or found.errors or options.watch):
        report.complain(f"{options.directory}: there is no CSV file in it")
        return 1
    try:
        with (
            closing(Journal(state_of(options), is_rehearsal=options.dry_run)) as journal,
            _opened(options) as rejects,
        ):
            journal.check_agency(options.agency_id)
            sender = _Sender(reactor, options, journal, rejects, report)
            if not options.watch:
                return (await sender.send(found)).status
            report.remark(
                f"watching {options.directory}: a file is sent when it has not changed for"
                f" {options.settle:g} s; Ctrl-C ends it"
            )
            return await _watch(sender, FolderWatch(reactor, find, options.settle))
    except (JournalError, RejectsError) as error:
        report.complain(str(error))
        return 1
    except KeyboardInterrupt:
        # Until the reactor runs, Python handles the signal.
        report.complain(_INTERRUPTED)
        return INTERRUPTED


async def _watch(sender: _Sender, folder: FolderWatch) -> int:
    """Send what is there, and what comes, until the user or an error ends it."""
    while True:
        try:
            found = await folder.next()
        except CancelledError:
            return INTERRUPTED
        end = await sender.send(found)
        if end.is_last:
            return end.status


def state_of(options: argparse.Namespace) -> Path:
    """The path of the state file."""
    path: Path = options.state or options.directory / STATE_NAME
    return path


@contextmanager
def _opened(options: argparse.Namespace) -> Iterator[Rejects | None]:
    if options.rejects is None or options.dry_run:
        yield None
        return
    with closing(Rejects(options.rejects)) as rejects:
        yield rejects


class _End(NamedTuple):
    """How a round has ended.

    :ivar problems: a line for each.
    :ivar status: the exit status, if it is the last round.
    :ivar is_last: whether another round would be in vain.
    """

    problems: list[str]
    status: int
    is_last: bool

    @classmethod
    def because(cls, *problems: str, is_last: bool = False) -> _End:
        return cls([*problems], 1 if problems else 0, is_last)


class _Sender:
    """Sends what a folder has; with ``--watch``, round after round."""

    def __init__(
        self,
        reactor: Any,
        options: argparse.Namespace,
        journal: Journal,
        rejects: Rejects | None,
        report: Report,
    ) -> None:
        self._reactor = reactor
        self._options = options
        self._journal = journal
        self._report = report
        self._planner = Planner(reactor, journal, options, rejects)
        self._server = clientFromString(reactor, options.connect)
        self._probe = TLSProbe(reactor, self._server, options.connect)
        self._complaints: list[str] = []

    async def send(self, found: Found) -> _End:
        """Check the files, send what is not acknowledged, and report."""
        options, started = self._options, self._reactor.seconds()
        errors: list[ExportError] = []
        totals: dict[Table, Totals] = {}
        self._planner.rejected = 0
        try:
            end = await self._send(found, errors, totals)
        except CancelledError:
            end = _End([_INTERRUPTED], INTERRUPTED, is_last=True)
        except (JournalError, RejectsError) as error:
            end = _End.because(str(error), is_last=True)
        problems = [*map(str, errors), *self._rejected(), *end.problems]
        is_new = any(part.batches for part in totals.values())
        complete = not problems
        if options.json or options.dry_run or is_new or problems:
            if totals or options.json:
                self._report.summarize(
                    totals,
                    "to be sent" if options.dry_run else "acknowledged",
                    self._reactor.seconds() - started,
                    agency_id=options.agency_id,
                    server=options.connect,
                    store=str(self._journal.store_id) if self._journal.store_id else None,
                    complete=complete and not options.dry_run,
                    rejected=self._planner.rejected,
                    problems=problems,
                )
        else:
            self._report.print_line(
                "All had been acknowledged before. To send everything again, remove"
                f" {state_of(options)}."
            )
        for problem in problems:
            if problem not in self._complaints:
                self._report.complain(problem)
        self._complaints = problems
        return end._replace(status=end.status or int(not complete))

    async def _send(
        self, found: Found, errors: list[ExportError], totals: dict[Table, Totals]
    ) -> _End:
        sends_again = False
        while True:
            errors[:] = found.errors
            with self._report.checking(self._planner.bytes_to_check(found.exports)) as checked:
                tables = await self._planner.plan(found.exports, errors, checked)
            for exports in tables:
                exports.whole = exports.whole and exports.table not in found.unsettled
            if self._options.dry_run:
                totals.update(planned_totals(tables))
                return _End.because()
            if not tables:
                return _End.because()
            try:
                with self._report.sending(tables) as acknowledged:
                    delivery = self._delivery(acknowledged, totals, sends_again=sends_again)
                    return await self._deliver(delivery, tables)
            except StoreRestored as restored:
                sends_again = True
                self._report.remark(str(restored))

    def _delivery(
        self,
        acknowledged: Callable[[int], object],
        totals: dict[Table, Totals],
        *,
        sends_again: bool,
    ) -> Delivery:
        options, tls = self._options, self._options.tls
        return Delivery(
            self._reactor,
            tls.wrap(self._server) if tls else self._server,
            options.connect,
            self._journal,
            totals,
            framing=FRAMINGS[options.framing],
            window=options.window,
            retry_for=inf if options.watch else options.retry_for,
            sends_again=sends_again,
            acknowledged=acknowledged,
            say=self._report.remark,
            explain=tls.explain if tls else str,
            probe=None if tls else self._probe.probe,
        )

    async def _deliver(self, delivery: Delivery, tables: Sequence[TableExports]) -> _End:
        options = self._options
        end = _End.because()
        try:
            await delivery.send(tables, options.agency_id)
        except CancelledError:
            end = _End([_INTERRUPTED], INTERRUPTED, is_last=True)
        except GaveUp as error:
            what = f"{error} Gave up. Run it again when the server at {options.connect} is well."
            end = _End.because(what, is_last=True)
        except AgencyRefused:
            what = (
                f"the server at {options.connect} refuses agency {options.agency_id}: the"
                " certificate of --tls-cert is of another one. Run it again with that one's"
                " --agency-id, or when --agencies of the server is corrected; no batch is sent"
                " again"
            )
            end = _End.because(what, is_last=True)
        except ProtocolError as error:
            what = f"the server does not speak this protocol: {error}"
            end = _End.because(what, is_last=True)
        except (JournalError, TLSError) as error:
            end = _End.because(str(error), is_last=True)
        problems = [*delivery.problems, *end.problems]
        return end._replace(problems=problems, status=end.status or int(bool(problems)))

    def _rejected(self) -> list[str]:
        rejected, options = self._planner.rejected, self._options
        if not rejected:
            return []
        rows = "1 row" if rejected == 1 else f"{rejected} rows"
        if options.dry_run:
            return [f"{rows} cannot be sent, and would be written to {options.rejects}"]
        return [f"{rows} cannot be sent: see {options.rejects}"]
