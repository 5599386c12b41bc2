"""Values on a command line, of the server and of the console commands."""

from __future__ import annotations

import re
from argparse import ArgumentTypeError
from collections.abc import Callable
from typing import Any

from twisted.internet.endpoints import clientFromString

DEFAULT_CONNECT = "tcp:127.0.0.1:8080"
"""Where an orchestrator listens by default."""

# What a user may write for tcp:HOST:PORT.
_ADDRESS = re.compile(r"(?:tcp:)?([\w.-]+)(?::(\d+))?")


class BadArgument(ArgumentTypeError, ValueError):
    """A value that an option does not take. Both argparse and ``usage.Options`` show its text."""


def number(kind: Callable[[str], Any], minimum: float, maximum: float) -> Callable[[str], Any]:
    """Make a parser of numbers within bounds.

    :param kind: ``int`` or ``float``.
    """

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        # A NaN is neither below the minimum nor above the maximum.
        if value is None or not minimum <= value <= maximum:
            raise BadArgument(f"{text!r} is not a number from {minimum} to {maximum}")
        return value

    return parse


def endpoint(text: str) -> str:
    """Check the description of a Twisted client endpoint."""
    try:
        clientFromString(None, text)
    except Exception as error:
        address = _ADDRESS.fullmatch(text)
        right = f"tcp:{address[1]}:{address[2] or 8080}" if address else DEFAULT_CONNECT
        raise BadArgument(
            f"{text!r} is no Twisted endpoint: write tcp:HOST:PORT, such as {right}"
        ) from error
    return text
