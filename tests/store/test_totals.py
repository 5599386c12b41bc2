"""What the status page asks the store, and when."""

from __future__ import annotations

from cafeteria_orch.store.asking import Answer
from cafeteria_orch.store.location import SQLiteStore
from cafeteria_orch.store.totals import INTERVAL, Completeness, TableTotals
from tests.support.builders import SUCCESS, batch_frame, connect
from tests.support.stores import SinkTestCase


class CompletenessTests(SinkTestCase):
    """Its clocks."""

    def test_two_clocks(self) -> None:
        """The age of an answer is measured, and its time is that of the wall clock."""
        self.start()
        protocol, transport = connect(self.factory)
        protocol.dataReceived(batch_frame())
        self.assertEqual(self.pump_answers(transport), [SUCCESS])
        times = iter((1_700_000_000.0, 5.0))
        asker = Completeness(self.reactor, SQLiteStore(self.path).totals, lambda: next(times))
        expected = {"users": TableTotals(1, 1, 1, 0)}
        asker.refresh()
        self.reactor.pump_until(lambda: asker.latest)
        self.assertEqual(asker.latest, Answer(1_700_000_000.0, expected))
        self.reactor.advance(INTERVAL - 1)
        asker.refresh()
        self.reactor.advance(1)
        asker.refresh()
        self.reactor.pump_until(lambda: asker.latest == Answer(5.0, expected))
