"""The main job in one process: a folder of exports over a socket into the store."""

from __future__ import annotations

import csv
import json
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any
from uuid import UUID

from twisted.internet import reactor as installed_reactor
from twisted.internet.endpoints import TCP4ClientEndpoint, connectProtocol
from twisted.trial.unittest import TestCase

from cafeteria_orch.sender.client import OrchestratorClient
from cafeteria_orch.sender.exports import find_exports
from cafeteria_orch.sender.sending import send_directory
from cafeteria_orch.server.connection import OrchestratorProtocol
from cafeteria_orch.server.factory import OrchestratorFactory
from cafeteria_orch.server.responses import Exchange
from cafeteria_orch.store.location import SQLiteStore
from cafeteria_orch.store.sink import Sink
from cafeteria_orch.wire.errors import TryAgainLater
from cafeteria_orch.wire.framing import FRAMINGS, Framing
from cafeteria_orch.wire.messages import BatchRecvSuccess, TableBatch
from cafeteria_orch.wire.opcodes import Opcode
from tests.support.builders import DATA, query, send_options, until

# Its type is that of a module, which has none of a reactor's methods.
reactor: Any = installed_reactor

COLUMNS = {
    "menu_items": "product_id name category price is_seasonal available_from available_to",
    "stores": "store_id store_name street postal_code city state latitude longitude",
    "transaction_items": "transaction_id item_id quantity unit_price subtotal created_at",
    "transactions": "transaction_id store_id payment_method_id user_id original_amount"
    " discount_applied final_amount created_at voucher_id",
    "users": "user_id gender birthdate registered_at",
}
RENAMED = {("menu_items", "product_id"): "item_id", ("menu_items", "name"): "item_name"}
FILES = {"menu_items": 1, "stores": 1, "transaction_items": 2, "transactions": 2, "users": 2}


def rows_of_files(table: str) -> list[tuple[str | None, ...]]:
    """All rows of a table's files, as they must stand in the store."""
    rows = []
    for path in sorted((DATA / table).glob("*.csv")):
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows += [
                tuple(
                    cells.get(RENAMED.get((table, column), column))
                    for column in COLUMNS[table].split()
                )
                for cells in csv.DictReader(file)
            ]
    return rows


NOTED = {"acknowledged", "ended", "finished"}


class MainJobTests(TestCase):
    """What was acknowledged is in the store, cell by cell."""

    timeout = 30

    def setUp(self) -> None:
        self.store = self.mktemp()
        self.factory = OrchestratorFactory(reactor)
        sink = self.sink = Sink(reactor, SQLiteStore(self.store))
        sink.register(self.factory)
        sink.start()
        port = reactor.listenTCP(0, self.factory, interface="127.0.0.1")
        self.addCleanup(sink.stop)
        self.addCleanup(until, reactor, lambda: not self.factory.connections)
        self.addCleanup(port.stopListening)
        self.connect = f"tcp:127.0.0.1:{port.getHost().port}"
        self.state = Path(self.mktemp())
        self.endpoint = TCP4ClientEndpoint(reactor, "127.0.0.1", port.getHost().port)

    async def send(self, directory: Path = DATA, **options: Any) -> str:
        """Send a folder, which must go well; return what is printed of it."""
        options = {"batch_rows": 7, "window": 3, "retry_for": 5.0, **options}
        options = {"connect": self.connect, "state": self.state, **options}
        out, err = StringIO(), StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            status = await send_directory(reactor, send_options(directory, **options))
        self.assertEqual(status, 0, err.getvalue())
        return out.getvalue()

    def client_id(self) -> str:
        """Who the sender says it is."""
        head: dict[str, str] = json.loads(self.state.read_text("utf-8").splitlines()[0])
        return head["client_id"]

    def query(self, sql: str) -> list[tuple[Any, ...]]:
        """What another program reads in the store, while the server runs."""
        return query(self.store, sql)

    def rows(self, table: str) -> list[tuple[Any, ...]]:
        """All rows of a table in the store, in the order in which they were stored."""
        columns = ", ".join(COLUMNS[table].split())
        return self.query(f"SELECT {columns} FROM {table} ORDER BY rowid")

    async def test_every_cell(self) -> None:
        """Every cell of every row of every file is in the store as it stands in the file."""
        await self.send()
        for table in COLUMNS:
            expected = rows_of_files(table)
            self.assertGreater(len(expected), 10)
            self.assertEqual(self.rows(table), expected, table)

    async def test_batches(self) -> None:
        """Each batch is told with what it holds: counted through a table, EOF ends a file."""
        await self.send()
        for opcode, (table, files) in enumerate(FILES.items(), 4):
            batches = self.query(
                "SELECT batch_number, status, amount, (SELECT count(*) FROM"
                f" {table} WHERE batch_id = batch.id) FROM batch WHERE opcode = {opcode}"
                " ORDER BY id"
            )
            numbers, statuses, amounts, counts = zip(*batches)
            self.assertEqual(numbers, tuple(range(1, len(batches) + 1)))
            self.assertEqual((statuses.count(1), statuses[-1]), (files, 1))
            self.assertEqual(set(statuses), {0, 1})
            self.assertEqual(amounts, counts)
            self.assertEqual(sum(amounts), len(rows_of_files(table)))

    async def test_session(self) -> None:
        """The store knows who sent it, that all tables are complete, and that it is all."""
        await self.send(agency_id=-7)
        sessions = self.query(
            "SELECT client_id, ip, agency_id, finished_at >= connected_at FROM session"
        )
        self.assertEqual(sessions, [(self.client_id(), "127.0.0.1", -7, 1)])
        ends = self.query("SELECT table_name FROM table_eof ORDER BY rowid")
        self.assertEqual([name for (name,) in ends], list(COLUMNS))
        self.assertEqual(self.query("SELECT DISTINCT session_id FROM batch"), [(1,)])

    async def test_summary(self) -> None:
        """What the sender says was acknowledged is what is in the store."""
        printed = await self.send()
        for table, files in FILES.items():
            ((rows,),) = self.query(f"SELECT count(*) FROM {table}")
            self.assertRegex(printed, rf"(?m)^{table} +{files} +{rows} ")
        ((batches, rows),) = self.query("SELECT count(*), sum(amount) FROM batch")
        self.assertRegex(printed, rf"(?m)^acknowledged +8 +{rows} +{batches} ")

    async def test_not_now_without_a_reason(self) -> None:
        """Where a FAIL cannot say that it passes, what it refused is sent again all the same."""
        refused: list[int] = []

        def store(batch: TableBatch, client: Exchange) -> Any:
            if not refused:
                refused.append(batch.batch_number)
                raise TryAgainLater("not now")
            return self.sink._store_batch(batch, client)

        self.factory.register_processor(Opcode.NEW_USERS, store, replace=True)
        await self.send(framing="opcode-first")
        self.assertEqual(refused, [1])
        self.assertEqual(sorted(self.rows("users")), sorted(rows_of_files("users")))

    async def test_either_framing(self) -> None:
        """Sent in either framing, every cell of the same files is in the store alike."""
        framings: list[Framing | None] = []
        forget = self.factory.connection_lost

        def lost(connection: OrchestratorProtocol) -> None:
            framings.append(connection.framing)
            forget(connection)

        self.patch(self.factory, "connection_lost", lost)
        for session, framing in enumerate(FRAMINGS.values(), 1):
            await self.send(framing=framing.name, state=Path(self.mktemp()))
            await until(reactor, lambda: not self.factory.connections)
            self.assertEqual(framings[-1], framing)
            for table in COLUMNS:
                self.assertEqual(self.rows(table), rows_of_files(table) * session, table)
        ends = self.query("SELECT session_id, table_name FROM table_eof ORDER BY rowid")
        self.assertEqual(ends, [(session, name) for session in (1, 2) for name in COLUMNS])

    async def test_sent_again(self) -> None:
        """A second run sends nothing at all."""
        await self.send()
        batches = self.query("SELECT * FROM batch")
        printed = await self.send()
        self.assertIn("All had been acknowledged before.", printed)
        self.assertEqual(self.query("SELECT * FROM batch"), batches)
        for table in COLUMNS:
            self.assertEqual(self.rows(table), rows_of_files(table), table)
        clients = self.query("SELECT client_id, finished_at IS NULL FROM session")
        self.assertEqual(clients, [(self.client_id(), 0)])
        self.assertEqual(self.query("SELECT DISTINCT session_id FROM batch"), [(1,)])

    async def test_sent_again_with_state_of_before(self) -> None:
        """A state from before any acknowledgement has all sent again, and stored once."""
        printed = await self.send()
        batches = self.query("SELECT * FROM batch")
        records = self.state.read_text("utf-8").splitlines(keepends=True)
        before = [line for line in records if not NOTED & {*json.loads(line)}]
        self.assertEqual(before, records[:9])
        self.state.write_text("".join(before), "utf-8")
        again = await self.send(batch_rows=4000)
        # All but the time that it took.
        self.assertEqual(again.rpartition(" in ")[0], printed.rpartition(" in ")[0])
        self.assertEqual(self.query("SELECT * FROM batch"), batches)
        for table in COLUMNS:
            self.assertEqual(self.rows(table), rows_of_files(table), table)

    async def test_sent_again_by_another(self) -> None:
        """Without its state the sender is somebody else, whose rows are stored as well."""
        await self.send()
        await self.send(state=Path(self.mktemp()))
        for table in COLUMNS:
            self.assertEqual(self.rows(table), rows_of_files(table) * 2, table)
        self.assertEqual(self.query("SELECT count(DISTINCT client_id) FROM session"), [(2,)])

    async def test_sent_again_with_hello(self) -> None:
        """The same batches of the same client are acknowledged again and stored once."""
        exports, errors = find_exports(DATA)
        self.assertEqual((len(exports), errors), (8, []))
        for _ in range(2):
            client: OrchestratorClient = await connectProtocol(self.endpoint, OrchestratorClient())
            answers = [client.send_hello(UUID(int=7))]
            for export in exports:
                batches = export.batches(1, 7, 1_048_576)
                answers += [client.send_payload(batch.payload) for batch in batches]
            await client.finish()
            for answer in answers:
                self.assertEqual(await answer, BatchRecvSuccess())
        for table in COLUMNS:
            self.assertEqual(self.rows(table), rows_of_files(table))

    async def test_small_frames(self) -> None:
        """Batches that bytes and not rows bound hold the same rows."""
        await self.send(batch_rows=4000, max_frame_bytes=700)
        for table in COLUMNS:
            self.assertEqual(self.rows(table), rows_of_files(table))
