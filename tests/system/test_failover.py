"""Whichever machine dies, under load: nothing that was acknowledged is lost or doubled."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple
from uuid import UUID

from twisted.trial.unittest import SynchronousTestCase

from cafeteria_orch.wire.messages import encode
from tests.support.clusters import DATABASE, USER, Cluster
from tests.support.faults import RawClient, seeded, slow, wait_for
from tests.support.fleet import Balancer, Node
from tests.support.network import Network
from tests.support.senders import (
    STORED,
    Answered,
    Exporter,
    FieldClient,
    Ledger,
    WindowClients,
    balance,
    ledger_batch,
    longest_wait,
)

OF_EACH_KIND = 4
"""The number of senders of each of three kinds."""

SECONDS_AFTER_PROMOTION = 5.0
"""How long any client may wait for an answer after a standby was promoted."""

SECONDS_AFTER_CUT = 12.0
"""How long clients of a node may wait after its network was healed."""

ROUNDS = 20

TERMINATE = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE wait_event = 'SyncRep'"


class Event(NamedTuple):
    """What has happened in a round.

    :ivar what: in words.
    :ivar over: when the fault was over.
    """

    what: str
    over: float


class FleetTestCase(SynchronousTestCase):
    """Two clusters, three orchestrators and a balancer, each on a machine of its own."""

    def setUp(self) -> None:
        self.front, self.back = Network(self), Network(self)
        self.primary, self.standby = (Cluster(self, self.back, number) for number in (11, 12))
        hosts = f"{self.primary.address},{self.standby.address}"
        store = f"postgresql://{USER}@{hosts}/{DATABASE}?target_session_attrs=read-write"
        self.nodes = [
            Node(self, self.front, self.back, number, store, "--log-level=warn")
            for number in (21, 22, 23)
        ]
        balancer = Balancer(self, self.nodes)
        self.primary.create()
        self.standby.follow(self.primary)
        for node in self.nodes:
            node.start()
        self.port = balancer.port

    def exchange_clusters(self) -> float:
        """Promote the standby.

        :return: when it was the primary.
        """
        over = self.standby.promote()
        self.primary, self.standby = self.standby, self.primary
        return over


class FailoverTests(FleetTestCase):
    """Rounds of one fault each, under load by senders of three kinds."""

    chance: random.Random
    rounds = 0

    @slow
    def test_one_of_each(self) -> None:
        """A node, a primary, and networks, once each."""
        with seeded() as self.chance:
            for kind in (self.kill_node, self.kill_primary, self.lose_primary, self.cut_node):
                self.survive(kind)

    @slow
    def test_killed_nodes(self) -> None:
        """A node is killed and started again, 20 times."""
        self.survive_often(self.kill_node)

    @slow
    def test_killed_primaries(self) -> None:
        """A primary is killed and the standby promoted, 20 times."""
        self.survive_often(self.kill_primary)

    @slow
    def test_lost_primaries(self) -> None:
        """A primary's machine goes silent and the standby is promoted, 20 times."""
        self.survive_often(self.lose_primary)

    @slow
    def test_cut_nodes(self) -> None:
        """The network between a node and the database is cut and healed, 20 times."""
        self.survive_often(self.cut_node)

    def survive_often(self, kind: Callable[[], Event]) -> None:
        with seeded() as self.chance:
            for _ in range(ROUNDS):
                self.survive(kind)

    def survive(self, kind: Callable[[], Event]) -> None:
        """One round: load, a fault, its end, all answers; then the account of it."""
        self.rounds += 1
        prefix = f"r{self.rounds}-"
        fields = [FieldClient(self.port, f"{prefix}f{n}") for n in range(OF_EACH_KIND)]
        exporters = [Exporter(self, self.port, f"{prefix}e{n}") for n in range(OF_EACH_KIND)]
        names = [f"{prefix}w{n}" for n in range(OF_EACH_KIND)]
        windows = WindowClients(self, self.port, names)
        threads: list[FieldClient | Exporter] = [*fields, *exporters]
        for thread in threads:
            thread.start()
            self.addCleanup(thread.stop)

        def answered() -> list[Answered]:
            return [*windows.answered, *(each for field in fields for each in field.answered)]

        def served_since(moment: float) -> bool:
            return len({each.name for each in answered() if each.sent > moment}) == len(
                (*fields, *names)
            )

        began = time.monotonic()
        wait_for(lambda: served_since(began), "all clients are served", 60)
        self.pause(0.5, 1.5)
        before = time.monotonic()
        event = kind()
        wait_for(lambda: served_since(event.over), "all clients are served again", 60)
        windows.stop()
        for thread in threads:
            thread.stop()
        for thread in threads:
            thread.join(90)
            self.assertFalse(thread.is_alive())
        self.assertEqual(windows.wait(), 0)
        self.assertEqual([field.error for field in fields if field.error], [])
        self.assertEqual([said for exporter in exporters for said in exporter.said], [])
        all_answered = answered()
        exported = [each for exporter in exporters for each in exporter.answered]
        ledger = balance(
            self.primary.ask(f"{STORED} WHERE starts_with(user_id, '{prefix}')"),
            prefix,
            [*all_answered, *exported],
        )
        longest, late = longest_wait(all_answered), first_answers(all_answered, event.over)
        row = (
            self.rounds, event.what, *ledger.figures(), sum(field.cuts for field in fields),
            f"{event.over - before:.1f}", f"{late:.1f}", f"{longest:.1f}",
        )  # fmt: skip
        headings = (
            "round", "event", *Ledger.headings(), "cuts of field clients", "s of the fault",
            "s after it", "longest wait, s",
        )  # fmt: skip
        if self.rounds == 1:
            print(f"\n| {' | '.join(headings)} |\n{'|---' * len(headings)}|")
        print(f"| {' | '.join(map(str, row))} |", flush=True)
        self.assertEqual(ledger.faults, (0, 0, 0, 0), f"{event.what}: {ledger}")
        limits = {self.cut_node: SECONDS_AFTER_CUT}
        self.assertLess(late, limits.get(kind, SECONDS_AFTER_PROMOTION), event.what)
        self.assertFalse([node for node in self.nodes if "Traceback" in node.log])

    def kill_node(self) -> Event:
        """An orchestrator is killed, and started again."""
        node = self.chance.choice(self.nodes)
        node.kill()
        over = time.monotonic()
        self.pause(0.5, 1.0)
        node.start()
        return Event("a node killed", over)

    def kill_primary(self) -> Event:
        """The primary is killed, and the standby promoted."""
        self.primary.kill()
        self.pause(0.5, 2.0)
        return self._promote("the primary killed")

    def lose_primary(self) -> Event:
        """The primary's machine is not heard any more; it is fenced, and the standby promoted."""
        self.back.pull(self.primary.machine)
        self.pause(0.5, 2.0)
        self.primary.kill()
        return self._promote("the primary's machine lost")

    def _promote(self, what: str) -> Event:
        over = self.exchange_clusters()
        time.sleep(SECONDS_AFTER_PROMOTION)
        self.back.plug_in(self.standby.machine)
        self.standby.follow(self.primary)
        return Event(what, over)

    def cut_node(self) -> Event:
        """The network between a node and its database is cut, and healed."""
        node = self.chance.choice(self.nodes)
        self.back.pull(node.machine)
        self.pause(4.0, 8.0)
        self.back.plug_in(node.machine)
        return Event("a node cut off its database", time.monotonic())

    def pause(self, least: float, most: float) -> None:
        time.sleep(self.chance.uniform(least, most))


class OldPrimaryTests(FleetTestCase):
    """A primary that has what its standby does not have, and what an operator does to it."""

    def setUp(self) -> None:
        super().setUp()
        self.client = RawClient(self.port, UUID(int=1))
        self.addCleanup(self.client.close)

    def send(self, index: int) -> None:
        self.client.send(encode(ledger_batch("c", index)))

    def assert_no_answer(self, seconds: float) -> None:
        with self.assertRaises(TimeoutError):
            self.client.receive(seconds)

    def stored(self, cluster: Cluster) -> list[int]:
        return [number for (number,) in cluster.ask("SELECT batch_number FROM batch ORDER BY id")]

    @slow
    def test_commit_without_standby(self) -> None:
        """A commit whose wait for the standby is ended is not acknowledged: it can be lost yet."""
        self.send(0)
        self.client.expect_success()
        self.back.pull(self.standby.machine)
        self.send(1)
        wait_for(lambda: self.waiting(self.primary), "the commit waits for the standby")
        self.primary.ask(TERMINATE)
        wait_for(lambda: self.stored(self.primary) == [1, 2], "it is visible all the same")
        wait_for(lambda: self.waiting(self.primary), "the node waits for the standby again")
        self.assert_no_answer(1)
        self.primary.kill()
        self.back.plug_in(self.standby.machine)
        self.assertEqual(self.stored(self.standby), [1])
        self.exchange_clusters()
        self.client.expect_success()
        self.assertEqual(self.stored(self.primary), [1, 2])

    @slow
    def test_old_primary_returns(self) -> None:
        """One that was not rebuilt takes batches, acknowledges none, and is left when it ends."""
        self.back.pull(self.primary.machine)
        self.exchange_clusters()
        self.send(0)
        self.client.expect_success()
        self.assertEqual(self.stored(self.primary), [1])
        # Whoever starts now finds it first, and it takes writes.
        self.back.plug_in(self.standby.machine)
        for node in self.nodes:
            node.kill()
            node.start()
        self.client = RawClient(self.port, UUID(int=1))
        self.addCleanup(self.client.close)
        self.send(1)
        wait_for(lambda: self.waiting(self.standby), "the commit waits for a standby")
        self.assert_no_answer(3)
        self.standby.stop()
        self.client.expect_success()
        self.assertEqual(self.stored(self.primary), [1, 2])
        # What nobody was told is what rebuilding throws away.
        self.standby.follow(self.primary)

    @staticmethod
    def waiting(cluster: Cluster) -> bool:
        """Whether a commit waits for a standby."""
        return bool(cluster.ask("SELECT 1 FROM pg_stat_activity WHERE wait_event = 'SyncRep'"))


def first_answers(answered: Iterable[Answered], moment: float) -> float:
    """How long after a moment the last of the clients got its first answer."""
    first: dict[str, float] = {}
    for each in answered:
        if each.at > moment:
            first[each.name] = min(each.at, first.get(each.name, each.at))
    return max(first.values()) - moment
