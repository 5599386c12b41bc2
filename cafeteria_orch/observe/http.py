"""The operator's endpoint: metrics, health and the status page, over HTTP from the reactor."""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Callable
from hashlib import sha256
from importlib.resources import files
from typing import Any, NamedTuple, cast

from twisted.internet.address import IPv4Address, IPv6Address
from twisted.internet.interfaces import IListeningPort, IStreamServerEndpoint
from twisted.logger import Logger, globalLogPublisher
from twisted.python.failure import Failure
from twisted.web import http

from cafeteria_orch.server.factory import OrchestratorFactory
from cafeteria_orch.store.sink import Sink
from cafeteria_orch.store.totals import Completeness

from .health import Health
from .logs import RecentProblems
from .prometheus import Exposition
from .status import Status

REQUEST_TIMEOUT = 15.0
"""How long, in seconds, a connection may be silent between two requests or inside of one."""

MOST_CONNECTIONS = 50
"""So many connections at once; one more costs the oldest its own."""

_TEXT = "text/plain; charset=utf-8"

_HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}

_log = Logger()


class Response(NamedTuple):
    """What a request is answered with."""

    status: int
    content_type: str
    body: bytes
    headers: dict[str, str] = {}  # noqa: RUF012 (never changed)


class Monitor:
    """Shows what the server does.

    It answers ``/``, ``/status.json``, ``/metrics``, ``/livez`` and ``/readyz``, from
    :meth:`listen` until :meth:`stop`.

    :param reactor: the reactor.
    :param factory: the one that is shown.
    :param endpoint: where to listen.
    :param version: of this package.
    :param sink: the store, if there is one.
    :param completeness: of the tables in it.
    :raises ImportError: if ``prometheus-client`` is not installed.
    """

    def __init__(
        self,
        reactor: Any,
        factory: OrchestratorFactory,
        endpoint: IStreamServerEndpoint,
        version: str,
        *,
        sink: Sink | None = None,
        completeness: Completeness | None = None,
    ) -> None:
        self.site = Site(reactor, self.respond)
        self._endpoint = endpoint
        self._health = Health(sink)
        self._exposition = Exposition(factory, self._health, version)
        self._problems = RecentProblems()
        self._status = Status(
            reactor,
            factory,
            self._health,
            version,
            problems=self._problems,
            completeness=completeness,
        )
        self._page = _page()
        self._port: IListeningPort | None = None

    def listen(self) -> None:
        """Answer from now on.

        :raises Exception: whatever keeps the endpoint from listening.
        """
        # All of Twisted's server endpoints say at once whether they listen.
        failures: list[Failure] = []
        self._endpoint.listen(self.site).addCallbacks(self._listening, failures.append)
        for failure in failures:
            failure.raiseException()

    def start(self) -> None:
        """The server serves."""
        globalLogPublisher.addObserver(self._problems)
        self._status.start()
        self._health.is_started = True

    def stopping(self) -> None:
        """The server has begun to stop."""
        self._health.is_draining = True

    def stop(self) -> None:
        """Nothing will change any more: close, without waiting for whoever is connected."""
        self._status.stop()
        globalLogPublisher.removeObserver(self._problems)
        if self._port is not None:
            self._port.stopListening()
            self._port = None
        self.site.abort()

    def respond(self, path: bytes, accept: str) -> Response:
        """What a GET of a path is answered with."""
        if path == b"/":
            return self._page
        if path == b"/status.json":
            return Response(http.OK, "application/json", self._status.render())
        if path == b"/metrics":
            return Response(http.OK, *self._exposition.render(accept))
        if path == b"/livez":
            return Response(http.OK, _TEXT, b"ok\n")
        if path == b"/readyz":
            refusal = self._health.refusal
            status = http.OK if refusal is None else http.SERVICE_UNAVAILABLE
            return Response(status, _TEXT, f"{refusal or 'ok'}\n".encode())
        return Response(http.NOT_FOUND, _TEXT, b"not found\n")

    def _listening(self, port: IListeningPort) -> None:
        self._port = port
        host: object = port.getHost()
        if isinstance(host, (IPv4Address, IPv6Address)):
            host = f"{host.host}:{host.port}"
        _log.info("action: serve_metrics | result: success | address: {address}", address=host)


def _page() -> Response:
    """The status page, and the policy that lets a browser run just what stands in it."""
    page = files(__package__).joinpath("status.html").read_text("utf-8")
    sources = {}
    for kind in ("script", "style"):
        found = re.search(f"<{kind}>(.*?)</{kind}>", page, re.DOTALL)
        digest = sha256((found[1] if found else "").encode()).digest()
        sources[kind] = f"'sha256-{b64encode(digest).decode()}'"
    policy = (
        "default-src 'none'; connect-src 'self'; img-src data:; base-uri 'none';"
        " form-action 'none'; frame-ancestors 'none';"
        f" script-src {sources['script']}; style-src {sources['style']}"
    )
    headers = {"Content-Security-Policy": policy}
    return Response(http.OK, "text/html; charset=utf-8", page.encode(), headers)


class Site(http.HTTPFactory):
    """Serves GET and HEAD without a body, and nothing else.

    :param reactor: for time.
    :param respond: what the path of a GET, and its ``Accept``, are answered with.
    """

    noisy = False

    def __init__(self, reactor: Any, respond: Callable[[bytes, str], Response]) -> None:
        super().__init__(timeout=REQUEST_TIMEOUT, reactor=reactor)
        self.protocol = _Channel  # type: ignore[assignment]
        self.respond = respond
        # An ordered set: the oldest is the first.
        self._channels: dict[_Channel, None] = {}

    def startFactory(self) -> None:
        """There is no access log to be opened, and no clock for its lines."""

    def stopFactory(self) -> None:
        """Nothing was started."""

    def opened(self, channel: _Channel) -> None:
        """A connection was made."""
        if len(self._channels) >= MOST_CONNECTIONS:
            next(iter(self._channels)).abort()
        self._channels[channel] = None

    def closed(self, channel: _Channel) -> None:
        """It is gone, or will be at once."""
        self._channels.pop(channel, None)

    def abort(self) -> None:
        """Close all connections at once."""
        for channel in list(self._channels):
            channel.abort()


class _Request(http.Request):
    _is_refused = False

    def gotLength(self, length: int | None) -> None:
        """The headers are there. A body is not waited for."""
        super().gotLength(0)
        if length != 0:
            self._is_refused = True
            cast("_Channel", self.channel).refuse()

    def handleContentChunk(self, data: bytes) -> None:
        """What comes of a body all the same is dropped."""

    def process(self) -> None:
        """The request is there."""
        if self._is_refused:
            return
        site = cast("_Channel", self.channel).factory
        if self.method in (b"GET", b"HEAD"):
            response = site.respond(self.path, self.getHeader("accept") or "")
        else:
            allowed = {"Allow": "GET, HEAD"}
            response = Response(http.NOT_ALLOWED, _TEXT, b"GET and HEAD only\n", allowed)
        self.setResponseCode(response.status)
        headers = {
            **_HEADERS,
            **response.headers,
            "Content-Type": response.content_type,
            "Content-Length": str(len(response.body)),
            "Date": http.datetimeToString(site.reactor.seconds()).decode(),
        }
        for name, value in headers.items():
            self.setHeader(name, value)
        self.write(response.body)
        self.finish()


class _Channel(http.HTTPChannel):
    factory: Site
    transport: Any
    requestFactory = _Request

    def connectionMade(self) -> None:
        super().connectionMade()
        self.factory.opened(self)

    def connectionLost(self, reason: Failure) -> None:  # type: ignore[override]
        self.factory.closed(self)
        super().connectionLost(reason)

    def timeoutConnection(self) -> None:
        """It was silent for too long; that is nothing to be logged."""
        self.abort()

    def refuse(self) -> None:
        """Answer a request that has a body, and read no more."""
        self.transport.write(
            b"HTTP/1.1 413 Content Too Large\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
        )
        self.loseConnection()

    def abort(self) -> None:
        """Close at once."""
        self.factory.closed(self)
        self.transport.abortConnection()
