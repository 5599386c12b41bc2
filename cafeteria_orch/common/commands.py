"""How the console commands run, and end by Ctrl-C."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Coroutine
from typing import Any, NoReturn

from twisted.internet.defer import Deferred
from twisted.internet.task import react
from twisted.python.failure import Failure

from .clock import measure_monotonic_time

Command = Callable[[Any, argparse.Namespace], Coroutine[Any, Any, int]]
"""Takes the reactor and the options, and returns the exit status. When the user interrupts the
command, what it awaits is cancelled."""


def run(command: Command, options: argparse.Namespace) -> NoReturn:
    """Run a command in the reactor until it ends; a signal cancels it and waits for its end.

    :raises SystemExit: with its status.
    """
    react(_start, (command, options))


def _start(reactor: Any, command: Command, options: argparse.Namespace) -> Deferred[None]:
    measure_monotonic_time(reactor)
    running = Deferred.fromCoroutine(command(reactor, options))
    finished: Deferred[None] = Deferred()

    def interrupt() -> Deferred[None]:
        running.cancel()
        return finished

    def done(result: int | Failure) -> int | Failure:
        finished.callback(None)
        return result

    reactor.addSystemEventTrigger("before", "shutdown", interrupt)
    return running.addBoth(done).addCallback(sys.exit)
