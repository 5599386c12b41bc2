"""Clients that send as many messages as they can do not stop the others."""

from __future__ import annotations

import contextlib
import select
import signal
import socket
import threading
import time
from collections.abc import Iterator, Sequence

from cafeteria_orch.wire.opcodes import Opcode
from tests.support.builders import SUCCESS, batch_frame, frame
from tests.support.memory import memory_of
from tests.support.processes import HELLO, ProcessTestCase, Server, wait_until

MIB = 1024 * 1024
RESPONSES = frame(bytes([Opcode.BATCH_RECV_SUCCESS])) * 13_000
"""Messages of five bytes that no client should send: as many as a chunk of 64 KiB holds."""
EMPTY_BATCHES = batch_frame(rows=()) * 3_600
"""Batches without a row, which are legal."""


class FloodTests(ProcessTestCase):
    """Hostile clients, and an honest one beside them."""

    def connect(self, server: Server, count: int) -> list[socket.socket]:
        clients = []
        for _ in range(count):
            client = socket.create_connection(("127.0.0.1", server.port), timeout=30)
            self.addCleanup(client.close)
            clients.append(client)
        return clients

    @contextlib.contextmanager
    def flooded(self, clients: Sequence[socket.socket], data: bytes) -> Iterator[None]:
        """Clients that send as much as is read, and read what they are answered."""
        over = threading.Event()

        def flood() -> None:
            for client in clients:
                client.setblocking(False)
            while not over.is_set():
                readable, writable, _ = select.select(clients, clients, [], 0.1)
                with contextlib.suppress(OSError):
                    for client in writable:
                        client.send(data)
                    for client in readable:
                        client.recv(65536)

        thread = threading.Thread(target=flood, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def latencies(self, server: Server, count: int = 40) -> list[float]:
        """How long an honest client waits for the answers to its batches, in seconds, sorted."""
        (client,) = self.connect(server, 1)
        client.sendall(HELLO)
        self.assertEqual(client.recv(5), SUCCESS)
        waited = []
        for number in range(count):
            began = time.monotonic()
            client.sendall(batch_frame(batch_number=number))
            self.assertEqual(client.recv(5), SUCCESS)
            waited.append(time.monotonic() - began)
        return sorted(waited)

    def test_a_flood_of_small_messages_delays_others_by_little(self) -> None:
        """Beside 40 clients that never stop, an honest batch takes milliseconds, not a minute."""
        for what, data in (("responses", RESPONSES), ("empty batches", EMPTY_BATCHES)):
            with self.subTest(what):
                server = self.start()
                hostile = self.connect(server, 40)
                with self.flooded(hostile, data):
                    time.sleep(0.5)
                    waited = self.latencies(server)
                    text = f"median {waited[20] * 1e3:.1f} ms, most {waited[-1] * 1e3:.1f} ms"
                    print(f"40 clients, {what}: {text}")
                    # A batch waited for 64 s here; the rest of this bound is for a busy machine.
                    self.assertLess(waited[20], 1.0)
                    self.assertLess(waited[-1], 5.0)
                    server.signal(signal.SIGTERM)
                    self.assertEqual(server.status(), -signal.SIGTERM)
                self.assertIn("action: drain | result: success", server.log)

    def test_many_clients_that_flood_once(self) -> None:
        """What 900 clients have sent at once takes no more memory than its bytes, and its time."""
        server = self.start("--store", "none")
        before = memory_of(server.pid)
        clients = self.connect(server, 900)
        for client in clients:
            client.sendall(RESPONSES)
        waited = self.latencies(server)
        grown = memory_of(server.pid) - before
        print(f"900 clients at once: most {waited[-1] * 1e3:.1f} ms, {grown / MIB:.0f} MiB")
        self.assertLess(waited[-1], 5.0)
        self.assertLess(grown, 200 * MIB)

    def test_what_a_client_causes_is_not_logged_without_end(self) -> None:
        """13,000 messages that only a server should send are a few lines of the log."""
        server = self.start()
        (client,) = self.connect(server, 1)
        client.sendall(RESPONSES + batch_frame())
        self.assertEqual(client.recv(5), SUCCESS)
        wait_until(lambda: "a response is the server's to send" in server.log, "it is logged")
        self.assertLessEqual(server.log.count("a response is the server's to send"), 100)
