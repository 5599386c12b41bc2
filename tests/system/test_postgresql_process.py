"""A real server on a real PostgreSQL, which goes away under load: nothing is lost or doubled."""

from __future__ import annotations

import csv
import subprocess
import threading
import time
from contextlib import closing

from cafeteria_orch.wire.messages import TableBatch, encode
from cafeteria_orch.wire.tables import TABLES, USERS
from tests.support.builders import DATA, SUCCESS, frame
from tests.support.postgresql import TERMINATE, cluster, query
from tests.support.processes import PROGRAMS, Client, ProcessTestCase, wait_until

FIELD_CLIENTS = 4


class FieldClient(threading.Thread):
    """A client that does not say who it is, does not wait, and never sends again.

    :ivar sent: how many batches it has sent.
    :ivar answers: all that it got for them.
    """

    def __init__(self, port: int, number: int) -> None:
        super().__init__(daemon=True)
        self.sent = 0
        self.answers = b""
        self.stopping = threading.Event()
        self._port = port
        self._number = number

    def run(self) -> None:
        """Send until it is stopped, then read all answers."""
        with closing(Client(self._port)) as client:
            while not self.stopping.wait(0.01):
                self.sent += 1
                row = (f"{self._number}/{self.sent}", "x\ty", r"\N", "")
                client.send(frame(encode(TableBatch(USERS, self.sent, 0, (row,) * 20))))
            while len(self.answers) < self.sent * len(SUCCESS):
                answers = client.read(len(SUCCESS))
                if not answers:
                    return
                self.answers += answers


class PostgreSQLProcessTests(ProcessTestCase):
    """The server as an operator runs it."""

    def setUp(self) -> None:
        super().setUp()
        self.cluster = cluster()
        self.url = self.cluster.new_database()

    def test_exports(self) -> None:
        """All that ``cafeorch-send`` sends is there once, also after a second sender's tables."""
        server = self.start("--store", self.url)
        command = [str(PROGRAMS / "cafeorch-send"), str(DATA), "--agency-id=1", "--connect"]
        command.append(f"tcp:127.0.0.1:{server.port}")
        for state in ("one", "two"):
            sending = subprocess.run(
                [*command, "--state", state], cwd=self.folder, capture_output=True, check=False
            )
            self.assertEqual(sending.returncode, 0, sending.stderr)
        for table in TABLES:
            lines = 0
            for path in (DATA / table.name).glob("*.csv"):
                with path.open(encoding="utf-8-sig", newline="") as file:
                    lines += len(list(csv.DictReader(file)))
            found = query(self.url, f"SELECT count(*) FROM {table.name}")
            self.assertEqual(found, [(2 * lines,)], table.name)
        self.assertEqual(
            query(self.url, "SELECT count(*), bool_and(complete) FROM ingest_status"), [(10, True)]
        )

    def test_outages(self) -> None:
        """Lost connections and a restart of PostgreSQL: no FAIL, nothing lost, nothing twice."""
        server = self.start("--store", self.url)
        clients = [FieldClient(server.port, number) for number in range(FIELD_CLIENTS)]
        for client in clients:
            client.start()
        for _ in range(5):
            time.sleep(0.2)
            query(self.url, TERMINATE)
        self.cluster.stop()
        time.sleep(1.5)
        self.cluster.start()
        time.sleep(1.5)
        for client in clients:
            client.stopping.set()
        for client in clients:
            client.join(30)
            self.assertEqual(client.answers, SUCCESS * client.sent)
        stored = query(self.url, "SELECT user_id, count(*) FROM users GROUP BY user_id")
        expected = {
            f"{number}/{batch}": 20
            for number, client in enumerate(clients)
            for batch in range(1, client.sent + 1)
        }
        self.assertEqual(dict(stored), expected)
        total = sum(client.sent for client in clients)
        self.assertEqual(query(self.url, "SELECT count(*) FROM batch"), [(total,)])
        self.assertIn("action: store | result: success", server.log)

    def test_password(self) -> None:
        """A password of the URL is in no refusal and no log."""
        url = self.url.replace("@", ":s3cr%2Ft@")
        refused = self.launch("--port", "0", "--store", url.replace("127.0.0.1:", "127.0.0.1:1"))
        self.assertEqual(refused.status(), 1)
        self.assertNotRegex(refused.text("stderr") + refused.log, "s3cr")
        self.assertRegex(refused.text("stderr"), r"^cafeorch: the store [^\n]*\n$")
        server = self.start("--store", url)
        self.cluster.stop()
        with closing(Client(server.port)) as client:
            client.send(frame(encode(TableBatch(USERS, 1, 0, (("1", "", "", ""),)))))
            wait_until(
                lambda: "action: store | result: fail" in server.log, "the outage is logged"
            )
            self.assertNotRegex(server.log, "s3cr")
            self.cluster.start()
            self.assertEqual(client.read(len(SUCCESS)), SUCCESS)
