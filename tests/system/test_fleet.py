"""Nodes of a fleet as real processes: one port, one PostgreSQL; one is killed, and a standby is away."""

from __future__ import annotations

import contextlib
import json
import signal
import threading
from contextlib import closing
from uuid import UUID

from cafeteria_orch.wire.messages import ClientHello, TableBatch, encode
from cafeteria_orch.wire.tables import USERS
from tests.support.builders import SUCCESS, frame
from tests.support.http import get
from tests.support.ports import reserve_port
from tests.support.postgresql import cluster, query
from tests.support.processes import Client, ProcessTestCase, Server, wait_until
from tests.support.standbys import add_standby, require_standby


def batch(number: int, user: str) -> bytes:
    """A batch with one user."""
    return frame(encode(TableBatch(USERS, number, 0, ((user, "", "", ""),))))


class Sender(threading.Thread):
    """A client that says who it is, and sends what was not acknowledged again when it is cut off.

    :ivar acknowledged: the users whose batches were.
    :ivar cuts: how often it was cut off.
    """

    def __init__(self, port: int, number: int) -> None:
        super().__init__(daemon=True)
        self.acknowledged: list[str] = []
        self.cuts = 0
        self.stopping = threading.Event()
        self._port = port
        self._number = number

    def run(self) -> None:
        """Send, until it is stopped and has no batch without an acknowledgement."""
        while not self.stopping.is_set():
            with contextlib.suppress(OSError), closing(Client(self._port)) as client:
                client.send(frame(encode(ClientHello(UUID(int=self._number + 1)))))
                if client.read(len(SUCCESS)) == SUCCESS:
                    self._send_batches(client)
            self.cuts += 1

    def _send_batches(self, client: Client) -> None:
        while not self.stopping.is_set():
            number = len(self.acknowledged) + 1
            user = f"{self._number}/{number}"
            client.send(batch(number, user))
            if client.read(len(SUCCESS)) != SUCCESS:
                return
            self.acknowledged.append(user)


class FleetTests(ProcessTestCase):
    """Two nodes that share a port and a database."""

    def setUp(self) -> None:
        super().setUp()
        self.url = cluster().new_database()
        self.port = reserve_port(self)
        self.base = self.folder
        self.nodes = [self.start_node(name) for name in ("cafe-1", "cafe-2")]

    def start_node(self, name: str) -> Server:
        """Start a node in a folder of its own, and wait until it takes batches."""
        self.folder = self.base / name
        self.folder.mkdir()
        node = self.launch(
            *("--port", str(self.port), "--reuse-port", "--node", name, "--store", self.url),
            *("--metrics", "tcp:0:interface=127.0.0.1", "--log-format", "json"),
        )
        wait_until(lambda: get(node, "/readyz")[0] == 200, "the node is ready")
        return node

    def send(self, user: str) -> bytes:
        """The answer to one batch, over a new connection."""
        with closing(Client(self.port)) as client:
            client.send(batch(1, user))
            return client.read(len(SUCCESS))

    def nodes_of(self, pattern: str) -> dict[str, int]:
        """How many batches each node has stored of users like this."""
        return dict(
            query(
                self.url,
                "SELECT node, count(*) FROM users JOIN batch ON batch.id = batch_id"
                " JOIN session ON session.id = session_id WHERE user_id LIKE %s GROUP BY node",
                (pattern,),
            )
        )

    def test_connections_reach_both(self) -> None:
        """Linux balances them; each session, log line, metric and page has its node's name."""
        for number in range(40):
            self.assertEqual(self.send(f"x/{number}"), SUCCESS)
        stored = self.nodes_of("x/%")
        # That all go to one of them is less likely than 1e-11.
        self.assertEqual(stored.keys(), {"cafe-1", "cafe-2"})
        self.assertEqual(sum(stored.values()), 40)
        for node, name in zip(self.nodes, ("cafe-1", "cafe-2")):
            status = json.loads(get(node, "/status.json")[1])
            self.assertEqual(status["node"], name)
            self.assertEqual(status["database"]["kind"], "postgresql")
            self.assertIn(f'node="{name}"', get(node, "/metrics")[1])
            lines = [json.loads(line) for line in node.log.splitlines() if line.startswith("{")]
            self.assertEqual({line["node"] for line in lines}, {name})
            (start,) = [line for line in lines if line["message"].startswith("action: start")]
            self.assertRegex(start["message"], rf"\| node: {name} \|")

    def test_node_that_is_killed(self) -> None:
        """New connections go to the other at once; what was acknowledged is stored, and once."""
        senders = [Sender(self.port, number) for number in range(8)]
        for sender in senders:
            sender.start()
        wait_until(
            lambda: all(len(sender.acknowledged) > 20 for sender in senders), "all are served"
        )
        self.assertEqual(self.nodes_of("%").keys(), {"cafe-1", "cafe-2"})
        self.nodes[0].signal(signal.SIGKILL)
        self.assertEqual(self.nodes[0].status(), -signal.SIGKILL)
        for number in range(40):
            self.assertEqual(self.send(f"x/{number}"), SUCCESS)
        self.assertEqual(self.nodes_of("x/%"), {"cafe-2": 40})
        counts = [len(sender.acknowledged) for sender in senders]
        wait_until(
            lambda: all(len(each.acknowledged) > n for each, n in zip(senders, counts)),
            "all are served again",
        )
        for sender in senders:
            sender.stopping.set()
        for sender in senders:
            sender.join(30)
        self.assertGreater(sum(sender.cuts for sender in senders), len(senders))
        stored = dict(query(self.url, "SELECT user_id, count(*) FROM users GROUP BY user_id"))
        self.assertEqual(set(stored.values()), {1})
        for sender in senders:
            self.assertEqual([user for user in sender.acknowledged if user not in stored], [])


class StandbyTests(ProcessTestCase):
    """A database whose commits wait for a standby."""

    def test_standby_that_is_away(self) -> None:
        """No answer and not ready, with the reason, until the standby is not required any more."""
        url = cluster().new_database()
        server = self.start("--store", url, "--metrics", "tcp:0:interface=127.0.0.1")
        add_standby(self, cluster(), "far")
        require_standby(self, cluster(), "nobody")
        client = self.client(server)
        client.send(batch(1, "7"))
        reason = "the store has not answered for 5 s: its commit waits for a synchronous standby\n"
        answer = wait_until(
            lambda: found if (found := get(server, "/readyz"))[1] == reason else None,
            "it says what it waits for",
            7.5,
        )
        self.assertEqual(answer[0], 503)
        server.wait_until_logged(f"action: store | result: fail | error: {reason}")
        database = wait_until(
            lambda: (
                found
                if (found := json.loads(get(server, "/status.json")[1])["database"])["server"]
                and found["server"]["standbys"]
                else None
            ),
            "the page has the standbys",
            15,
        )
        self.assertTrue(database["server"]["is_synchronous"])
        self.assertEqual(
            [(each["name"], each["sync_state"]) for each in database["server"]["standbys"]],
            [("far", "async")],
        )
        metrics = get(server, "/metrics")[1]
        self.assertIn(
            'cafeorch_database_standbys{state="streaming",sync_state="async"} 1.0', metrics
        )
        lag = r'(?m)^cafeorch_database_standby_lag_bytes\{sync_state="async"\} \d'
        self.assertRegex(metrics, lag)
        self.assertEqual(query(url, "SELECT count(*) FROM users"), [(0,)])
        require_standby(self, cluster(), "")
        self.assertEqual(client.read(len(SUCCESS)), SUCCESS)
        wait_until(lambda: get(server, "/readyz") == (200, "ok\n"), "it is ready again")
        server.wait_until_logged("action: store | result: success")
        self.assertEqual(query(url, "SELECT count(*) FROM users"), [(1,)])
