"""Sessions that store something, a second apart, in a database of any kind."""

from __future__ import annotations

from uuid import UUID

from cafeteria_orch.server.responses import Session
from cafeteria_orch.wire.messages import TableBatch, encode
from cafeteria_orch.wire.tables import USERS, Table

from .builders import PEER, USER_ROW, batch
from .stores import DatabaseTestCase, store_batch

STORE_ROW = ("1", "G Coffee", "Jalan 1", "50480", "Kuala Lumpur", "KL", "3.1", "101.7")
NOON = 1_735_732_800.0


class SessionsTestCase(DatabaseTestCase):
    """Has a time of its own.

    :ivar now: the time of what was stored last.
    """

    def setUp(self) -> None:
        super().setUp()
        self.now = NOON
        self.numbers = 0

    def new_session(self, client_id: UUID | None = None) -> Session:
        return Session(PEER, self.now, client_id)

    def add(self, session: Session, table: Table = USERS, rows: int = 1) -> None:
        """Store one more batch, a second later."""
        self.now += 1
        self.numbers += 1
        row = USER_ROW if table is USERS else STORE_ROW
        message = batch(table=table, rows=[row] * rows, batch_number=self.numbers)
        decoded = TableBatch.decode_body(table, encode(message)[1:])
        with self.database.transaction():
            self.assertTrue(store_batch(self.database, decoded, session, self.now))

    def end(self, session: Session, table: Table = USERS) -> None:
        """Say that a table is complete, a second later."""
        self.now += 1
        with self.database.transaction():
            self.database.end_table(table.name, session, self.now)

    def finish(self, session: Session, agency_id: int | None) -> None:
        """Say that all is sent, and by which agency."""
        session.agency_id = agency_id
        with self.database.transaction():
            self.database.finish_session(session, self.now)
