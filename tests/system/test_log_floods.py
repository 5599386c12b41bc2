"""What clients can cause in the log of a real server is bounded, and a health check is no failure."""

from __future__ import annotations

import contextlib
import re
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import closing

from cafeteria_orch.common.rate_limit import TRAFFIC
from cafeteria_orch.wire.opcodes import Opcode
from tests.support.admission import version_2
from tests.support.builders import SUCCESS, batch_frame, frame
from tests.support.certificates import Files
from tests.support.processes import HELLO, ProcessTestCase, Server, events_in
from tests.support.tracing import untraced

SECONDS = 1.0
CLIENTS = 40
KINDS = 3
"""Of lines about traffic: connections, messages without data, and FINISHED."""
OWN_LINES = 20
"""Of the server itself, from its start to its end."""

RESPONSES = frame(bytes([Opcode.BATCH_RECV_SUCCESS])) * 1000
LOCAL = version_2(command=0x20)
"""What a balancer's health check sends if it sends PROXY headers."""


def reset(client: socket.socket) -> None:
    """Close a connection as a health check does: by a reset."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


class LogFloodTestCase(ProcessTestCase):
    """A server, and clients that connect to it over and over."""

    def flood(self, server: Server, talk: Callable[[socket.socket], object]) -> int:
        """Have all clients connect and talk for a while; return how many connections they had."""
        over = threading.Event()
        connections: list[int] = []

        def run() -> None:
            number = 0
            while not over.is_set():
                with contextlib.suppress(OSError):
                    client = socket.create_connection(("127.0.0.1", server.port), timeout=10)
                    number += 1
                    with closing(client):
                        talk(client)
            connections.append(number)

        threads = [threading.Thread(target=run, daemon=True) for _ in range(CLIENTS)]
        for thread in threads:
            thread.start()
        time.sleep(SECONDS)
        over.set()
        for thread in threads:
            thread.join()
        return sum(connections)

    def end(self, server: Server) -> list[str]:
        """The lines of a server that was stopped."""
        server.signal(signal.SIGTERM)
        server.status()
        return server.log.splitlines()


@untraced
class Floods(LogFloodTestCase):
    """Forty hostile clients of one address."""

    def check_is_bounded(self, lines: list[str]) -> None:
        """The lines are few; in these seconds there were as many as in a minute."""
        self.assertLess(len(lines), KINDS * (TRAFFIC.lines + 1) + OWN_LINES)

    def test_malformed_messages_give_one_line_and_their_number(self) -> None:
        """The log has the first, and at the end their number; an honest client has its lines."""
        server = self.start("--store", "none")

        def talk(client: socket.socket) -> None:
            client.sendall(frame(b"\x63"))
            client.recv(6)

        connections = self.flood(server, talk)
        batches = 200
        with closing(socket.create_connection(("127.0.0.1", server.port), timeout=10)) as honest:
            for number in range(batches):
                honest.sendall(batch_frame(batch_number=number))
                self.assertEqual(honest.recv(5), SUCCESS)
        lines = self.end(server)
        of_data = [line for line in lines if "| opcode: 8" in line]
        self.assertEqual(len(of_data), 2 * batches)
        self.check_is_bounded([line for line in lines if line not in of_data])
        malformed = [line for line in lines if "opcode: 99 | error:" in line]
        self.assertEqual(len(malformed), 2)
        print(f"{connections} malformed connections: {len(lines)} lines")
        self.assertGreater(events_in(lines, "opcode: 99 | error:"), CLIENTS)

    def test_responses_without_end(self) -> None:
        """Messages that only a server should send, thousands in a chunk, are a few lines too."""
        server = self.start("--store", "none")
        deadline = time.monotonic() + SECONDS

        def talk(client: socket.socket) -> None:
            while time.monotonic() < deadline:
                client.sendall(RESPONSES)

        self.flood(server, talk)
        lines = self.end(server)
        self.check_is_bounded(lines)
        ignored = events_in(lines, "a response is the server's to send")
        print(f"{ignored} responses: {len(lines)} lines")
        self.assertGreater(ignored, 1000)
        # Beside the CLIENT_HELLO of the test itself.
        self.assertEqual(events_in(lines, "receive_message | result: success") - 1, ignored)

    def test_connections_without_end(self) -> None:
        """Neither connections that are reset at once, nor those that send FINISHED, fill the log."""
        server = self.start("--store", "none")
        for talk in (reset, lambda client: client.sendall(frame(b"\x03"))):
            self.flood(server, talk)
        lines = self.end(server)
        self.check_is_bounded(lines)
        accepted = events_in(lines, "action: accept_connections | result: success")
        print(f"{accepted} connections: {len(lines)} lines")
        self.assertGreater(accepted, TRAFFIC.lines)
        self.assertGreater(events_in(lines, "action: finished"), CLIENTS)


class HealthChecks(LogFloodTestCase):
    """A balancer connects and resets, every two seconds."""

    def check(self, server: Server, *sent: bytes) -> None:
        """No check is worth a warning; the server serves on."""
        for data in sent:
            for _ in range(3):
                client = socket.create_connection(("127.0.0.1", server.port), timeout=10)
                if data:
                    client.sendall(data)
                    time.sleep(0.05)
                reset(client)
        lines = self.end(server)
        self.assertEqual(
            [line for line in lines if re.search(r"#(warn|error|critical)\]", line)], []
        )

    def test_plain(self) -> None:
        """A connection that is reset before a byte."""
        self.check(self.start("--store", "none"), b"")

    def test_with_proxy_headers(self) -> None:
        """One that is reset before, or behind, its PROXY header."""
        server = self.launch("--port", "0", "--store", "none", "--proxy-protocol")
        server.wait_until_listening()
        with closing(socket.create_connection(("127.0.0.1", server.port), timeout=10)) as client:
            client.sendall(LOCAL + HELLO)
            self.assertEqual(client.recv(5), SUCCESS)
        self.check(server, b"", LOCAL)

    def test_with_tls(self) -> None:
        """One that is reset before its TLS handshake, with and without a PROXY header."""
        files = Files(self.folder)
        server = self.launch(
            "--port", "0", "--store", "none", "--proxy-protocol", "--tls-cert", str(files.cert)
        )
        server.wait_until_listening()
        self.check(server, b"", LOCAL)
