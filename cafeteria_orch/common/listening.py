"""Listening on Twisted's server endpoints."""

from __future__ import annotations

from twisted.internet.address import IPv4Address, IPv6Address
from twisted.internet.interfaces import IListeningPort, IProtocolFactory, IStreamServerEndpoint
from twisted.python.failure import Failure


def listen(endpoint: IStreamServerEndpoint, factory: IProtocolFactory) -> IListeningPort:
    """Have an endpoint listen, and return its port.

    :raises Exception: what keeps the endpoint from listening.
    """
    ports: list[IListeningPort] = []
    failures: list[Failure] = []
    # All of Twisted's server endpoints say at once whether they listen.
    endpoint.listen(factory).addCallbacks(ports.append, failures.append)
    for failure in failures:
        failure.raiseException()
    if not ports:
        raise RuntimeError(f"{endpoint!r} does not say at once whether it listens")
    return ports[0]


def address_of(port: IListeningPort) -> str:
    """Return where a port listens, as a log line shows it."""
    host = port.getHost()
    if isinstance(host, (IPv4Address, IPv6Address)):
        return f"{host.host}:{host.port}"
    return str(host)
