"""The endpoints that the options name, each tried before the process becomes a daemon."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from twisted.internet.endpoints import (
    SSL4ServerEndpoint,
    TCP4ServerEndpoint,
    TCP6ServerEndpoint,
    UNIXServerEndpoint,
    serverFromString,
)
from twisted.internet.error import CannotListenError
from twisted.internet.interfaces import IStreamServerEndpoint
from twisted.internet.protocol import Factory

from cafeteria_orch.common.listening import listen

from .options import Options, one_line, refusal

_TRIED = (TCP4ServerEndpoint, TCP6ServerEndpoint, SSL4ServerEndpoint, UNIXServerEndpoint)


def client_endpoints(reactor: Any, options: Options) -> list[IStreamServerEndpoint]:
    """Make the endpoints for clients.

    :raises SystemExit: if one of them cannot listen.
    """
    check_endpoints(_client_endpoints(BindProbe(), options), "--port, --interface or --listen")
    return _client_endpoints(reactor, options)


def metrics_endpoint(reactor: Any, description: str) -> IStreamServerEndpoint:
    """Make the endpoint of ``--metrics``.

    :raises SystemExit: if it cannot listen.
    """
    check_endpoints([_endpoint(BindProbe(), "metrics", description)], "--metrics")
    return _endpoint(reactor, "metrics", description)


def check_endpoints(endpoints: Iterable[IStreamServerEndpoint], options: str) -> None:
    """Make sure that endpoints can listen, where that can be tried.

    :param endpoints: on a :class:`BindProbe`.
    :param options: their names, for the refusal.
    :raises SystemExit: if one of them cannot.
    """
    for endpoint in endpoints:
        if isinstance(endpoint, _TRIED):
            try:
                listen(endpoint, Factory())
            except Exception as error:
                raise refusal(
                    f"{error} Stop what listens there, or choose another {options}."
                ) from error


class BindProbe:
    """Stands in for an endpoint's reactor: binds as the real one would, and lets go."""

    def listenTCP(self, port: int, factory: Factory, backlog: int, interface: str) -> None:
        """Bind a TCP port."""
        family = socket.AF_INET6 if ":" in interface else socket.AF_INET
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((interface, port))
            except OSError as error:
                raise CannotListenError(interface, port, error) from error

    def listenSSL(
        self,
        port: int,
        factory: Factory,
        contextFactory: object,
        backlog: int,
        interface: str,
    ) -> None:
        """Bind the port of a TLS endpoint."""
        self.listenTCP(port, factory, backlog, interface)

    def listenUNIX(self, address: str, factory: Factory, **_: object) -> None:
        """Look whether a local socket could be made, and whether another server has it."""
        folder = Path(address).absolute().parent
        if not os.access(folder, os.W_OK):
            raise CannotListenError(None, address, OSError(f"{folder} is not writable"))
        with socket.socket(socket.AF_UNIX) as probe, suppress(OSError):
            probe.connect(address)
            raise CannotListenError(None, address, OSError("Address already in use"))


def _client_endpoints(reactor: Any, options: Options) -> list[IStreamServerEndpoint]:
    if not options["listen"]:
        interface = options["interface"]
        kind = TCP6ServerEndpoint if ":" in interface else TCP4ServerEndpoint
        return [kind(reactor, options["port"], options["backlog"], interface)]
    return [_endpoint(reactor, "listen", description) for description in options["listen"]]


def _endpoint(reactor: Any, option: str, description: str) -> IStreamServerEndpoint:
    try:
        endpoint: IStreamServerEndpoint = serverFromString(reactor, description)
    except Exception as error:
        raise refusal(f"--{option} {description}: {one_line(error)}") from error
    return endpoint
