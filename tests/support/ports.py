"""Ports that no other process can be given while a test needs them."""

from __future__ import annotations

import socket

from twisted.trial.unittest import SynchronousTestCase


def reserve_port(test: SynchronousTestCase) -> int:
    """Reserve a port until the end of a test.

    A server can listen on it, and again after it was killed: like this socket it sets
    ``SO_REUSEADDR``, and this socket does not listen. The system gives a port that is bound to
    nobody else, neither to another server nor to a client.
    """
    reservation = socket.socket()
    test.addCleanup(reservation.close)
    reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reservation.bind(("127.0.0.1", 0))
    port: int = reservation.getsockname()[1]
    return port
