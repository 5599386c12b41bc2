"""A real server whose clients try to take all of its memory, or keep it waiting."""

from __future__ import annotations

import contextlib
import random
import resource
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from unittest import SkipTest

from cafeteria_orch.wire.tables import USERS
from tests.support.builders import SUCCESS, batch_frame
from tests.support.faults import slow
from tests.support.memory import memory_of
from tests.support.processes import HELLO, Client, ProcessTestCase, Server, events_in, wait_until

MIB = 1024 * 1024


def full_batch(number: int = 1) -> bytes:
    """The frame of a batch of nearly a mebibyte."""
    row = ("7" * 200, "female", "2003-06-13", "2024-01-11 17:50:12")
    data = batch_frame(table=USERS, rows=[row] * 3400, batch_number=number)
    assert 0.9 * MIB < len(data) < MIB
    return data


class MemoryLimitTests(ProcessTestCase):
    """What many clients at once cost."""

    def setUp(self) -> None:
        super().setUp()
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if hard < 4096:
            raise SkipTest(f"only {hard} files may be open")
        if soft < 4096:
            resource.setrlimit(resource.RLIMIT_NOFILE, (4096, hard))
            self.addCleanup(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))

    def connect(self, server: Server, count: int, data: bytes = b"") -> list[socket.socket]:
        clients = []
        for _ in range(count):
            client = socket.create_connection(("127.0.0.1", server.port), timeout=10)
            self.addCleanup(client.close)
            client.sendall(data)
            clients.append(client)
        return clients

    def assert_served(self, server: Server, count: int = 1) -> None:
        """An honest client has full batches acknowledged."""
        with closing(Client(server.port)) as client:
            client.send(HELLO)
            for number in range(count):
                client.send(full_batch(number))
            self.assertEqual(client.read(5 * (count + 1)), SUCCESS * (count + 1))

    def assert_answered(self, server: Server, clients: Sequence[socket.socket]) -> None:
        """Every frame is acknowledged, but for those that came too slowly on a busy machine."""
        answers = Counter(client.recv(5) for client in clients)
        too_slow = server.log.count("a frame came too slowly while others waited for memory")
        self.assertEqual(answers, Counter({SUCCESS: len(clients) - too_slow, b"": too_slow}))
        self.assertLess(too_slow, len(clients) // 10)

    def test_headers_cost_nothing(self) -> None:
        """900 clients that declare the longest frame and send nothing of it cost a few MiB."""
        server = self.start("--store", "none")
        self.assert_served(server)
        before = memory_of(server.pid)
        self.connect(server, 900, (MIB).to_bytes(4, "big"))
        self.assert_served(server)
        grown = memory_of(server.pid) - before
        print(f"900 headers: {grown / MIB:.1f} MiB")
        self.assertLess(grown, 16 * MIB)

    def test_too_long(self) -> None:
        """300 clients that declare 2 GiB are refused by their headers, and cost nothing."""
        server = self.start("--store", "none")
        self.assert_served(server)
        before = memory_of(server.pid)
        clients = self.connect(server, 300, b"\x08\xff\xff\xff\x7f" + bytes(1000))
        self.assertEqual([client.recv(5) for client in clients], [b"\2\0\0\0\0"] * 300)
        self.assertLess(memory_of(server.pid) - before, 8 * MIB)
        self.assert_served(server)

    def test_half_frames(self) -> None:
        """300 clients that send most of a frame stay below the limit; the others are served."""
        limit = 32 * MIB
        server = self.start("--store", "none", "--max-in-flight-bytes", str(limit))
        self.assert_served(server)
        before = memory_of(server.pid)
        part = full_batch()[: 900 * 1024]
        clients = self.connect(server, 300)
        threads = [threading.Thread(target=_send, args=(client, part)) for client in clients]
        for thread in threads:
            thread.start()
        # So that all have sent what they can.
        time.sleep(0.7)
        # What is beyond the limit is a chunk of each.
        grown = memory_of(server.pid) - before
        print(f"300 half frames: {grown / MIB:.1f} MiB, the limit is {limit // MIB} MiB")
        self.assertLess(grown, limit + 300 * 65536 + 16 * MIB)
        with closing(Client(server.port)) as other:
            other.send(HELLO)
            self.assertEqual(other.read(5), SUCCESS)
        # All of them go on: nobody starves, nothing is lost.
        rest = full_batch()[len(part) :]
        for thread, client in zip(threads, clients):
            threading.Thread(target=_finish, args=(thread, client, rest), daemon=True).start()
        self.assert_answered(server, clients)
        self.assert_served(server, 3)
        self.assertNotIn("error", server.log)

    def test_frames_that_begin_with_any_number_of_bytes(self) -> None:
        """300 clients that send a few bytes of a frame, and later the rest, stay below the limit.

        Some of them send less than a frame's length at first, some just that, some more.
        """
        limit = 32 * MIB
        server = self.start("--store", "none", "--max-in-flight-bytes", str(limit))
        self.assert_served(server)
        before = memory_of(server.pid)
        data = full_batch()
        most = data[: 900 * 1024]
        half_frames = self.connect(server, 18)
        for client in half_frames:
            threading.Thread(target=_send, args=(client, most), daemon=True).start()
        shapes = random.Random(11)
        clients, threads = [], []
        for _ in range(300):
            first = shapes.choice((1, 2, 3, 3, 3, 4, 5, 70_000))
            (client,) = self.connect(server, 1, data[:first])
            clients.append(client)
            rest = most[first:]
            threads.append(threading.Thread(target=_send, args=(client, rest), daemon=True))
        for thread in threads:
            thread.start()
        # So that all have sent what they can.
        time.sleep(0.7)
        grown = memory_of(server.pid) - before
        print(f"300 clients of any shape: {grown / MIB:.1f} MiB, the limit is {limit // MIB} MiB")
        self.assertLess(grown, limit + 318 * 65536 + 16 * MIB)
        for thread, client in zip(threads, clients):
            threading.Thread(
                target=_finish, args=(thread, client, data[len(most) :]), daemon=True
            ).start()
        for client in half_frames:
            with contextlib.suppress(OSError):
                client.sendall(data[len(most) :])
        self.assert_answered(server, [*half_frames, *clients])

    @slow
    def test_stalled_frames_do_not_keep_an_honest_one_waiting(self) -> None:
        """Among 990 clients that stall with most of a frame, a full batch takes 10 s at most."""
        server = self.start("--store", "none")
        self.assert_served(server)
        data = full_batch()[: 900 * 1024]
        for client in self.connect(server, 990):
            threading.Thread(target=_send, args=(client, data), daemon=True).start()
        time.sleep(2)
        began = time.monotonic()
        (client,) = self.connect(server, 1)
        client.settimeout(120)
        client.sendall(full_batch())
        self.assertEqual(client.recv(5), SUCCESS)
        seconds = time.monotonic() - began
        print(f"a full batch among 990 stalled frames: {seconds:.1f} s")
        self.assertLess(seconds, 10)

    def test_slow_frames(self) -> None:
        """Clients that never end a frame are closed, and one that waited for memory is served."""
        server = self.start(
            "--store", "none", "--max-in-flight-bytes", str(4 * MIB), "--frame-timeout", "1"
        )
        slow = self.connect(server, 40, full_batch()[: 60 * 1024])
        self.assert_served(server)
        for client in slow:
            self.assertEqual(client.recv(1), b"")
        server.signal(signal.SIGTERM)
        server.status()
        # That of the time, or that of the pace while the honest one waited.
        self.assertEqual(events_in(server.log.splitlines(), " bytes were missing"), 40)

    def test_answers_that_are_not_read(self) -> None:
        """A client that sends for ever and reads nothing is cut off, and costs little."""
        (self.folder / "wordy.py").write_text(
            "from cafeteria_orch import responses\n"
            "def answer(message, client):\n"
            "    responses.send(client, 40, bytes(65536))\n"
            "def register(factory):\n"
            "    factory.register_processor(40, answer)\n"
        )
        server = self.start(
            "--store", "none", "--frame-timeout", "1", "--processors", "wordy:register"
        )
        before = memory_of(server.pid)
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            data = b"\0\0\0\1\x28" * 1000
            with self.assertRaises(OSError):
                while True:
                    client.sendall(data)
        wait_until(lambda: "did not read its answers" in server.log, "it is logged")
        self.assertLess(memory_of(server.pid) - before, 16 * MIB)
        self.assert_served(server)

    def test_slow_processor(self) -> None:
        """Behind a thread that hangs its client is told to try again; others are served."""
        (self.folder / "slow.py").write_text(
            "import time\n"
            "def register(factory):\n"
            "    factory.register_processor(40, lambda *_: time.sleep(0.7), blocking=True)\n"
        )
        server = self.start(
            "--store", "none", "--processing-timeout", "0.3", "--processors", "slow:register"
        )
        client = self.client(server)
        client.send(b"\0\0\0\1\x28" + HELLO.replace(b"\x1e", b"\x28", 1) + batch_frame())
        self.assertEqual(client.read(6), b"\0\0\0\2\2\1")
        self.assert_served(server)
        self.assertEqual(client.read(6), b"\0\0\0\2\2\1")
        self.assertEqual(client.read(5), SUCCESS)


def _send(client: socket.socket, data: bytes) -> None:
    client.settimeout(60)
    # The server closes those that stall.
    with contextlib.suppress(OSError):
        client.sendall(data)


def _finish(before: threading.Thread, client: socket.socket, data: bytes) -> None:
    before.join()
    _send(client, data)
