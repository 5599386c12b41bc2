"""The store, of either kind, held against a model of it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test
from twisted.trial.unittest import SkipTest, SynchronousTestCase

from cafeteria_orch.store.location import PostgreSQLStore
from cafeteria_orch.wire.errors import BatchRejected
from cafeteria_orch.wire.tables import TABLES
from tests.support.postgresql import cluster, query
from tests.support.store_model import Query, StoreModel
from tests.support.stores import Fault
from tests.support.tracing import untraced


class PostgreSQLModel(StoreModel):
    """The same in PostgreSQL: a fault is an error of the server, or the end of the connection."""

    url: str

    def make_store(self) -> None:
        import psycopg  # noqa: PLC0415

        self.errors = (psycopg.IntegrityError, psycopg.DataError)
        self.store = PostgreSQLStore(self.url)
        self.store.open().close()
        names = ", ".join(["session", "batch", *(table.name for table in TABLES)])
        query(self.url, f"TRUNCATE {names} CASCADE")
        self.reader = psycopg.connect(self.url, autocommit=True)

    def start_sink(self) -> None:
        self.sink.start()

    def remove_store(self) -> None:
        self.reader.close()

    @contextmanager
    def reading(self) -> Iterator[Query]:
        yield lambda sql: self.reader.execute(sql).fetchall()

    @contextmanager
    def meeting(self, fault: Fault) -> Iterator[None]:
        import psycopg  # noqa: PLC0415

        waiting = [fault]
        beginning = fault.statement.replace("INSERT INTO", "COPY")
        # A statement may go with the one before it.
        pattern = re.compile(rf"(^|; ){beginning}\b")

        def failing(real: Any) -> Any:
            def call(self: Any, sql: str, *values: Any, **options: Any) -> Any:
                if not waiting or not pattern.search(sql):
                    return real(self, sql, *values, **options)
                waiting.clear()
                connection = getattr(self, "connection", self)
                if fault.outcome == "done":
                    real(self, sql, *values, **options)
                if fault.outcome != "failed":
                    connection.close()
                if issubclass(fault.error, psycopg.Error):
                    raise fault.error("no")
                raise psycopg.errors.DiskFull("no space left on device")

            return call

        with (
            patch.object(psycopg.Connection, "execute", failing(psycopg.Connection.execute)),
            patch.object(psycopg.Cursor, "copy", failing(psycopg.Cursor.copy)),
        ):
            yield
        self.faults += not waiting


@untraced
class StoreModelTests(SynchronousTestCase):
    """The store, driven by Hypothesis: what it has is what was acknowledged, and in progress."""

    def test_model(self) -> None:
        """Whatever happens, in SQLite."""
        self.run_model(StoreModel, 80)

    def test_model_in_postgresql(self) -> None:
        """Whatever happens, in PostgreSQL."""
        self.run_model(self.in_postgresql(), 8)

    @pytest.mark.slow
    def test_model_at_length(self) -> None:
        """The same in both, many times as often."""
        # pytest has its marker for that.
        if "PYTEST_VERSION" not in os.environ and os.environ.get("CAFEORCH_SLOW") != "1":
            raise SkipTest("it takes minutes; CAFEORCH_SLOW=1 runs it")
        self.run_model(StoreModel, 4000)
        self.run_model(self.in_postgresql(), 200)

    def in_postgresql(self) -> type[StoreModel]:
        """The model with a database of its own."""
        return type("PostgreSQLModel", (PostgreSQLModel,), {"url": cluster().new_database()})

    def run_model(self, model: type[StoreModel], examples: int) -> None:
        run_state_machine_as_test(
            model,
            settings=settings(
                max_examples=examples,
                stateful_step_count=30,
                deadline=None,
                database=None,
                suppress_health_check=list(HealthCheck),
            ),
        )
        self.flushLoggedErrors(BatchRejected)
