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
from cafeteria_orch.common.rate_limit import REPORT_INTERVAL
from cafeteria_orch.daemon.service import OrchestratorService
from cafeteria_orch.observe import page
from cafeteria_orch.observe.http import (
    MAX_CONNECTIONS,
    REQUEST_TIMEOUT,
    Monitor,
    Query,
    Response,
)
from tests.support.builders import SUCCESS, TCPTransport, batch_frame, lose, texts
from tests.support.http import get, metrics_address
from tests.support.processes import ProcessTestCase, wait_until
from tests.support.services import RecordingEndpoint, RecordingSink, ServiceTestCase, raising

LIVEZ = b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n"
METRICS = LIVEZ.replace(b"livez", b"metrics")


class MonitorTestCase(ServiceTestCase):
    """A service with an endpoint for operators."""

    def setUp(self) -> None:
        super().setUp()
        self.sink = RecordingSink()
        self.endpoint = RecordingEndpoint()
        self.monitor = Monitor(
            self.reactor, self.factory, self.endpoint, __version__, sink=self.sink
        )

    def monitored(self, **options: Any) -> OrchestratorService:
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
        protocol.dataReceived(
            f"{method} {path} HTTP/1.1\r\nHost: x\r\n{head}\r\n".encode("latin-1")
        )
        self.reactor.advance(0)
        headers, _, body = transport.value().partition(b"\r\n\r\n")
        lose(protocol)
        return int(headers.split()[1]), headers.decode(), body


class Answers(MonitorTestCase):
    """The response to each path."""

    def test_livez_is_200_in_every_state(self) -> None:
        """A server that answers is alive, even if its store refuses batches."""
        self.sink.reason = "disk full"
        self.assertEqual(self.ask("/livez")[::2], (200, b"ok\n"))

    def test_metrics_come_in_the_format_that_is_asked_for(self) -> None:
        """The default is the text format; OpenMetrics comes on demand."""
        status, headers, body = self.ask("/metrics")
        self.assertEqual(status, 200)
        self.assertIn("\r\nContent-Type: text/plain; version=", headers)
        self.assertIn(b"\ncafeorch_connections_open 0.0\n", body)
        _, headers, _ = self.ask("/metrics", head="Accept: application/openmetrics-text\r\n")
        self.assertIn("application/openmetrics-text", headers)

    def test_status_json_has_the_figures_of_the_page(self) -> None:
        """It is JSON."""
        status, headers, body = self.ask("/status.json")
        self.assertEqual(status, 200)
        self.assertIn("\r\nContent-Type: application/json\r\n", headers)
        self.assertEqual(json.loads(body)["version"], __version__)

    def test_a_browser_loads_nothing_beside_the_page(self) -> None:
        """The page is whole, and its policy allows its own script and style alone."""
        status, headers, body = self.ask("/")
        self.assertEqual(status, 200)
        self.assertIn("\r\nContent-Type: text/html; charset=utf-8\r\n", headers)
        document = body.decode()
        self.assertNotRegex(
            document, r"(?i)<(script|link|img|iframe)[^>]*(src|href)=.?(https?:)?/"
        )
        self.assertNotRegex(
            document, r"@import|url\(|innerHTML|outerHTML|insertAdjacent|document\.write"
        )
        self.assertNotRegex(document, r"<[a-z][^>]* (style|on[a-z]+)=")
        (policy,) = re.findall(r"\r\nContent-Security-Policy: (.*)\r\n", headers)
        self.assertIn("default-src 'none'", policy)
        self.assertNotIn("unsafe", policy)
        for kind in ("script", "style"):
            contents = re.findall(f"<{kind}>(.*?)</{kind}>", document, re.DOTALL)
            digests = [hashlib.sha256(content.encode()).digest() for content in contents]
            sources = [f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests]
            self.assertGreater(len(sources), 1)
            self.assertIn(f"{kind}-src {' '.join(sources)}", policy)

    def test_the_history_comes_when_it_is_asked_for(self) -> None:
        """In one of its ranges; a range that does not exist is refused, and the others are named."""
        self.monitored().startService()
        self.assertIn("rates", json.loads(self.ask("/status.json")[2]))
        for name in ("10m", "1h", "24h"):
            shown = json.loads(self.ask(f"/status.json?range={name}")[2])
            self.assertEqual(shown["history"]["range"], name)
            self.assertNotIn("rates", shown)
        shown = json.loads(self.ask("/status.json?range=none")[2])
        self.assertEqual(shown.keys() & {"history", "rates"}, set())
        for name in ("", "2h", "%ff"):
            asked = f"/status.json?range={name}"
            self.assertEqual(self.ask(asked)[::2], (400, b"range is one of 10m, 1h, 24h, none\n"))

    def test_the_manual_is_served(self) -> None:
        """The page links to it; it asks for nothing, and a browser runs nothing in it."""
        status, headers, body = self.ask("/manual")
        self.assertEqual(status, 200)
        self.assertIn("default-src 'none'", headers)
        self.assertNotIn("script-src", headers)
        self.assertIn(b'<h2 id="log-lines">Log lines</h2>', body)
        self.assertNotRegex(body.decode(), r'(src|href)="(?!#|\./"|metrics"|favicon.ico")')
        self.assertIn(b'href="manual"', self.ask("/")[2])

    def test_where_the_manual_was_not_installed(self) -> None:
        """One line says where it is."""

        def missing() -> None:
            raise FileNotFoundError

        self.patch(page, "manual", missing)
        self.monitor = Monitor(self.reactor, self.factory, self.endpoint, __version__)
        status, _, body = self.ask("/manual")
        self.assertEqual(status, 404)
        self.assertIn(b"docs/operations.md", body)

    def test_the_icon_is_served(self) -> None:
        """Browsers ask for it, whatever they show."""
        status, headers, body = self.ask("/favicon.ico")
        self.assertEqual((status, body[:5]), (200, b"<svg "))
        self.assertIn("\r\nContent-Type: image/svg+xml\r\n", headers)

    def test_other_paths_are_not_found(self) -> None:
        """Neither files nor variants of the known paths are served."""
        for path in ("/x", "/status.html", "/../etc/passwd", "//", "/metrics/", "/%2e%2e/", "*"):
            self.assertEqual(self.ask(path)[::2], (404, b"not found\n"), path)

    def test_a_query_is_ignored(self) -> None:
        """The part behind a question mark changes nothing."""
        self.assertEqual(self.ask("/livez?verbose")[0], 200)

    def test_head_has_headers_alone(self) -> None:
        """The length is that of the GET."""
        status, headers, body = self.ask("/livez", "HEAD")
        self.assertEqual((status, body), (200, b""))
        self.assertIn("Content-Length: 3", headers)

    def test_headers_forbid_caching_and_name_no_server(self) -> None:
        """Nothing is cached, guessed or passed on as a referrer."""
        for path in ("/", "/metrics", "/x"):
            _, headers, _ = self.ask(path)
            self.assertIn("\r\nCache-Control: no-store\r\n", headers)
            self.assertIn("\r\nX-Content-Type-Options: nosniff\r\n", headers)
            self.assertIn("\r\nReferrer-Policy: no-referrer\r\n", headers)
            self.assertIn("\r\nDate: Thu, 01 Jan 1970 00:00:00 GMT", headers)
            self.assertNotIn("Server:", headers)

    def test_a_connection_serves_several_requests(self) -> None:
        """Requests that come together are answered one after the other."""
        protocol, transport = self.open()
        protocol.dataReceived(LIVEZ * 3)
        self.reactor.advance(0)
        self.assertEqual(transport.value().count(b"HTTP/1.1 200 OK"), 3)


class Hostile(MonitorTestCase):
    """Requests that are wrong, and too many of them."""

    def test_other_methods_are_not_allowed(self) -> None:
        """GET and HEAD are."""
        for method in ("POST", "PUT", "DELETE", "OPTIONS", "TRACE", "BREW"):
            status, headers, _ = self.ask("/", method)
            self.assertEqual(status, 405)
            self.assertIn("\r\nAllow: GET, HEAD", headers)

    def test_a_request_with_a_body_is_refused_before_the_body_comes(self) -> None:
        """The body is not kept, and the connection is closed."""
        for head in (b"Content-Length: 999999999999", b"Transfer-Encoding: chunked"):
            for method in (b"GET", b"POST"):
                protocol, transport = self.open()
                protocol.dataReceived(method + b" / HTTP/1.1\r\nHost: x\r\n" + head + b"\r\n\r\n")
                self.assertIn(b"413 Content Too Large", transport.value())
                self.assertTrue(transport.disconnecting)
                transport.clear()
                protocol.dataReceived(b"5\r\nabcde\r\n0\r\n\r\n")
                self.assertEqual(transport.value(), b"")

    def test_a_body_that_comes_at_once_gets_one_response(self) -> None:
        """The refusal is the only one."""
        protocol, transport = self.open()
        protocol.dataReceived(b"GET / HTTP/1.1\r\nContent-Length: 2\r\n\r\nab")
        self.assertEqual(transport.value().count(b"HTTP/1.1"), 1)

    def test_one_response_in_a_turn_of_the_reactor(self) -> None:
        """However many requests come at once, each waits for a turn, and others have theirs."""
        first, transport = self.open()
        second, _ = self.open()
        responded: list[bytes] = []
        respond = self.monitor.site.respond

        def record(path: bytes, query: Query) -> Response:
            if not responded:
                second.dataReceived(LIVEZ)
            responded.append(path)
            return respond(path, query)

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

    def test_a_fault_that_comes_again_is_counted(self) -> None:
        """However often it is asked for, a minute has one traceback, and then a line."""
        error = raising(ZeroDivisionError())
        self.patch(self.monitor.site, "respond", lambda *_: error())
        with capturedLogs() as events:
            for _ in range(5):
                self.assertEqual(self.ask("/metrics")[0], 500)
            self.reactor.advance(REPORT_INTERVAL)
        failed = "action: serve_metrics | result: fail"
        self.assertEqual(texts(events, LogLevel.critical), [failed, f"{failed} | repeated: 4"])
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)

    def test_an_accept_that_is_no_text_gets_the_metrics(self) -> None:
        """Bytes that are no UTF-8 are no reason for a traceback."""
        self.assertIn(
            b"\ncafeorch_connections_open 0", self.ask("/metrics", head="Accept: \xff\r\n")[2]
        )

    def test_what_is_not_http_is_refused_and_not_logged(self) -> None:
        """The connection is closed."""
        with capturedLogs() as events:
            for data in (b"\0\0\0\1\1" * 3 + b"\r\n", b"GET\r\n", b"x" * 100_000 + b"\r\n"):
                protocol, transport = self.open()
                protocol.dataReceived(data)
                self.assertTrue(transport.disconnecting)
        self.assertEqual(events, [])

    def test_a_silent_peer_is_cut_off_and_not_logged(self) -> None:
        """The timeout counts before a request, inside one and after one."""
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

    def test_a_connection_too_many_closes_the_oldest(self) -> None:
        """No number of connections keeps a scraper out."""
        opened = [self.open()[1] for _ in range(MAX_CONNECTIONS + 2)]
        self.assertEqual(sum(transport.aborted for transport in opened), 2)
        self.assertTrue(opened[0].aborted and opened[1].aborted)
        self.assertEqual(self.ask("/livez")[0], 200)

    def test_a_closed_connection_makes_room_and_leaves_no_timer(self) -> None:
        """Connections that were closed before do not count."""
        for _ in range(2 * MAX_CONNECTIONS):
            protocol, transport = self.open()
            lose(protocol)
            self.assertFalse(transport.aborted)
        _, last = self.open()
        for _ in range(MAX_CONNECTIONS - 1):
            self.open()
        self.assertFalse(last.aborted)
        self.assertEqual(len(self.reactor.getDelayedCalls()), MAX_CONNECTIONS)

    def test_requests_are_not_logged(self) -> None:
        """There is no access log."""
        with capturedLogs() as events:
            self.ask("/metrics")
            self.ask("/x", "POST")
        self.assertEqual(events, [])


class Ready(MonitorTestCase):
    """``/readyz``: whether the server takes batches."""

    def check(self, status: int, text: str) -> None:
        self.assertEqual(self.ask("/readyz")[::2], (status, f"{text}\n".encode()))

    def test_readyz_from_the_start_to_the_drain(self) -> None:
        """It is 503 while the server starts and while it drains."""
        service = self.monitored()
        service.privilegedStartService()
        self.check(503, "starting")
        service.startService()
        self.check(200, "ok")
        self.busy_client()
        service.stopService()
        self.check(503, "draining")
        self.assertEqual(self.ask("/livez")[0], 200)

    def test_readyz_gives_the_reason_why_the_store_refuses(self) -> None:
        """It is 503 exactly as long as the store refuses; the reason is one line."""
        self.monitored().startService()
        self.sink.reason = "disk full\nor so"
        self.check(503, "disk full or so")
        self.sink.reason = None
        self.check(200, "ok")

    def test_without_a_store_nothing_refuses(self) -> None:
        """A server without a store is ready."""
        self.monitor = Monitor(self.reactor, self.factory, self.endpoint, __version__)
        self.monitored().startService()
        self.check(200, "ok")


class Life(MonitorTestCase):
    """When it begins to answer, and when it ends."""

    def test_it_listens_once_and_logs_where(self) -> None:
        """It listens before privileges are shed, as the other endpoints do."""
        with capturedLogs() as events:
            service = self.monitored()
            service.privilegedStartService()
            service.startService()
        self.assertEqual(self.endpoint.factories, [self.monitor.site])
        line = "action: serve_metrics | result: success | address: 127.0.0.1:4321"
        self.assertIn(line, texts(events, LogLevel.info))

    def test_an_endpoint_that_cannot_listen_raises(self) -> None:
        """The service does not start."""
        error = CannotListenError("127.0.0.1", 9100, OSError("taken"))
        self.monitor = Monitor(
            self.reactor,
            self.factory,
            TCP4ServerEndpoint(RaisingMemoryReactor(listenException=error), 9100),
            __version__,
        )
        self.assertRaises(CannotListenError, self.monitored().privilegedStartService)

    def test_it_answers_until_the_store_is_closed(self) -> None:
        """Then it closes its connections without waiting for them."""
        closed: Deferred[None] = Deferred()
        self.sink = RecordingSink(lambda: closed)
        service = self.monitored()
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

    def test_a_stop_leaves_no_timer_and_no_observer(self) -> None:
        """The reactor and the log are as they were before."""
        before = list(globalLogPublisher._observers)
        service = self.monitored()
        service.startService()
        self.assertNotEqual(globalLogPublisher._observers, before)
        service.stopService()
        self.assertEqual(globalLogPublisher._observers, before)
        self.assertEqual(self.reactor.getDelayedCalls(), [])

    def test_a_drain_that_is_given_up_closes_the_endpoint(self) -> None:
        """It also counts as a limit that was hit."""
        service = self.monitored(drain_timeout=1.0)
        service.startService()
        self.busy_client()
        service.stopService()
        self.reactor.advance(1)
        self.assertEqual(self.factory.counters.limit_hits["drain_timeout"], 1)
        self.assertEqual(self.endpoint.port.stops, 1)

    def test_warnings_are_shown(self) -> None:
        """The status page has what is logged as a warning or worse."""
        service = self.monitored()
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

    def test_a_draining_server_is_scraped_until_its_end(self) -> None:
        """Its numbers are right while it finishes the message in progress."""
        (self.folder / "holding.py").write_text(HOLDING)
        options = ("--metrics", "tcp:0:interface=127.0.0.1", "--processors", "holding:register")
        server = self.start(*options)
        self.assertEqual(get(server, "/readyz"), (200, "ok\n"))
        client = self.client(server)
        client.send(batch_frame())
        self.assertEqual(client.read(5), b"\0\0\0\1\1")
        client.send(b"\0\0\0\1\x28")
        in_progress = 'cafeorch_batches_in_progress{table="opcode_40"} 1.0'
        wait_until(lambda: in_progress in get(server, "/metrics")[1], "it is in progress")
        server.signal(signal.SIGTERM)
        wait_until(lambda: get(server, "/readyz") == (503, "draining\n"), "it drains")
        text = get(server, "/metrics")[1]
        self.assertIn('batches_total{outcome="committed",table="users"} 1.0', text)
        self.assertIn(in_progress, text)
        (self.folder / "let_go").touch()
        self.assertEqual(client.read(5), b"\0\0\0\1\1")
        client.close()
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
