"""No acknowledgement leaves before the sync that covers its batch: the kernel's word for it."""

from __future__ import annotations

import re
import subprocess
from collections import defaultdict, deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import NamedTuple
from unittest import SkipTest
from uuid import uuid4

from twisted.trial.unittest import SynchronousTestCase

from cafeteria_orch.wire.messages import TableBatch, encode
from cafeteria_orch.wire.tables import USERS
from tests.support.builders import SUCCESS
from tests.support.faults import RawClient, Server, new_folder

BATCHES = 200

STRACE = (
    *("strace", "-f", "-y", "-xx", "-s", "65536"),
    *("-e", "trace=fdatasync,fsync,sendto,sendmsg,write,writev,pwrite64,recvfrom"),
)

_MARKER = re.compile(rb"batch-\d{6}")
"""The one row of each batch holds one: it is found in what is read, and in what is written."""

_CALL = re.compile(r"(?:<\.\.\. )?(\w+)(?:\(| resumed>)(.*)")
_FILE = re.compile(r"(\d+)<([^>]*)>")
_STRING = re.compile(r'"([^"]*)"')


class Call(NamedTuple):
    """A system call: the lines of the trace in which it began and ended, and its data."""

    began: int
    ended: int
    name: str
    file: int
    path: str
    data: bytes


def system_calls(trace: Path) -> Iterator[Call]:
    """Read what strace has written; the calls of several threads overlap."""
    unfinished: dict[str, tuple[int, str]] = {}
    with trace.open() as lines:
        for number, line in enumerate(lines):
            thread, _, rest = line.partition(" ")
            match = _CALL.match(rest.strip())
            if match is None:
                continue
            name, text = match.groups()
            began, start = unfinished.pop(thread, (number, ""))
            text = start + text
            if text.endswith("<unfinished ...>"):
                unfinished[thread] = began, text
                continue
            if (file := _FILE.match(text)) and not text.rpartition(" = ")[2].startswith("-1"):
                data = b"".join(map(_bytes, _STRING.findall(text)))
                path = _bytes(file[2]).decode()
                yield Call(began, number, name, int(file[1]), path, data)


def _bytes(text: str) -> bytes:
    return bytes.fromhex(text.replace(r"\x", "")) if text.startswith(r"\x") else text.encode()


class Trace:
    """The story of every batch, as the server's system calls tell it.

    :ivar acknowledged: the batches by their markers, in the order of their acknowledgements.
    :ivar premature: what was acknowledged without a sync of the WAL, from beginning to end,
        between the write of the batch into it and the first byte of the acknowledgement.
    :ivar syncs: how often the WAL was synced.
    """

    def __init__(self, path: Path) -> None:
        self.acknowledged: list[bytes] = []
        self.premature: list[bytes] = []
        calls = list(system_calls(path))
        synced = [call for call in calls if call.name in ("fdatasync", "fsync") and _is_wal(call)]
        self.syncs = len(synced)
        written: dict[bytes, int] = {}
        for call in calls:
            if _is_wal(call) and call.name in ("pwrite64", "write"):
                for marker in _MARKER.findall(call.data):
                    written.setdefault(marker, call.ended)
        # A connection's batches without an acknowledgement; the first is that of its hello.
        owed: dict[int, deque[bytes | None]] = defaultdict(lambda: deque([None]))
        # What is read counts from when it is there, what is sent from when it may leave.
        steps = [(call.ended if call.name == "recvfrom" else call.began, call) for call in calls]
        for now, call in sorted(steps):
            if call.name == "recvfrom":
                if call.data:
                    owed[call.file].extend(_MARKER.findall(call.data))
                else:
                    owed.pop(call.file, None)
                continue
            if call.file not in owed:
                continue
            for _ in range(call.data.count(SUCCESS)):
                marker = owed[call.file].popleft()
                if marker is None:
                    continue
                self.acknowledged.append(marker)
                write = written.get(marker, now)
                if not any(write < sync.began and sync.ended < now for sync in synced):
                    self.premature.append(marker)


def _is_wal(call: Call) -> bool:
    return call.path.endswith("-wal")


class SyncOrderTests(SynchronousTestCase):
    """A server under strace."""

    def setUp(self) -> None:
        try:
            subprocess.run(
                [*STRACE, "-o", "/dev/null", "true"], check=True, capture_output=True, timeout=10
            )
        except FileNotFoundError:
            raise SkipTest("there is no strace") from None
        except subprocess.CalledProcessError as error:
            raise SkipTest(f"strace does not work here: {error.stderr!r}") from None

    def test_one_at_a_time(self) -> None:
        """200 batches, each sent when the one before it was acknowledged: a sync for each."""
        trace = self._trace(clients=1, window=1)
        self.assertGreaterEqual(trace.syncs, BATCHES)

    def test_groups(self) -> None:
        """200 batches of 8 clients, some ahead of the answers: the syncs cover whole groups."""
        trace = self._trace(clients=8, window=4)
        self.assertLess(trace.syncs, BATCHES)

    def _trace(self, clients: int, window: int) -> Trace:
        path = new_folder(self) / "trace"
        server = Server(self, *STRACE, "-o", str(path))
        server.start()
        server.wait_until_it_listens()
        with ThreadPoolExecutor(clients) as pool:
            share = BATCHES // clients
            runs = [
                pool.submit(self._send, server.port, range(start, start + share), window)
                for start in range(0, BATCHES, share)
            ]
        for run in runs:
            run.result()
        server.stop()
        trace = Trace(path)
        self.assertEqual(trace.premature, [])
        markers = [f"batch-{index:06}".encode() for index in range(BATCHES)]
        self.assertEqual(sorted(trace.acknowledged), markers)
        return trace

    def _send(self, port: int, indexes: range, window: int) -> None:
        with closing(RawClient(port, uuid4())) as client:
            for position, index in enumerate(indexes):
                row = (f"batch-{index:06}", "male", "2003-06-13", "2024-01-11 17:50:12")
                client.send(encode(TableBatch(USERS, index, 0, (row,))))
                if position >= window - 1:
                    client.expect_success()
            for _ in range(window - 1):
                client.expect_success()
