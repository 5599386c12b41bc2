"""Closing so that the last answer arrives, and telling how the input of a connection ended."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from twisted.internet.error import ConnectionDone
from twisted.internet.interfaces import (
    IDelayedCall,
    IHalfCloseableProtocol,
    ISSLTransport,
    ITCPTransport,
)
from twisted.python.failure import Failure
from zope.interface import implementer

from cafeteria_orch.server.frames import FrameReceiver

CLOSE_TIMEOUT = 2.0
"""How long, in seconds, an orderly close waits for the peer before it becomes an abort."""

_READ_SIZE = 65536


@implementer(IHalfCloseableProtocol)
class ClosingReceiver(FrameReceiver):
    """A :class:`FrameReceiver` that ends in good order, whichever side ends it.

    ``inputEnded()`` and ``flush()`` are hooks, and those of the base class.

    :ivar reactor: for time.
    """

    reactor: Any

    _closing = False
    _input_over = False
    _lost = False
    _was_reset = False
    _abort_call: IDelayedCall | None = None

    def framesDelivered(self) -> None:
        """All that is whole was delivered, or delivery was paused."""
        if self._input_over and not self.paused:
            self.inputEnded()

    def readConnectionLost(self) -> None:
        """The client sends no more. What it is owed still goes out."""
        self._input_over = True
        if self._closing:
            self.transport.loseConnection()
        elif not self.paused:
            self.inputEnded()

    def writeConnectionLost(self) -> None:
        """Our half-close has gone out."""

    def connectionLost(self, reason: Failure) -> None:  # type: ignore[override]
        """The connection is gone."""
        self._lost = self._input_over = True
        # Many a client closes TLS without saying so by TLS: that looks like a reset, and is none.
        is_tls = ISSLTransport.providedBy(self.transport)
        self._was_reset = reason.check(ConnectionDone) is None and not is_tls
        if self._abort_call is not None and self._abort_call.active():
            self._abort_call.cancel()

    def inputEnded(self) -> None:
        """No more comes, and all that came whole was delivered. A hook."""

    def flush(self) -> None:
        """Send what waits to be sent. A hook."""

    def pauseReading(self) -> None:
        """Read no more for now."""
        if not self._input_over:
            self.transport.pauseProducing()

    def resumeReading(self) -> None:
        """Read on, if there is anything left to read."""
        # A transport that is resumed after a half-close reports the end of input for ever.
        if not self._input_over:
            self.transport.resumeProducing()

    def read_what_is_left(self) -> None:
        """The connection is lost, and its socket not closed yet: read what came before.

        A client that closes without reading its answers resets the connection by that, with
        whole batches of it still in the kernel.
        """
        if self._closing or not _is_plain_tcp(self.transport):
            return
        with suppress(OSError):
            while data := self.transport.getHandle().recv(_READ_SIZE):
                self.dataReceived(data)

    def close(self) -> None:
        """Close so that the last answer arrives; handle nothing more.

        With input unread a plain close would become a reset, and the client might lose its
        answers. So: half-close, read and drop, and abort after :data:`CLOSE_TIMEOUT`.
        """
        if self._closing:
            return
        self.flush()
        self._closing = True
        self.stopDelivery()
        if self._lost:
            return
        self.transport.unregisterProducer()
        self._abort_call = self.reactor.callLater(CLOSE_TIMEOUT, self.abort)
        self.resumeReading()
        if self._input_over or not _is_plain_tcp(self.transport):
            self.transport.loseConnection()
        else:
            self.transport.loseWriteConnection()

    def abort(self) -> None:
        """Close at once, whatever is on its way."""
        self._closing = True
        if self._lost:
            # A TLS transport does not bear to be told.
            self.stopDelivery()
        else:
            self.abortConnection()


def _is_plain_tcp(transport: object) -> bool:
    # TLS claims to be TCP too, and passes on to the socket below it what it must not.
    return ITCPTransport.providedBy(transport) and not ISSLTransport.providedBy(transport)
