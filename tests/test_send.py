"""Sending a folder: what goes out, and what is said of what does not arrive."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

from twisted.internet.address import IPv4Address
from twisted.internet.defer import Deferred, succeed
from twisted.internet.error import (
    ConnectionDone,
)
from twisted.internet.interfaces import IProtocol, IProtocolFactory, IStreamClientEndpoint
from twisted.internet.task import Clock
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase
from zope.interface import implementer

from cafeteria_orch.client import OrchestratorClient
from cafeteria_orch.messages import Finished, TableBatch, decode
from cafeteria_orch.send import send_directory
from cafeteria_orch.tables import TABLES

from .builders import DATA, FAIL, SUCCESS, TCPTransport, frame, send_options

ADDRESS = IPv4Address("TCP", "192.0.2.1", 8080)
USERS_HEADER = "user_id,gender,birthdate,registered_at\n"
STORES_HEADER = "store_id,store_name,street,postal_code,city,state,latitude,longitude\n"
USER = "7,f,,\n"
STORE = "1,a,,,,,,\n"


def acknowledge(_: bytes) -> bytes:
    """Answer as a server does that takes everything."""
    return SUCCESS


@implementer(IStreamClientEndpoint)
class Wire:
    """An endpoint whose other end is the test.

    :param answer: what to answer to a payload.
    :ivar payloads: what has come so far.
    """

    client: OrchestratorClient

    def __init__(self, answer: Callable[[bytes], bytes] = acknowledge) -> None:
        self.payloads: list[bytes] = []
        self.connections = 0
        self._answer = answer
        self._transport = TCPTransport()

    def connect(self, factory: IProtocolFactory) -> Deferred[IProtocol]:
        self.connections += 1
        protocol: Any = factory.buildProtocol(ADDRESS)
        protocol.makeConnection(self._transport)
        self.client = protocol
        return succeed(protocol)

    def take(self) -> list[bytes]:
        """Read what came since the last time."""
        stream = self._transport.value()
        self._transport.clear()
        new = []
        while stream:
            end = 4 + int.from_bytes(stream[:4], "big")
            new.append(stream[4:end])
            stream = stream[end:]
        self.payloads += new
        return new

    def answer(self, answer: bytes = SUCCESS) -> None:
        """Answer the oldest message without an answer."""
        self.client.dataReceived(answer)

    def lose(self, error: Exception | None = None) -> None:
        """End the connection, as a server does that has answered everything, or otherwise."""
        self.client.connectionLost(Failure(error or ConnectionDone()))

    def serve(self) -> None:
        """Answer until nothing more comes."""
        while new := self.take():
            for payload in new:
                if payload[0] == 3:
                    self.lose()
                else:
                    self.answer(self._answer(payload))

    def messages(self) -> list[Any]:
        """What has come so far, decoded."""
        return [decode(payload) for payload in self.payloads]

    def ends(self) -> list[str | None]:
        """The tables whose end has come."""
        batches = [message for message in self.messages() if isinstance(message, TableBatch)]
        return [message.rows[0][0] for message in batches if message.opcode == 9]


class Sent(NamedTuple):
    """What a run of the command came to."""

    status: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        """What it said that is no progress."""
        return [line for line in self.err.splitlines() if not line.endswith("acknowledged")]


class SendCase(SynchronousTestCase):
    """A test with a folder to send."""

    def setUp(self) -> None:
        self.folder = Path(self.mktemp())
        self.folder.mkdir()
        self.wire = Wire()
        self.out = StringIO()
        self.err = StringIO()

    def write(self, name: str, text: str) -> Path:
        """Make a file in the folder."""
        path = self.folder / name
        path.write_text(text, encoding="utf-8", newline="")
        return path

    def begin(self, directory: Path | None = None, **options: Any) -> Deferred[int]:
        """Start to send."""
        self.patch(sys, "stdout", self.out)
        self.patch(sys, "stderr", self.err)
        options = {"connect": lambda _: self.wire} | options
        parsed = send_options(directory or self.folder, **options)
        return Deferred.fromCoroutine(send_directory(Clock(), parsed))

    def end(self, sending: Deferred[int]) -> Sent:
        """What it came to, when all is over."""
        status = self.successResultOf(sending)
        return Sent(status, self.out.getvalue(), self.err.getvalue())

    def send(self, directory: Path | None = None, **options: Any) -> Sent:
        """Send the folder to a server that answers at once."""
        sending = self.begin(directory, **options)
        if self.wire.connections:
            self.wire.serve()
        return self.end(sending)


class Sending(SendCase):
    """What goes out."""

    def test_order(self) -> None:
        """Table after table, each with its end after its batches; FINISHED at the end."""
        sent = self.send(DATA, batch_rows=9, agency_id=-3)
        self.assertEqual((sent.status, sent.lines), (0, []))
        *messages, last = self.wire.messages()
        self.assertEqual(last, Finished(-3))
        for table in TABLES:
            numbers = []
            while (message := messages.pop(0)).table is table:
                numbers.append(message.batch_number)
            self.assertEqual(numbers, list(range(1, len(numbers) + 1)))
            self.assertEqual((message.opcode, message.rows), (9, ((table.name,),)))
        self.assertEqual(messages, [])
        self.assertEqual(self.wire.connections, 1)

    def test_summary(self) -> None:
        """At the end stands what was acknowledged: by table, and all of it."""
        self.write("users_1.csv", USERS_HEADER + USER * 3)
        self.write("users_2.csv", USERS_HEADER)
        self.write("stores.csv", STORES_HEADER + STORE)
        sent = self.send(batch_rows=2)
        lines = [line.split() for line in sent.out.splitlines()]
        sizes = dict.fromkeys((5, 8), 0)
        for payload in self.wire.payloads:
            if payload[0] in sizes:
                sizes[payload[0]] += len(payload)
        self.assertEqual(
            [line[:5] for line in lines],
            [
                ["table", "files", "rows", "batches", "bytes"],
                ["stores", "1", "1", "1", str(sizes[5])],
                ["users", "2", "3", "3", str(sizes[8])],
                ["acknowledged", "3", "4", "4", str(sum(sizes.values()))],
            ],
        )
        self.assertEqual(sent.lines, [])

    def test_limits(self) -> None:
        """No batch has more rows or bytes than it may."""
        self.send(DATA, batch_rows=4, max_frame_bytes=600)
        for payload, message in zip(self.wire.payloads, self.wire.messages()):
            self.assertLessEqual(len(payload), 600)
            self.assertLessEqual(getattr(message, "amount", 0), 4)

    def test_window(self) -> None:
        """No more batches are on their way than the window says; an answer makes room."""
        self.write("users.csv", USERS_HEADER + USER * 9)
        for window in (1, 3):
            self.wire = Wire()
            sending = self.begin(batch_rows=1, window=window)
            self.assertEqual(len(self.wire.take()), window)
            for _ in range(9 - window):
                self.wire.answer()
                self.assertEqual(len(self.wire.take()), 1)
            self.assertNotIn(9, [payload[0] for payload in self.wire.payloads])
            for _ in range(window):
                self.assertEqual(self.wire.take(), [])
                self.wire.answer()
            (end,) = self.wire.take()
            self.assertEqual(end[0], 9)
            self.wire.answer()
            self.assertEqual(self.wire.take(), [b"\x03\x01\x00\x00\x00"])
            self.assertNoResult(sending)
            self.wire.lose()
            self.assertEqual(self.successResultOf(sending), 0)

    def test_progress(self) -> None:
        """Where there is no terminal a line says at every tenth how far it is."""
        self.write("users.csv", USERS_HEADER + USER * 40)
        sent = self.send(batch_rows=1)
        done = re.findall(r"(?m)^cafeorch-send: (\d+) of 40 rows acknowledged$", sent.err)
        self.assertEqual(done, [str(rows) for rows in range(4, 41, 4)])

    def test_no_rows(self) -> None:
        """Files without rows are sent as such: an empty batch, and the end of the table."""
        self.write("users.csv", USERS_HEADER)
        sent = self.send()
        self.assertEqual((sent.status, sent.lines), (0, []))
        batch, end, last = self.wire.messages()
        self.assertEqual((batch.amount, batch.status, end.opcode), (0, 1, 9))
        self.assertEqual(last, Finished(1))


class BrokenFiles(SendCase):
    """A file that is wrong is named, and costs only itself and the end of its table."""

    def test_one_of_three(self) -> None:
        """The broken file is named with its line; the others go; its table has no end."""
        self.write("users_1.csv", USERS_HEADER + USER)
        broken = self.write("users_2.csv", USERS_HEADER + USER + "8,m\n")
        self.write("stores.csv", STORES_HEADER + STORE)
        sent = self.send()
        self.assertEqual(sent.status, 1)
        (line,) = sent.lines
        self.assertIn(f"{broken}, line 3: ", line)
        opcodes = [payload[0] for payload in self.wire.payloads]
        self.assertEqual(opcodes, [5, 9, 8, 3])
        self.assertEqual(self.wire.ends(), ["stores"])

    def test_all(self) -> None:
        """Where nothing is right nobody is called."""
        paths = [self.write("users.csv", "id\n"), self.write("stores.csv", "")]
        sent = self.send()
        self.assertEqual((sent.status, self.wire.connections, sent.out), (1, 0, ""))
        self.assertEqual(len(sent.lines), 2)
        for path in paths:
            self.assertIn(f"{path}, line 1: ", sent.err)

    def test_of_no_table(self) -> None:
        """A file that belongs to no table is named; the tables are none the less complete."""
        path = self.write("shoes.csv", "x\n")
        self.write("users.csv", USERS_HEADER + USER)
        sent = self.send()
        self.assertEqual((sent.status, self.wire.ends()), (1, ["users"]))
        (line,) = sent.lines
        self.assertIn(str(path), line)
        self.assertIn("users", line)

    def test_row_that_no_frame_holds(self) -> None:
        """A row that is longer than a frame is found before anything is sent."""
        path = self.write("users.csv", USERS_HEADER + USER + f"8,{'m' * 500},,\n")
        sent = self.send(max_frame_bytes=500)
        self.assertEqual((sent.status, self.wire.connections), (1, 0))
        self.assertIn(f"{path}, line 3: ", sent.err)

    def test_gone_meanwhile(self) -> None:
        """A file that is gone when its turn comes is named; the others go on."""
        path = self.write("stores.csv", STORES_HEADER + STORE)
        self.write("users.csv", USERS_HEADER + USER)

        def connect(_: object) -> Wire:
            path.unlink()
            return self.wire

        sent = self.send(connect=connect)
        self.assertEqual((sent.status, self.wire.ends()), (1, ["users"]))
        (line,) = sent.lines
        self.assertIn(str(path), line)

    def test_broken_meanwhile(self) -> None:
        """So is one that has become wrong after it was checked."""
        path = self.write("stores.csv", STORES_HEADER + STORE)
        self.write("users.csv", USERS_HEADER + USER)

        def connect(_: object) -> Wire:
            path.write_text(STORES_HEADER + STORE + "2,b\n", encoding="utf-8")
            return self.wire

        sent = self.send(connect=connect, batch_rows=1)
        self.assertEqual((sent.status, self.wire.ends()), (1, ["users"]))
        (line,) = sent.lines
        self.assertIn(f"{path}, line 3: ", line)

    def test_nothing(self) -> None:
        """A folder without CSV files is no success."""
        self.write("users.txt", "")
        sent = self.send()
        self.assertEqual((sent.status, self.wire.connections, len(sent.lines)), (1, 0, 1))
        self.assertIn(f"{self.folder}: ", sent.err)


class Refusals(SendCase):
    """What the server does not take is named."""

    def refuse(self, number: int, answer: bytes) -> tuple[Path, Sent]:
        """Send users of two lines a batch; one batch gets this answer."""
        path = self.write("users.csv", USERS_HEADER + '1,"a\nb",,\n' + USER * 4)
        self.write("stores.csv", STORES_HEADER + STORE)

        def answers(payload: bytes) -> bytes:
            message = decode(payload)
            return answer if (message.opcode, message.batch_number) == (8, number) else SUCCESS

        self.wire = Wire(answers)
        return path, self.send(batch_rows=2)

    def test_reasons(self) -> None:
        """A FAIL is reported with file, lines and reason; the rest goes on without an end."""
        for answer, words in (
            (FAIL + b"\x01", "later"),
            (FAIL + b"\x02", "reject"),
            (FAIL + b"\x03", "malformed"),
            (FAIL + b"\x63", "not accept"),
            (frame(b"\x02"), "not accept"),
            (frame(b"\x32own"), "not accept"),
        ):
            self.setUp()
            path, sent = self.refuse(2, answer)
            self.assertEqual(sent.status, 1)
            (line,) = sent.lines
            self.assertIn(f"{path}, lines 5 to 6: ", line)
            self.assertIn(words, line)
            self.assertEqual(self.wire.ends(), ["stores"])
            self.assertEqual([payload[0] for payload in self.wire.payloads], [5, 9, 8, 8, 8, 3])

    def test_summary(self) -> None:
        """What was refused does not count as acknowledged."""
        _, sent = self.refuse(1, FAIL + b"\x01")
        self.assertRegex(sent.out, r"(?m)^users +1 +3 +2 ")
        self.assertRegex(sent.out, r"(?m)^acknowledged +2 +4 +3 ")

    def test_end_of_table(self) -> None:
        """A refused end of a table is reported as that."""
        self.write("users.csv", USERS_HEADER + USER)
        self.wire = Wire(lambda payload: FAIL + b"\x01" if payload[0] == 9 else SUCCESS)
        sent = self.send()
        self.assertEqual(sent.status, 1)
        (line,) = sent.lines
        self.assertRegex(line, "end of users.*later")
