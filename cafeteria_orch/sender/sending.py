"""A run of ``cafeorch-send``: check the files of a folder, send what is left, report."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any

from twisted.internet.defer import CancelledError
from twisted.internet.endpoints import clientFromString

from cafeteria_orch.common.progress import showing_progress
from cafeteria_orch.wire.errors import ProtocolError
from cafeteria_orch.wire.framing import FRAMINGS

from .delivery import Delivery, GaveUp, TableExports
from .exports import find_exports
from .journal import STATE_NAME, Journal, JournalError
from .planning import plan_exports
from .reporting import print_summary, say
from .tls import ClientTLS, TLSError

_INTERRUPTED = "interrupted; run it again to send the rest"


async def send_directory(reactor: Any, options: argparse.Namespace) -> int:
    """Check all files of a folder, send what is not acknowledged yet, and report.

    :param options: of the command.
    :return: the exit status: 0 if everything in the folder is acknowledged.
    """
    started = reactor.seconds()
    exports, errors = find_exports(options.directory)
    if not exports and not errors:
        say(f"{options.directory}: there is no CSV file in it")
        return 1
    state = getattr(options, "state", None) or options.directory / STATE_NAME
    problems: list[str] = []
    try:
        with closing(Journal(state, options.connect)) as journal:
            tables, rows = plan_exports(exports, errors, journal, options)
            if not errors and journal.is_finished:
                print(
                    f"All had been acknowledged before. To send everything again, remove {state}."
                )
            elif tables:
                with showing_progress(rows, "acknowledged", say) as acknowledged:
                    delivery = _delivery(reactor, journal, options, acknowledged)
                    problems = await _deliver(delivery, tables, options)
                print_summary(delivery.totals, reactor.seconds() - started)
    except JournalError as error:
        problems = [str(error)]
    except KeyboardInterrupt:
        # Until the reactor runs, Python handles the signal.
        problems = [_INTERRUPTED]
    for problem in (*errors, *problems):
        say(str(problem))
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
        say=say,
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
