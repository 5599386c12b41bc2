"""The endpoints that the options name, each tried before the process becomes a daemon."""

from __future__ import annotations

import errno
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
from twisted.internet.interfaces import IListeningPort, IStreamServerEndpoint
from twisted.internet.protocol import Factory
from twisted.internet.tcp import makeBinding
from twisted.logger import Logger

from cafeteria_orch.common.listening import listen

from .options import Options, one_line, refusal

_TCP = "tcp:PORT or tcp:PORT:interface=ADDRESS, the port a number"
_ALL_INTERFACES = {"", "0.0.0.0", "::"}  # noqa: S104 (it is warned of)

_log = Logger()

_TRIED = (TCP4ServerEndpoint, TCP6ServerEndpoint, SSL4ServerEndpoint, UNIXServerEndpoint)


def client_endpoints(reactor: Any, options: Options) -> list[IStreamServerEndpoint]:
    """Make the endpoints for clients.

    :raises SystemExit: if one of them cannot listen.
    """
    is_shared = options["reuse-port"]
    if is_shared and not hasattr(socket, "SO_REUSEPORT"):
        raise refusal("--reuse-port: this system has no SO_REUSEPORT")
    probes = _client_endpoints(BindProbe(is_shared=is_shared), options)
    if is_shared:
        for probe, description in zip(probes, options["listen"]):
            if not isinstance(probe, (TCP4ServerEndpoint, TCP6ServerEndpoint)):
                raise refusal(
                    f"--listen {description}: --reuse-port shares a TCP port: name tcp: endpoints"
                    " only, or leave it out"
                )
    check_endpoints(probes, "--port, --interface or --listen")
    return _client_endpoints(SharedPorts(reactor) if is_shared else reactor, options)


def metrics_endpoint(reactor: Any, description: str) -> IStreamServerEndpoint:
    """Make the endpoint of ``--metrics``.

    :raises SystemExit: if it cannot listen.
    """
    probe = BindProbe()
    check_endpoints([_endpoint(probe, "metrics", description)], "--metrics")
    if probe.interfaces & _ALL_INTERFACES:
        _log.warn(
            "action: start | result: warning | error: everybody who reaches the port of --metrics"
            " can read the status page and the metrics: name an interface, as in"
            " tcp:9100:interface=127.0.0.1"
        )
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
                cause = getattr(error, "socketError", error)
                is_taken = getattr(cause, "errno", None) == errno.EADDRINUSE
                remedy = "Stop what listens there, or choose" if is_taken else "Choose"
                raise refusal(f"{error} {remedy} another {options}.") from error


class SharedPorts:
    """Stands in for an endpoint's reactor: other processes may listen on its TCP ports too.

    Endpoints have no argument for that; what they call has.

    :param reactor: the real one.
    """

    def __init__(self, reactor: Any) -> None:
        self._reactor = reactor

    def listenTCP(
        self, port: int, factory: Factory, backlog: int, interface: str
    ) -> IListeningPort:
        """Listen on a TCP port."""
        binding = makeBinding(interface, port, reuseAddress=True, reusePort=True)
        listening: IListeningPort = self._reactor.listenTCP(binding, factory, backlog, interface)
        return listening


class BindProbe:
    """Stands in for an endpoint's reactor: binds as the real one would, and lets go.

    :param is_shared: whether other servers may have the TCP port too, if they share it as well.
    :ivar interfaces: what was bound of TCP ports.
    """

    def __init__(self, *, is_shared: bool = False) -> None:
        self.interfaces: set[str] = set()
        self._is_shared = is_shared

    def listenTCP(self, port: int, factory: Factory, backlog: int, interface: str) -> None:
        """Bind a TCP port."""
        self.interfaces.add(interface)
        family = socket.AF_INET6 if ":" in interface else socket.AF_INET
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if self._is_shared:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
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
        if not address:
            raise CannotListenError(None, address, OSError("the path is missing"))
        folder = Path(address).absolute().parent
        if not folder.is_dir():
            raise CannotListenError(None, address, OSError(f"make the folder {folder}"))
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
    if description.isdecimal():
        raise refusal(
            f"--{option} {description}: give it as tcp:{description}:interface=127.0.0.1, or as"
            f" tcp:{description} for all interfaces"
        )
    try:
        endpoint: IStreamServerEndpoint = serverFromString(reactor, description)
    except Exception as error:
        is_tcp = description.split(":", maxsplit=1)[0] == "tcp"
        why = f"give it as {_TCP}" if is_tcp else one_line(error)
        raise refusal(f"--{option} {description}: {why}") from error
    return endpoint
