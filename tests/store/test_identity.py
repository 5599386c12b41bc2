"""Which store it is, and how much of a client's it has: what a client is told that asks."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch
from uuid import UUID

from cafeteria_orch.server.responses import Session
from cafeteria_orch.store.database import IDENTITY_QUERY
from cafeteria_orch.wire.messages import (
    ANSWER_DECODERS,
    BatchRecvFail,
    BatchRecvSuccess,
    ClientHello,
    StoreIdentity,
    StoreIdentityRequest,
    decode,
    encode,
)
from cafeteria_orch.wire.opcodes import FailReason
from tests.support.builders import PEER, TCPTransport, batch_frame, connect, frame, received
from tests.support.postgresql import InPostgreSQL, SinkInPostgreSQL, query
from tests.support.stores import (
    CLIENT,
    NOW,
    NOW_TEXT,
    DatabaseTestCase,
    GroupTestCase,
    store_batch,
)

OTHER = UUID(int=8)
ASK = frame(encode(StoreIdentityRequest()))


class IdentityOfADatabase(DatabaseTestCase):
    """What the database says."""

    def identify(self, client_id: UUID | None) -> StoreIdentity:
        with self.database.transaction():
            identity: StoreIdentity = self.database.identify(Session(PEER, NOW, client_id))
        return identity

    def test_it_stays_the_same(self) -> None:
        """Whoever asks, and after the store was opened again."""
        ((expected, created_at),) = self.query("SELECT id, created_at FROM identity")
        self.assertRegex(created_at, r"^20\d\d-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3}$")
        self.assertEqual(self.identify(CLIENT), StoreIdentity(UUID(expected), 0))
        self.database.close()
        self.open()
        self.assertEqual(self.identify(OTHER), StoreIdentity(UUID(expected), 0))

    def test_batches_of_the_client(self) -> None:
        """Those of all its sessions and tables, but no duplicate, and none of another client."""
        for client_id in (CLIENT, CLIENT, OTHER, None):
            session = Session(PEER, NOW, client_id)
            for number in range(3):
                self.store(session, batch_number=number)
        self.store(Session(PEER, NOW, CLIENT), batch_number=9)
        self.assertEqual(self.identify(CLIENT).batches, 4)
        self.assertEqual(self.identify(OTHER).batches, 3)
        self.assertEqual(self.identify(UUID(int=9)).batches, 0)

    def test_forgotten_batches_count(self) -> None:
        """As long as they are not stored again when they are sent again."""
        session = Session(PEER, NOW, CLIENT)
        for number in range(3):
            self.store(session, batch_number=number)
        self.execute(f"UPDATE batch SET forgotten_at = '{NOW_TEXT}' WHERE id IN (1, 2)")
        self.assertEqual(self.identify(CLIENT).batches, 3)
        self.execute("UPDATE batch SET client_id = NULL WHERE id = 2")
        self.assertEqual(self.identify(CLIENT).batches, 2)
        self.assertIs(self.store(session, batch_number=0), False)
        self.assertIs(self.store(session, batch_number=1), True)

    def test_batches_of_the_same_transaction(self) -> None:
        """What was stored in it before is counted."""
        session = Session(PEER, NOW, CLIENT)
        with self.database.transaction():
            store_batch(self.database, received(), session, NOW)
            self.assertEqual(self.database.identify(session).batches, 1)

    def plan(self) -> str:
        """How the database finds it."""
        return str(self.query(f"EXPLAIN QUERY PLAN {IDENTITY_QUERY.replace('?', repr('x'))}"))

    def test_the_unique_key_finds_them(self) -> None:
        """No batch of another client is looked at."""
        self.assertIn("SEARCH batch USING COVERING INDEX", self.plan())


class IdentityInPostgreSQL(InPostgreSQL, IdentityOfADatabase):
    """The same of PostgreSQL."""

    def plan(self) -> str:
        # Else it reads a table that is this short from end to end.
        url = f"{self.url}?options=-c%20enable_seqscan%3Doff"
        return str(query(url, f"EXPLAIN {IDENTITY_QUERY.replace('?', repr('x'))}"))

    def test_the_standby_has_what_is_counted(self) -> None:
        """Something is written, so that the commit waits for it before the client is told."""
        with patch.object(self.database, "touch") as touch:
            self.identify(CLIENT)
        touch.assert_called_once_with()

    def test_the_unique_key_finds_them(self) -> None:
        """No batch of another client is looked at."""
        self.assertIn("Index Cond: (client_id = 'x'::text)", self.plan())


class Asking(GroupTestCase):
    """A client asks the server."""

    def client(self, *frames: bytes) -> TCPTransport:
        """One more client says who it is, then sends this."""
        protocol, transport = connect(self.factory)
        protocol.dataReceived(frame(encode(ClientHello(CLIENT))) + b"".join(frames))
        return transport

    def answers(self, transport: TCPTransport, count: int) -> list[Any]:
        """The first answers that it gets."""
        self.reactor.pump_until(lambda: len(_payloads(transport.value())) >= count)
        return [decode(payload, ANSWER_DECODERS) for payload in _payloads(transport.value())]

    @property
    def store_id(self) -> UUID:
        return UUID(*self.query("SELECT id FROM identity"))

    def test_in_order(self) -> None:
        """Each answer counts what the connection sent before it, and nothing that comes later."""
        self.gate.open(1000)
        transport = self.client(
            ASK, batch_frame(), batch_frame(), batch_frame(batch_number=2), ASK, batch_frame(), ASK
        )
        done, none, two = (
            BatchRecvSuccess(),
            StoreIdentity(self.store_id, 0),
            StoreIdentity(self.store_id, 2),
        )
        self.assertEqual(
            self.answers(transport, 8), [done, none, done, done, done, two, done, two]
        )

    def test_batches_of_another_connection(self) -> None:
        """All that was acknowledged before counts."""
        self.gate.open(1000)
        self.answers(self.client(*(batch_frame(batch_number=each) for each in range(5))), 6)
        answers = self.answers(self.client(ASK), 2)
        self.assertEqual(answers[1], StoreIdentity(self.store_id, 5))

    def test_while_the_store_refuses(self) -> None:
        """It is FAIL, reason 1, as for a batch; it is answered when that is over."""
        self.gate.open(1000)
        self.execute("ALTER TABLE identity RENAME TO moved")
        refused = self.answers(self.client(ASK, batch_frame()), 3)
        self.assertEqual(
            refused, [BatchRecvSuccess(), BatchRecvFail(FailReason.TRY_AGAIN), BatchRecvSuccess()]
        )
        self.assertIsNotNone(self.sink.refusal)
        self.execute("ALTER TABLE moved RENAME TO identity")
        self.reactor.advance(10)
        self.reactor.pump_until(lambda: self.sink.refusal is None)
        answers = self.answers(self.client(ASK), 2)
        self.assertEqual(answers[1], StoreIdentity(self.store_id, 1))

    def test_while_the_store_is_closed(self) -> None:
        """The same FAIL."""
        self.gate.open(1000)
        self.stop()
        answers = self.answers(self.client(ASK), 2)
        self.assertEqual(answers[1], BatchRecvFail(FailReason.TRY_AGAIN))

    def test_it_counts_as_no_batch(self) -> None:
        """Of the counters, those of the other messages."""
        self.gate.open(1000)
        self.answers(self.client(ASK), 2)
        self.assertEqual(self.counts().received, 0)
        tallies = dict(self.factory.counters.control_messages())
        self.assertEqual(tallies["store_identity"].accepted, 1)


class AskingInPostgreSQL(SinkInPostgreSQL, Asking):
    """The same of PostgreSQL."""


def _payloads(stream: bytes) -> list[bytes]:
    found = []
    while stream:
        end = 4 + int.from_bytes(stream[:4], "big")
        found.append(stream[4:end])
        stream = stream[end:]
    return found
