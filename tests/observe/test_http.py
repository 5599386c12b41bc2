"""The operator's endpoint: what it answers, to whom, and from when until when."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import signal
import socket
from pathlib import Path
from typing import Any
from unittest.mock import patch

from twisted.internet.defer import Deferred
from twisted.internet.endpoints import TCP4ServerEndpoint
from twisted.internet.error import CannotListenError
from twisted.internet.testing import RaisingMemoryReactor
from twisted.logger import Logger, LogLevel, capturedLogs, globalLogPublisher

from cafeteria_orch import __version__
from cafeteria_orch.daemon.service import OrchestratorService
from cafeteria_orch.observe.http import MAX_CONNECTIONS, REQUEST_TIMEOUT, Monitor, Response
from tests.support.builders import SUCCESS, TCPTransport, batch_frame, lose, texts
from tests.support.http import get, metrics_address
from tests.support.processes import ProcessTestCase, wait_until
from tests.support.services import RecordingEndpoint, RecordingSink, ServiceTestCase, raising

LIVEZ = b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n"
METRICS = LIVEZ.replace(b"livez", b"metrics")


class MonitorTestCase(ServiceTestCase):
    """A service that is watched."""

    def setUp(self) -> None:
        super().setUp()
        self.sink = RecordingSink()
        self.endpoint = RecordingEndpoint()
        self.monitor = Monitor(
            self.reactor, self.factory, self.endpoint, __version__, sink=self.sink
        )

    def watched(self, **options: Any) -> OrchestratorService:
        """A service that is not started."""
        endpoint = options.pop("endpoint", RecordingEndpoint())
        return self.service(endpoint, sink=self.sink, monitor=self.monitor, **options)

    def open(self) -> tuple[Any, TCPTransport]:
        """A connection to the endpoint."""
        protocol: Any = self.monitor.site.buildProtocol(None)
        transport = TCPTransport()
        protocol.makeConnection(transport)
        return protocol, transport

    def ask(self, path: str, method: str = "GET", head: str = "") -> tuple[int, str, bytes]:
        """What a request is answered with: status, headers, body."""
        protocol, transport = self.open()
        protocol.dataReceived(f"{method} {path} HTTP/1.1\r\nHost: x\r\n{head}\r\n".encode())
        self.reactor.advance(0)
        headers, _, body = transport.value().partition(b"\r\n\r\n")
        lose(protocol)
        return int(headers.split()[1]), headers.decode(), body


class Answers(MonitorTestCase):
    """What a path is answered with."""

    def test_alive(self) -> None:
        """Whoever answers is alive, whatever state it is in."""
        self.sink.reason = "disk full"
        self.assertEqual(self.ask("/livez")[::2], (200, b"ok\n"))

    def test_metrics(self) -> None:
        """The metrics, in the format that is asked for."""
        status, headers, body = self.ask("/metrics")
        self.assertEqual(status, 200)
        self.assertIn("\r\nContent-Type: text/plain; version=", headers)
        self.assertIn(b"\ncafeorch_connections_open 0.0\n", body)
        _, headers, _ = self.ask("/metrics", head="Accept: application/openmetrics-text\r\n")
        self.assertIn("application/openmetrics-text", headers)

    def test_status(self) -> None:
        """The figures of the page."""
        status, headers, body = self.ask("/status.json")
        self.assertEqual(status, 200)
        self.assertIn("\r\nContent-Type: application/json\r\n", headers)
        self.assertEqual(json.loads(body)["version"], __version__)

    def test_page(self) -> None:
        """The page is whole: a browser is to load nothing, and run just what stands in it."""
        status, headers, body = self.ask("/")
        self.assertEqual(status, 200)
        self.assertIn("\r\nContent-Type: text/html; charset=utf-8\r\n", headers)
        page = body.decode()
        self.assertNotRegex(page, r"(?i)<(script|link|img|iframe)[^>]*(src|href)=.?(https?:)?/")
        self.assertNotRegex(
            page, r"@import|url\(|innerHTML|outerHTML|insertAdjacent|document\.write"
        )
        self.assertNotRegex(page, r"<[a-z][^>]* (style|on[a-z]+)=")
        (policy,) = re.findall(r"\r\nContent-Security-Policy: (.*)\r\n", headers)
        self.assertIn("default-src 'none'", policy)
        self.assertNotIn("unsafe", policy)
        for kind in ("script", "style"):
            (content,) = re.findall(f"<{kind}>(.*?)</{kind}>", page, re.DOTALL)
            digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
            self.assertIn(f"{kind}-src 'sha256-{digest}'", policy)

    def test_nothing_else(self) -> None:
        """There is nothing else, however it is asked for."""
        for path in ("/x", "/status.html", "/../etc/passwd", "//", "/metrics/", "/%2e%2e/", "*"):
            self.assertEqual(self.ask(path)[::2], (404, b"not found\n"), path)

    def test_query(self) -> None:
        """What stands behind a question mark is not looked at."""
        self.assertEqual(self.ask("/livez?verbose")[0], 200)

    def test_head(self) -> None:
        """HEAD gives the headers alone."""
        status, headers, body = self.ask("/livez", "HEAD")
        self.assertEqual((status, body), (200, b""))
        self.assertIn("Content-Length: 3", headers)

    def test_headers(self) -> None:
        """Nothing is to be kept, guessed or told; nothing says what serves it."""
        for path in ("/", "/metrics", "/x"):
            _, headers, _ = self.ask(path)
            self.assertIn("\r\nCache-Control: no-store\r\n", headers)
            self.assertIn("\r\nX-Content-Type-Options: nosniff\r\n", headers)
            self.assertIn("\r\nReferrer-Policy: no-referrer\r\n", headers)
            self.assertIn("\r\nDate: Thu, 01 Jan 1970 00:00:00 GMT", headers)
            self.assertNotIn("Server:", headers)

    def test_keep_alive(self) -> None:
        """A connection serves one request after the other."""
        protocol, transport = self.open()
        protocol.dataReceived(LIVEZ * 3)
        self.reactor.advance(0)
        self.assertEqual(transport.value().count(b"HTTP/1.1 200 OK"), 3)


class Hostile(MonitorTestCase):
    """Who wants something else."""

    def test_methods(self) -> None:
        """Nothing but GET and HEAD."""
        for method in ("POST", "PUT", "DELETE", "OPTIONS", "TRACE", "BREW"):
            status, headers, _ = self.ask("/", method)
            self.assertEqual(status, 405)
            self.assertIn("\r\nAllow: GET, HEAD", headers)

    def test_body(self) -> None:
        """A body is not waited for, not kept, and costs the connection."""
        for head in (b"Content-Length: 999999999999", b"Transfer-Encoding: chunked"):
            for method in (b"GET", b"POST"):
                protocol, transport = self.open()
                protocol.dataReceived(method + b" / HTTP/1.1\r\nHost: x\r\n" + head + b"\r\n\r\n")
                self.assertIn(b"413 Content Too Large", transport.value())
                self.assertTrue(transport.disconnecting)
                transport.clear()
                protocol.dataReceived(b"5\r\nabcde\r\n0\r\n\r\n")
                self.assertEqual(transport.value(), b"")

    def test_whole_body(self) -> None:
        """One that comes at once gets no second answer."""
        protocol, transport = self.open()
        protocol.dataReceived(b"GET / HTTP/1.1\r\nContent-Length: 2\r\n\r\nab")
        self.assertEqual(transport.value().count(b"HTTP/1.1"), 1)

    def test_one_response_in_a_turn_of_the_reactor(self) -> None:
        """However many requests come at once, each waits for a turn, and others have theirs."""
        first, transport = self.open()
        second, _ = self.open()
        responded: list[bytes] = []
        respond = self.monitor.site.respond

        def record(path: bytes, accept: str) -> Response:
            if not responded:
                second.dataReceived(LIVEZ)
            responded.append(path)
            return respond(path, accept)

        self.patch(self.monitor.site, "respond", record)
        first.dataReceived(METRICS * 300)
        self.assertEqual((responded, transport.value()), ([], b""))
        with patch.object(self.reactor, "callLater", wraps=self.reactor.callLater) as turns:
            self.reactor.advance(0)
        self.assertEqual(len(responded), 301)
        self.assertLess(responded.index(b"/livez"), 4)
        self.assertGreater(turns.call_count, len(responded))
        self.assertEqual(transport.value().count(b"HTTP/1.1 200 OK"), 300)

    def test_a_response_that_is_not_read_is_the_last_one(self) -> None:
        """While the peer reads nothing, no request more is read; later, all are answered."""
        protocol, transport = self.open()
        protocol.dataReceived(LIVEZ * 3)
        protocol.pauseProducing()
        self.reactor.advance(0)
        self.assertEqual(transport.value().count(b"HTTP/1.1 200 OK"), 1)
        self.assertEqual(transport.producerState, "paused")
        protocol.resumeProducing()
        self.reactor.advance(0)
        self.assertEqual(transport.value().count(b"HTTP/1.1 200 OK"), 3)
        self.assertEqual(transport.producerState, "producing")

    def test_a_peer_that_reads_nothing_is_cut_off(self) -> None:
        """Silence counts while a response waits to be sent."""
        protocol, transport = self.open()
        protocol.pauseProducing()
        protocol.dataReceived(LIVEZ)
        self.reactor.advance(0)
        self.reactor.advance(REQUEST_TIMEOUT)
        self.assertTrue(transport.aborted)

    def test_a_peer_that_leaves_gets_no_response(self) -> None:
        """A connection that is lost before its turn costs nothing."""
        protocol, transport = self.open()
        protocol.dataReceived(METRICS)
        lose(protocol)
        self.reactor.advance(0)
        self.assertEqual(transport.value(), b"")

    def test_a_fault_of_the_server_is_logged_and_answered(self) -> None:
        """What raises costs a 500, and the connection goes on."""
        error = raising(ZeroDivisionError())
        self.patch(self.monitor.site, "respond", lambda *_: error())
        self.assertEqual(self.ask("/metrics")[0], 500)
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)

    def test_any_accept(self) -> None:
        """Bytes that are no text, and versions that nobody knows, get the metrics."""
        for accept in (
            b"\xff",
            b"application/openmetrics-text; version=x",
            b"text/plain;version=9",
        ):
            protocol, transport = self.open()
            protocol.dataReceived(METRICS[:-2] + b"Accept: " + accept + b"\r\n\r\n")
            self.reactor.advance(0)
            self.assertIn(b"200 OK", transport.value())
            self.assertIn(b"cafeorch_connections_open 0", transport.value())

    def test_nonsense(self) -> None:
        """What is no HTTP is refused, and not logged."""
        with capturedLogs() as events:
            for data in (b"\0\0\0\1\1" * 3 + b"\r\n", b"GET\r\n", b"x" * 100_000 + b"\r\n"):
                protocol, transport = self.open()
                protocol.dataReceived(data)
                self.assertTrue(transport.disconnecting)
        self.assertEqual(events, [])

    def test_silence(self) -> None:
        """Who says nothing for long, before a request or inside of one, is cut off, unlogged."""
        for data in (b"", b"GET / HT", b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n"):
            protocol, transport = self.open()
            with capturedLogs() as events:
                protocol.dataReceived(data)
                self.reactor.advance(0)
                self.reactor.advance(REQUEST_TIMEOUT - 0.1)
                self.assertFalse(transport.aborted)
                self.reactor.advance(0.1)
            self.assertTrue(transport.aborted)
            self.assertEqual(events, [])

    def test_many(self) -> None:
        """No number of connections keeps a scraper out: the oldest one goes."""
        opened = [self.open()[1] for _ in range(MAX_CONNECTIONS + 2)]
        self.assertEqual(sum(transport.aborted for transport in opened), 2)
        self.assertTrue(opened[0].aborted and opened[1].aborted)
        self.assertEqual(self.ask("/livez")[0], 200)

    def test_gone(self) -> None:
        """Who is gone makes room, and leaves no timer behind."""
        for _ in range(2 * MAX_CONNECTIONS):
            protocol, transport = self.open()
            lose(protocol)
            self.assertFalse(transport.aborted)
        _, last = self.open()
        for _ in range(MAX_CONNECTIONS - 1):
            self.open()
        self.assertFalse(last.aborted)
        self.assertEqual(len(self.reactor.getDelayedCalls()), MAX_CONNECTIONS)

    def test_not_logged(self) -> None:
        """A scrape leaves no line in the log."""
        with capturedLogs() as events:
            self.ask("/metrics")
            self.ask("/x", "POST")
        self.assertEqual(events, [])


class Ready(MonitorTestCase):
    """Whether the server takes batches."""

    def check(self, status: int, text: str) -> None:
        self.assertEqual(self.ask("/readyz")[::2], (status, f"{text}\n".encode()))

    def test_life(self) -> None:
        """It does from its start to the beginning of its end."""
        service = self.watched()
        service.privilegedStartService()
        self.check(503, "starting")
        service.startService()
        self.check(200, "ok")
        self.busy_client()
        service.stopService()
        self.check(503, "draining")
        self.assertEqual(self.ask("/livez")[0], 200)

    def test_refusing(self) -> None:
        """It does not while the store refuses; the reason is one line."""
        self.watched().startService()
        self.sink.reason = "disk full\nor so"
        self.check(503, "disk full or so")
        self.sink.reason = None
        self.check(200, "ok")

    def test_without_a_store(self) -> None:
        """Without a store nothing can refuse."""
        self.monitor = Monitor(self.reactor, self.factory, self.endpoint, __version__)
        self.watched().startService()
        self.check(200, "ok")


class Life(MonitorTestCase):
    """From when until when it answers."""

    def test_listens_once(self) -> None:
        """It listens with the others, once, and the log says where."""
        with capturedLogs() as events:
            service = self.watched()
            service.privilegedStartService()
            service.startService()
        self.assertEqual(self.endpoint.factories, [self.monitor.site])
        line = "action: serve_metrics | result: success | address: 127.0.0.1:4321"
        self.assertIn(line, texts(events, LogLevel.info))

    def test_cannot_listen(self) -> None:
        """An endpoint that cannot listen raises."""
        error = CannotListenError("127.0.0.1", 9100, OSError("taken"))
        self.monitor = Monitor(
            self.reactor,
            self.factory,
            TCP4ServerEndpoint(RaisingMemoryReactor(listenException=error), 9100),
            __version__,
        )
        self.assertRaises(CannotListenError, self.watched().privilegedStartService)

    def test_until_the_end(self) -> None:
        """It answers until the store is closed, and does not wait for who keeps it open."""
        closed: Deferred[None] = Deferred()
        self.sink = RecordingSink(lambda: closed)
        service = self.watched()
        service.startService()
        client = self.busy_client()
        _, scraper = self.open()
        drained = service.stopService()
        self.assertEqual(self.endpoint.port.stops, 0)
        self.pending.finish()
        self.leave()
        self.assertTrue(client.half_closed)
        self.assertIn("stop", self.sink.calls)
        self.assertEqual(self.endpoint.port.stops, 0)
        self.assertIn(b"cafeorch_draining 1.0", self.ask("/metrics")[2])
        self.assertFalse(scraper.aborted)
        closed.callback(None)
        self.successResultOf(drained)
        self.assertEqual(self.endpoint.port.stops, 1)
        self.assertTrue(scraper.aborted)

    def test_leaves_nothing_behind(self) -> None:
        """Neither a timer nor an observer of the log is left."""
        before = list(globalLogPublisher._observers)
        service = self.watched()
        service.startService()
        self.assertNotEqual(globalLogPublisher._observers, before)
        service.stopService()
        self.assertEqual(globalLogPublisher._observers, before)
        self.assertEqual(self.reactor.getDelayedCalls(), [])

    def test_given_up(self) -> None:
        """A drain that is given up is a limit that was hit, and closes the endpoint too."""
        service = self.watched(drain_timeout=1.0)
        service.startService()
        self.busy_client()
        service.stopService()
        self.reactor.advance(1)
        self.assertEqual(self.factory.counters.limit_hits["drain_timeout"], 1)
        self.assertEqual(self.endpoint.port.stops, 1)

    def test_problems(self) -> None:
        """What is logged as a warning or worse, from start to end, is shown."""
        service = self.watched()
        service.startService()
        Logger("test").warn("something is odd")
        problems = json.loads(self.ask("/status.json")[2])["problems"]
        self.assertIn("something is odd", [problem["text"] for problem in problems])
        service.stopService()


HOLDING = """
from pathlib import Path
from time import sleep
from cafeteria_orch.server import responses

def hold(message, client):
    while not Path("let_go").exists():
        sleep(0.01)
    responses.send_success(client)

def register(factory):
    factory.register_processor(40, hold, blocking=True)
"""


class RealServer(ProcessTestCase):
    """A process, with real sockets."""

    def test_scraped_while_it_stops(self) -> None:
        """It is ready, then drains and still shows its numbers; what is in hand is finished."""
        (self.folder / "holding.py").write_text(HOLDING)
        options = ("--metrics", "tcp:0:interface=127.0.0.1", "--processors", "holding:register")
        server = self.start(*options)
        self.assertEqual(get(server, "/readyz"), (200, "ok\n"))
        client = self.client(server)
        client.send(batch_frame())
        self.assertEqual(client.read(5), b"\0\0\0\1\1")
        client.send(b"\0\0\0\1\x28")
        in_hand = 'cafeorch_batches_in_hand{table="opcode_40"} 1.0'
        wait_until(lambda: in_hand in get(server, "/metrics")[1], "it is in hand")
        server.signal(signal.SIGTERM)
        wait_until(lambda: get(server, "/readyz") == (503, "draining\n"), "it drains")
        text = get(server, "/metrics")[1]
        self.assertIn('batches_total{outcome="committed",table="users"} 1.0', text)
        self.assertIn(in_hand, text)
        (self.folder / "let_go").touch()
        self.assertEqual(client.read(5), b"\0\0\0\1\1")
        server.wait_until_gone()
        self.assertIn("Server Shut Down.", server.log)
        self.assertNotIn("GET /", server.log)

    def test_pipelined_scrapes_take_neither_memory_nor_turns(self) -> None:
        """Fifty scrapers that ask for 90,000 responses, and read none, keep nobody waiting."""
        server = self.start("--store", "none", "--metrics", "tcp:0:interface=127.0.0.1")
        host, _, port = metrics_address(server).partition(":")
        before = resident_bytes(server.pid)
        client = self.client(server)
        for _ in range(MAX_CONNECTIONS):
            scraper = socket.create_connection((host, int(port)), timeout=10)
            self.addCleanup(scraper.close)
            scraper.sendall(METRICS * (64 * 1024 // len(METRICS)))
        for _ in range(20):
            client.send(batch_frame(rows=[]))
            self.assertEqual(client.read(5), SUCCESS)
        self.assertLess(resident_bytes(server.pid) - before, 64 * 1024 * 1024)
        server.signal(signal.SIGTERM)
        server.wait_until_gone()


def resident_bytes(pid: int) -> int:
    """The memory that a process has at most taken."""
    status = Path(f"/proc/{pid}/status").read_text()
    (kibibytes,) = re.findall(r"VmHWM:\s+(\d+) kB", status)
    return int(kibibytes) * 1024
