"""The endpoint for operators: metrics, health checks and the status page, over HTTP."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple, cast

from twisted.internet.interfaces import IListeningPort, IStreamServerEndpoint
from twisted.internet.task import Cooperator
from twisted.logger import Logger, globalLogPublisher
from twisted.python.failure import Failure
from twisted.web import http

from cafeteria_orch.common.clock import WallTime
from cafeteria_orch.common.listening import address_of, listen
from cafeteria_orch.common.oldest import OldestFirst
from cafeteria_orch.common.rate_limit import RateLimitedLog
from cafeteria_orch.server.factory import OrchestratorFactory
from cafeteria_orch.server.responses import describe
from cafeteria_orch.store.asking import Asker
from cafeteria_orch.store.database import DatabaseServer
from cafeteria_orch.store.sink import Sink
from cafeteria_orch.store.totals import Completeness

from . import page
from .problems import RecentProblems
from .prometheus import Exposition
from .status import HISTORIES, Status

REQUEST_TIMEOUT = 15.0
"""Seconds that a connection may be silent, between two requests or inside one."""

MAX_CONNECTIONS = 50
"""The number of connections at once; one more closes the oldest."""

_TEXT = "text/plain; charset=utf-8"

_HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}

_log = Logger()


class Response(NamedTuple):
    """The response to a request."""

    status: int
    content_type: str
    body: bytes
    headers: dict[str, str] = {}  # noqa: RUF012 (never changed)


class Query(NamedTuple):
    """What a request asks for, beside its path.

    :ivar accept: its header ``Accept``.
    :ivar arguments: what stands behind the question mark.
    """

    accept: str
    arguments: Mapping[bytes, list[bytes]]


class Monitor:
    """Shows operators what the server does.

    It answers ``/``, ``/manual``, ``/status.json``, ``/metrics``, ``/livez`` and ``/readyz``,
    from :meth:`listen` until :meth:`stop`.

    :param reactor: for time.
    :param factory: the factory whose connections and counters are shown.
    :param endpoint: where to listen.
    :param version: the version of this package.
    :param sink: the store, if there is one.
    :param completeness: asks the store what it has of each table and agency.
    :param server: asks the database's server what it is, if it has one.
    :param node: the name of this server among several.
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
        server: Asker[DatabaseServer] | None = None,
        node: str = "-",
    ) -> None:
        limited_log = RateLimitedLog(factory.rate_limits, _log)
        self.site = Site(reactor, self.respond, factory.wall_time, limited_log)
        self._endpoint = endpoint
        self._problems = RecentProblems()
        self._status = Status(
            reactor,
            factory,
            version,
            sink=sink,
            problems=self._problems,
            completeness=completeness,
            server=server,
            node=node,
        )
        exposition = Exposition(factory, self._status, version)
        icon = Response(http.OK, "image/svg+xml", page.icon())
        pages = {b"/": _document(page.status_page()), b"/manual": _manual(), b"/favicon.ico": icon}
        self._pages: dict[bytes, Callable[[Query], Response]] = {
            **{path: partial(_same, response) for path, response in pages.items()},
            b"/status.json": self._state,
            b"/metrics": lambda query: Response(http.OK, *exposition.render(query.accept)),
            b"/livez": lambda _: Response(http.OK, _TEXT, b"ok\n"),
            b"/readyz": lambda _: self._readiness(),
        }
        self._port: IListeningPort | None = None

    def listen(self) -> None:
        """Answer from now on.

        :raises Exception: whatever keeps the endpoint from listening.
        """
        self._port = listen(self._endpoint, self.site)
        _log.info(
            "action: serve_metrics | result: success | address: {address}",
            address=address_of(self._port),
        )

    def start(self) -> None:
        """The server takes batches from now on."""
        globalLogPublisher.addObserver(self._problems)
        self._status.start()

    def stopping(self) -> None:
        """The server drains from now on."""
        self._status.drain()

    def stop(self) -> None:
        """The drain is over: close, without waiting for those who are connected."""
        self._status.stop()
        globalLogPublisher.removeObserver(self._problems)
        if self._port is not None:
            self._port.stopListening()
            self._port = None
        self.site.abort()

    def respond(self, path: bytes, query: Query) -> Response:
        """The response to the GET of a path."""
        make_response = self._pages.get(path)
        if make_response is None:
            return Response(http.NOT_FOUND, _TEXT, b"not found\n")
        return make_response(query)

    def _state(self, query: Query) -> Response:
        asked = query.arguments.get(b"range")
        history = None if asked is None else asked[0].decode("latin-1")
        if history is not None and history not in HISTORIES:
            text = f"range is one of {', '.join(HISTORIES)}\n"
            return Response(http.BAD_REQUEST, _TEXT, text.encode())
        return Response(http.OK, "application/json", self._status.render(history))

    def _readiness(self) -> Response:
        refusal = self._status.refusal
        status = http.OK if refusal is None else http.SERVICE_UNAVAILABLE
        return Response(status, _TEXT, f"{refusal or 'ok'}\n".encode())


def _same(response: Response, _: Query) -> Response:
    return response


def _document(made: page.Page) -> Response:
    headers = {"Content-Security-Policy": made.policy}
    return Response(http.OK, "text/html; charset=utf-8", made.body, headers)


def _manual() -> Response:
    try:
        return _document(page.manual())
    except FileNotFoundError:
        text = b"the manual was not installed: read docs/operations.md of the source\n"
        return Response(http.NOT_FOUND, _TEXT, text)


class Site(http.HTTPFactory):
    """Serves GET and HEAD without a body, one response in each turn of the reactor.

    :param reactor: for time.
    :param respond: what the path of a GET, and the rest of it, are answered with.
    :param wall_time: for the header ``Date``.
    :param limited_log: of what any request can cause again and again.
    """

    noisy = False

    def __init__(
        self,
        reactor: Any,
        respond: Callable[[bytes, Query], Response],
        wall_time: WallTime,
        limited_log: RateLimitedLog,
    ) -> None:
        super().__init__(timeout=REQUEST_TIMEOUT, reactor=reactor)
        self.protocol = _Channel  # type: ignore[assignment]
        self.respond = respond
        self.wall_time = wall_time
        self.limited_log = limited_log
        self.channels: OldestFirst[_Channel] = OldestFirst(MAX_CONNECTIONS)
        # However many ask at once, the agencies have their turns in between.
        self.turns = Cooperator(
            terminationPredicateFactory=lambda: lambda: True,
            scheduler=lambda turn: reactor.callLater(0, turn),
        )

    def startFactory(self) -> None:
        """Twisted opens its access log here; this server has no such log."""

    def stopFactory(self) -> None:
        """Nothing was started."""

    def abort(self) -> None:
        """Close all connections at once."""
        for channel in self.channels:
            channel.abort()


class _Request(http.Request):
    _has_body = False

    def gotLength(self, length: int | None) -> None:
        """The headers are there. A body is not waited for."""
        super().gotLength(0)
        if length != 0:
            self._has_body = True
            self._own_channel.refuse_body()

    def handleContentChunk(self, data: bytes) -> None:
        """A body that comes all the same is dropped."""

    def process(self) -> None:
        """The request is there."""
        if not self._has_body:
            self._own_channel.factory.turns.coiterate(map(_Request._answer, [self]))

    @property
    def _own_channel(self) -> _Channel:
        return cast("_Channel", self.channel)

    def _answer(self) -> None:
        # It is taken away when the connection is lost.
        if self.channel is None:
            return
        site = self._own_channel.factory
        response = self._response(site)
        headers = {
            **_HEADERS,
            **response.headers,
            "Content-Type": response.content_type,
            "Content-Length": str(len(response.body)),
            "Date": http.datetimeToString(site.wall_time()).decode(),
        }
        self.setResponseCode(response.status)
        for name, value in headers.items():
            self.setHeader(name, value)
        self.write(response.body)
        self.finish()

    def _response(self, site: Site) -> Response:
        if self.method not in (b"GET", b"HEAD"):
            allowed = {"Allow": "GET, HEAD"}
            return Response(http.NOT_ALLOWED, _TEXT, b"GET and HEAD only\n", allowed)
        accept = self.requestHeaders.getRawHeaders(b"Accept", [b""])
        try:
            return site.respond(self.path, Query(accept[0].decode("latin-1"), self.args or {}))
        except Exception:
            failure = Failure()
            kind = f"bug: {describe(failure.value or Exception())}"
            message = "action: serve_metrics | result: fail"
            site.limited_log.failure(kind, message, failure)
            return Response(http.INTERNAL_SERVER_ERROR, _TEXT, b"a fault of the server\n")


class _Channel(http.HTTPChannel):
    """One connection: parses the next request when the response before it is on its way.

    Without that, a client that sends requests and reads no responses fills the memory with them.
    """

    factory: Site
    transport: Any
    requestFactory = _Request
    _unsent: http.Request | None = None

    def connectionMade(self) -> None:
        super().connectionMade()
        oldest = self.factory.channels.add(self)
        if oldest is not None:
            oldest.abort()

    def connectionLost(self, reason: Failure) -> None:  # type: ignore[override]
        self.factory.channels.discard(self)
        super().connectionLost(reason)

    def requestDone(self, request: http.Request) -> None:
        """The response is written, and perhaps waits to be sent."""
        if self._waitingForTransport:
            self._unsent = request
            self.transport.pauseProducing()
            self.setTimeout(self.factory.timeOut)
        else:
            super().requestDone(request)

    def resumeProducing(self) -> None:
        """The peer has read enough of what waited to be sent."""
        super().resumeProducing()
        if self._unsent is not None:
            request, self._unsent = self._unsent, None
            super().requestDone(request)

    def timeoutConnection(self) -> None:
        """The client was silent for too long, which is nothing to be logged."""
        self.abort()

    def refuse_body(self) -> None:
        """Answer a request that has a body, and read no more."""
        self.transport.write(
            b"HTTP/1.1 413 Content Too Large\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
        )
        self.loseConnection()

    def abort(self) -> None:
        """Close at once."""
        self.factory.channels.discard(self)
        self.transport.abortConnection()
