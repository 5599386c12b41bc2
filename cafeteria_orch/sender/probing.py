"""Whether a server that has answered nothing wants TLS."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from twisted.internet import defer
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.endpoints import connectProtocol
from twisted.internet.error import ConnectError, ConnectingCancelledError, DNSLookupError
from twisted.internet.interfaces import IStreamClientEndpoint
from twisted.internet.protocol import Protocol
from twisted.python.failure import Failure

from .tls import TLSError

PROBE_TIMEOUT = 5.0
"""How long, in seconds, a server may take to answer."""

_HANDSHAKE = b"\x16\x03"
"""What a record of a TLS handshake begins with."""


class TLSProbe:
    """Begins a TLS handshake, to see whether the server goes on with it. It does so once.

    :param endpoint: the server, without TLS.
    :param address: the server, as the user wrote it.
    """

    def __init__(self, reactor: Any, endpoint: IStreamClientEndpoint, address: str) -> None:
        self._reactor = reactor
        self._endpoint = endpoint
        self._address = address
        self._is_done = False

    async def probe(self) -> None:
        """:raises TLSError: if the server wants TLS."""
        if self._is_done:
            return
        self._is_done = True
        probe = _Probe()
        try:
            await connectProtocol(self._endpoint, probe)
            first = await probe.answer.addTimeout(PROBE_TIMEOUT, self._reactor)
        except (CancelledError, ConnectingCancelledError) as error:
            raise CancelledError from error
        except (ConnectError, DNSLookupError, defer.TimeoutError):
            return
        finally:
            probe.end()
        if first.startswith(_HANDSHAKE):
            raise TLSError(
                f"the server at {self._address} speaks TLS: name the file of the CA of its"
                " certificate with --tls-ca"
            )


class _Probe(Protocol):
    """Sends the first message of a TLS handshake.

    :ivar answer: the first bytes that come; nothing if the connection ends before.
    """

    transport: Any = None

    def __init__(self) -> None:
        self.answer: Deferred[bytes] = Deferred()

    def connectionMade(self) -> None:
        # Not every Python has it, and only this needs it.
        import ssl  # noqa: PLC0415

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        outgoing = ssl.MemoryBIO()
        with suppress(ssl.SSLWantReadError):
            context.wrap_bio(ssl.MemoryBIO(), outgoing).do_handshake()
        self.transport.write(outgoing.read())

    def dataReceived(self, data: bytes) -> None:
        self._finish(data)

    def connectionLost(self, reason: Failure | None = None) -> None:
        self._finish(b"")

    def end(self) -> None:
        """Close the connection."""
        if self.transport is not None:
            self.transport.abortConnection()

    def _finish(self, data: bytes) -> None:
        if not self.answer.called:
            self.answer.callback(data)
