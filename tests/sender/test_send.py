"""Sending a folder: what goes out, and what is said of what does not arrive."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple
from uuid import UUID

from twisted.internet.address import IPv4Address
from twisted.internet.defer import Deferred, succeed
from twisted.internet.error import ConnectionAborted, ConnectionDone
from twisted.internet.interfaces import IProtocol, IProtocolFactory, IStreamClientEndpoint
from twisted.internet.task import Clock
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase
from zope.interface import implementer

from cafeteria_orch.sender import cli as send
from cafeteria_orch.sender.cli import STATE_NAME, send_directory
from cafeteria_orch.sender.journal import Journal, JournalError
from cafeteria_orch.wire.messages import ClientHello, Finished, TableBatch, decode
from cafeteria_orch.wire.tables import TABLES
from tests.support.builders import DATA, FAIL, SUCCESS, TCPTransport, frame, send_options

ADDRESS = IPv4Address("TCP", "192.0.2.1", 8080)
USERS_HEADER = "user_id,gender,birthdate,registered_at\n"
STORES_HEADER = "store_id,store_name,street,postal_code,city,state,latitude,longitude\n"
USER = "7,f,,\n"
STORE = "1,a,,,,,,\n"


def acknowledge(_: bytes) -> bytes:
    """Answer as a server does that takes everything."""
    return SUCCESS


class Transport(TCPTransport):
    """A transport whose abort the protocol is told of, as a TCP connection does it."""

    def __init__(self, abort: Callable[[], object]) -> None:
        super().__init__()
        self._abort = abort

    def abortConnection(self) -> None:
        super().abortConnection()
        self._abort()


@implementer(IStreamClientEndpoint)
class Wire:
    """An endpoint whose other end is the test. It answers a CLIENT_HELLO by itself.

    :param answer: what to answer to a payload.
    :ivar clock: the sender's.
    :ivar payloads: what has come so far, but for the CLIENT_HELLO.
    :ivar hellos: who has said CLIENT_HELLO so far.
    """

    def __init__(self, answer: Callable[[bytes], bytes] = acknowledge) -> None:
        self.clock = Clock()
        self.payloads: list[bytes] = []
        self.hellos: list[UUID] = []
        self.connections = 0
        self._client: Any = None
        self._answer = answer

    def connect(self, factory: IProtocolFactory) -> Deferred[IProtocol]:
        self.connections += 1
        self._transport = Transport(
            lambda: self.clock.callLater(0, self.lose, ConnectionAborted())
        )
        self._client = factory.buildProtocol(ADDRESS)
        self._client.makeConnection(self._transport)
        return succeed(self._client)

    def take(self) -> list[bytes]:
        """Read what came since the last time."""
        new = self.read()
        if new and new[0][0] == 30:
            self.hellos.append(decode(new.pop(0)).client_id)
            self.answer()
            new += self.read()
        self.payloads += new
        return new

    def read(self) -> list[bytes]:
        """Read what came since the last time, and answer none of it."""
        self.clock.advance(0)
        stream = self._transport.value()
        self._transport.clear()
        new = []
        while stream:
            end = 4 + int.from_bytes(stream[:4], "big")
            new.append(stream[4:end])
            stream = stream[end:]
        return new

    def answer(self, answer: bytes = SUCCESS) -> None:
        """Answer the oldest message without an answer."""
        self._client.dataReceived(answer)

    def lose(self, error: Exception | None = None) -> None:
        """End the connection, as a server does that has answered everything, or otherwise."""
        client, self._client = self._client, None
        if client is not None:
            client.connectionLost(Failure(error or ConnectionDone()))

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

    def begin(
        self,
        directory: Path | None = None,
        endpoint: Callable[[], IStreamClientEndpoint] | None = None,
        **options: Any,
    ) -> Deferred[int]:
        """Start to send.

        :param endpoint: called for it once all files have been read; the wire otherwise.
        """
        self.patch(sys, "stdout", self.out)
        self.patch(sys, "stderr", self.err)
        self.patch(send, "clientFromString", lambda *_: endpoint() if endpoint else self.wire)
        options = {"connect": "tcp:cafe", "state": self.folder / STATE_NAME, **options}
        parsed = send_options(directory or self.folder, **{"retry_for": 0.0, **options})
        return Deferred.fromCoroutine(send_directory(self.wire.clock, parsed))

    def end(self, sending: Deferred[int]) -> Sent:
        """What it came to, when all is over."""
        self.wire.clock.advance(0)
        status = self.successResultOf(sending)
        self.assertEqual(self.wire.clock.getDelayedCalls(), [])
        return Sent(status, self.out.getvalue(), self.err.getvalue())

    def send(self, directory: Path | None = None, **options: Any) -> Sent:
        """Send the folder to a server that answers at once."""
        sending = self.begin(directory, **options)
        if self.wire.connections:
            self.wire.serve()
        return self.end(sending)

    def send_again(self, directory: Path | None = None, **options: Any) -> Sent:
        """Send to another connection, and look at what this run alone says."""
        self.wire, self.out, self.err = Wire(), StringIO(), StringIO()
        return self.send(directory, **options)


class Sending(SendCase):
    """What goes out."""

    def test_order(self) -> None:
        """A CLIENT_HELLO; table after table, each with its end; FINISHED at the end."""
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
        self.assertEqual((self.wire.connections, len(self.wire.hellos)), (1, 1))

    def test_nothing_before_hello_is_answered(self) -> None:
        """The CLIENT_HELLO goes alone: what follows waits for its answer."""
        self.write("users.csv", USERS_HEADER + USER)
        sending = self.begin()
        (hello,) = self.wire.read()
        self.assertIsInstance(decode(hello), ClientHello)
        self.assertEqual(self.wire.take(), [])
        self.wire.answer()
        self.wire.serve()
        self.assertEqual(self.end(sending).status, 0)

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
            state = self.folder / f"{window}.state"
            sending = self.begin(batch_rows=1, window=window, state=state)
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
            self.assertEqual(self.end(sending).status, 0)

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

    def test_journal_fails_too(self) -> None:
        """What was wrong with the files is said even if the state cannot be written."""
        broken = self.write("users.csv", USERS_HEADER + "8,m\n")
        self.write("stores.csv", STORES_HEADER + STORE)

        def acknowledge(*_: object) -> None:
            raise JournalError("no room")

        self.patch(Journal, "acknowledge", acknowledge)
        sent = self.send()
        self.assertEqual(sent.status, 1)
        self.assertIn(f"{broken}, line 2: ", sent.lines[0])
        self.assertIn("no room", sent.lines[-1])
        self.assertIn("acknowledged", sent.out)

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

        def endpoint() -> Wire:
            path.unlink()
            return self.wire

        sent = self.send(endpoint=endpoint)
        self.assertEqual((sent.status, self.wire.ends()), (1, ["users"]))
        (line,) = sent.lines
        self.assertIn(str(path), line)

    def test_broken_meanwhile(self) -> None:
        """So is one that has become wrong after it was checked."""
        path = self.write("stores.csv", STORES_HEADER + STORE)
        self.write("users.csv", USERS_HEADER + USER)

        def endpoint() -> Wire:
            path.write_text(STORES_HEADER + STORE + "2,b\n", encoding="utf-8")
            return self.wire

        sent = self.send(endpoint=endpoint, batch_rows=1)
        self.assertEqual((sent.status, self.wire.ends()), (1, ["users"]))
        (line,) = sent.lines
        self.assertIn(f"{path}: it has changed", line)

    def test_changed_while_it_is_sent(self) -> None:
        """Rows more, rows fewer, other rows: no end is sent of a file that is not as checked."""
        for text in (STORE * 3, "", STORE.replace("1", "2", 1)):
            path = self.write("stores.csv", STORES_HEADER + STORE)

            def endpoint(path: Path = path, text: str = text) -> Wire:
                path.write_text(STORES_HEADER + text, encoding="utf-8")
                return self.wire

            sent = self.send(endpoint=endpoint, batch_rows=1, state=Path(self.mktemp()))
            self.assertEqual((sent.status, self.wire.ends()), (1, []))
            self.assertIn(f"{path}: it has changed", sent.err)

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

    def test_not_now(self) -> None:
        """A server that takes a batch at no time within --retry-for is given up: one line."""
        _, sent = self.refuse(2, FAIL + b"\x01")
        self.assertEqual(sent.status, 1)
        (line,) = sent.lines
        self.assertRegex(line, "does not take everything now.*[Gg]ave up.*tcp:cafe")
        self.assertEqual([payload[0] for payload in self.wire.payloads], [5, 9, 8, 8, 8])

    def test_summary(self) -> None:
        """What was refused does not count as acknowledged."""
        _, sent = self.refuse(1, FAIL + b"\x02")
        self.assertRegex(sent.out, r"(?m)^users +1 +3 +2 ")
        self.assertRegex(sent.out, r"(?m)^acknowledged +2 +4 +3 ")
        self.assertNotIn("All had been", sent.out)

    def test_end_of_table(self) -> None:
        """A refused end of a table is reported as that."""
        self.write("users.csv", USERS_HEADER + USER)
        self.wire = Wire(lambda payload: FAIL + b"\x02" if payload[0] == 9 else SUCCESS)
        sent = self.send()
        self.assertEqual(sent.status, 1)
        (line,) = sent.lines
        self.assertRegex(line, "end of users.*reject")


class Again(SendCase):
    """The state file makes a second run send what is left, or say why it does not."""

    def setUp(self) -> None:
        super().setUp()
        self.state = self.folder / STATE_NAME
        self.users = self.write("users.csv", USERS_HEADER + USER * 5)

    def assert_refused(self, sent: Sent, *words: str) -> None:
        """It said one line and nothing else, called nobody, and failed."""
        self.assertEqual((sent.status, sent.out, self.wire.connections), (1, "", 0))
        (line,) = sent.lines
        for word in words:
            self.assertIn(word, line)

    def test_all_acknowledged(self) -> None:
        """A second run does not even connect; it says why, and how to send all anew."""
        self.assertNotIn("All had been", self.send(batch_rows=2).out)
        again = self.send_again(batch_rows=2)
        self.assertEqual((again.status, again.err), (0, ""))
        self.assertEqual(self.wire.connections, 0)
        self.assertRegex(again.out, rf"(?m)^All had been acknowledged before\..*{self.state}\.$")

    def test_anew(self) -> None:
        """With the state removed all is sent anew, by somebody else."""
        self.send()
        first = self.wire
        self.state.unlink()
        self.send_again()
        self.assertEqual(self.wire.payloads, first.payloads)
        self.assertNotEqual(self.wire.hellos, first.hellos)

    def test_state_in_folder(self) -> None:
        """Where no --state is given it is in the folder, by its name, and is not sent."""
        self.send(state=None)
        self.assertEqual({path.name for path in self.folder.iterdir()}, {STATE_NAME, "users.csv"})
        again = self.send_again(state=None)
        self.assertEqual((again.status, self.wire.connections), (0, 0))

    def test_state_elsewhere(self) -> None:
        """With --state nothing is written into the folder."""
        state = Path(self.mktemp())
        self.send(state=state)
        self.assertEqual(list(self.folder.iterdir()), [self.users])
        self.assertTrue(state.is_file())

    def test_new_file(self) -> None:
        """A new file goes alone, under the numbers that follow, with the table's end again."""
        self.send(batch_rows=2)
        self.write("users_0.csv", USERS_HEADER + USER)
        again = self.send_again()
        self.assertEqual((again.status, again.lines), (0, []))
        batch, _, _ = self.wire.messages()
        self.assertEqual((batch.batch_number, batch.amount), (4, 1))
        self.assertEqual(self.wire.ends(), ["users"])
        self.assertRegex(again.out, r"(?m)^users +2 +1 +1 ")
        self.assertNotIn("All had been", again.out)

    def test_same_cut(self) -> None:
        """What is left of a file is sent in the batches it was cut into, options or not."""
        sending = self.begin(batch_rows=2, window=1)
        self.wire.take()
        self.wire.answer()
        self.wire.take()
        sending.cancel()
        self.end(sending)
        first = self.wire
        again = self.send_again(batch_rows=4000)
        self.assertEqual(again.status, 0)
        self.assertEqual(self.wire.hellos, first.hellos)
        self.assertEqual(self.wire.payloads[0], first.payloads[1])
        batches = [(m.batch_number, m.amount) for m in self.wire.messages()[:2]]
        self.assertEqual(batches, [(2, 2), (3, 1)])

    def test_refused_before(self) -> None:
        """What was refused is sent again by the next run, and nothing else of it."""

        def refuse_second(payload: bytes) -> bytes:
            return FAIL + b"\x02" if decode(payload).batch_number == 2 else SUCCESS

        self.wire = Wire(refuse_second)
        self.assertEqual(self.send(batch_rows=2).status, 1)
        again = self.send_again(batch_rows=2)
        batch, _, last = self.wire.messages()
        self.assertEqual((again.status, batch.batch_number, last), (0, 2, Finished(1)))
        self.assertEqual(self.wire.ends(), ["users"])

    def test_changed_file(self) -> None:
        """A file that has changed is refused with the remedy; the others go on."""
        self.send(batch_rows=2)
        self.write("users.csv", USERS_HEADER + USER * 6)
        self.write("stores.csv", STORES_HEADER + STORE)
        again = self.send_again()
        self.assertEqual((again.status, self.wire.ends()), (1, ["stores"]))
        (line,) = again.lines
        self.assertIn(f"{self.users}: it has changed since 3 of its 3 batches", line)
        self.assertIn("into a file of its own", line)
        self.assertEqual([payload[0] for payload in self.wire.payloads], [5, 9, 3])
        self.assertNotIn("All had been", again.out)

    def test_state_not_writable(self) -> None:
        """A state that cannot be written is one line, with the remedy."""
        folder = Path(self.mktemp())
        folder.mkdir()
        for state, why in (
            (folder, "Is a directory"),
            (folder / "none" / "state", "No such file"),
            (self.users / "state", "Not a directory"),
        ):
            self.setUp()
            self.assert_refused(
                self.send(state=state), f"the state file {state}: {why}", "--state"
            )

    def test_state_in_use(self) -> None:
        """A state that another cafeorch-send uses is one line; it is free when that has ended."""
        out, err, wire = self.out, self.err, self.wire
        sending = self.begin()
        self.assert_refused(
            self.send_again(),
            f"the state file {self.state}: ",
            "another cafeorch-send is using it",
        )
        self.out, self.err, self.wire = out, err, wire
        wire.serve()
        self.assertEqual(self.end(sending).status, 0)
        self.assertEqual(self.send_again().status, 0)

    def test_state_about_another_server(self) -> None:
        """What one server has acknowledged says nothing of another: one line."""
        self.send()
        before = self.state.read_bytes()
        again = self.send_again(connect="tcp:bar")
        self.assert_refused(again, str(self.state), "tcp:cafe", "tcp:bar", "--state")
        self.assertEqual(self.state.read_bytes(), before)

    def test_no_state(self) -> None:
        """A file that is none of these is one line, and left as it is."""
        for text in ("notes\n", "[]\n", "{}\n", '{"client_id": "7", "server": "tcp:cafe"}\n'):
            self.setUp()
            self.state.write_text(text, encoding="utf-8")
            self.assert_refused(self.send(), str(self.state), "no state of", "--state")
            self.assertEqual(self.state.read_text(encoding="utf-8"), text)

    def test_plans_come_first(self) -> None:
        """All plans are in the state before anything is sent, and no acknowledgement yet."""
        self.write("stores.csv", STORES_HEADER + STORE)
        sending = self.begin()
        records = [json.loads(line) for line in self.state.read_text("utf-8").splitlines()]
        self.assertEqual(
            [record.get("file") for record in records], [None, "stores.csv", "users.csv"]
        )
        self.wire.serve()
        self.assertEqual(self.end(sending).status, 0)
