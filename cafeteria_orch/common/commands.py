"""What the console commands share: values on a command line, and an end by Ctrl-C."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Coroutine
from typing import Any, NoReturn

from twisted.internet.defer import Deferred
from twisted.internet.endpoints import clientFromString
from twisted.internet.task import react
from twisted.python.failure import Failure

from .clock import measure_monotonic_time

DEFAULT_CONNECT = "tcp:127.0.0.1:8080"
"""Where an orchestrator listens that was told nothing else."""

Command = Callable[[Any, argparse.Namespace], Coroutine[Any, Any, int]]
"""From the reactor and the options to the exit status. What is awaited when the user
interrupts it is cancelled."""


def number(kind: Callable[[str], Any], least: float, most: float) -> Callable[[str], Any]:
    """An argparse type: a number within bounds.

    :param kind: ``int`` or ``float``.
    """

    def parse(text: str) -> Any:
        value = kind(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text} is not from {least} to {most}")
        return value

    parse.__name__ = kind.__name__
    return parse


def endpoint(text: str) -> str:
    """An argparse type: the description of a Twisted client endpoint."""
    try:
        clientFromString(None, text)
    except Exception as error:
        raise argparse.ArgumentTypeError(f"{text}: {error}") from error
    return text


def run(command: Command, options: argparse.Namespace) -> NoReturn:
    """Run a command in the reactor until it ends; a signal cancels it, and waits for its end.

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
