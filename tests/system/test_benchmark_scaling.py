"""The benchmark of several orchestrators on one database: what it counts. No speeds."""

from __future__ import annotations

import os
import time
from contextlib import ExitStack
from unittest.mock import patch

from twisted.trial.unittest import SynchronousTestCase

from tests.benchmarks import scaling, workload
from tests.benchmarks.report import BenchmarkError
from tests.benchmarks.scaling import Connections, Costs, Fleet, Measurement, pinned, seconds_of
from tests.support.postgresql import cluster, query


class CostTests(SynchronousTestCase):
    """Processor time, and what it was spent on."""

    def test_seconds(self) -> None:
        """A process that computes has had more; one that is gone, nothing."""
        before = seconds_of([os.getpid()])
        end = time.process_time() + 0.1
        while time.process_time() < end:
            pass
        self.assertGreaterEqual(seconds_of([os.getpid()]) - before, 0.08)
        self.assertEqual(seconds_of([2**22 + 1]), 0)

    def test_figures(self) -> None:
        """Two nodes are held against one, and all of them against plain connections."""
        costs = []
        for seconds in (1.0, 2.0, 3.0, 4.0, 5.0, 6.0):
            cost = Costs()
            cost.rows, cost.nodes, cost.database, cost.clients = 500_000, seconds, seconds, 0.25
            cost.wal_bytes = 1e8 * seconds
            costs.append(cost)
        rows = scaling.figures({1: 100, 2: 160, 4: 150}, {1: 200, 2: 400, 4: 300}, costs)
        cells = [figure.cells() for figure in rows]
        self.assertEqual(
            [(ours, ratio) for _, ours, _, ratio, _ in cells[:5]],
            [("160 rows/s", "1.6"), ("150 rows/s", "1.5"), ("100 rows/s", "0.5"),
             ("160 rows/s", "0.4"), ("150 rows/s", "0.5")],
        )  # fmt: skip
        self.assertEqual([goal for *_, goal in cells[:2]], ["≥ 1.5: met", "-"])
        self.assertEqual([ours for _, ours, *_ in cells[5:8]], ["2 s", "2 s", "0.5 s"])
        self.assertEqual(cells[6][3], "0.25")
        self.assertEqual(cells[-1][1:4:2], ("200 MB", "0.25"))

    def test_cores(self) -> None:
        """Clients have cores that no server has, where there are enough; in the end, all again."""
        cores = os.sched_getaffinity(0)
        with patch.object(scaling, "MIN_CORES_TO_PIN", len(cores)), pinned(cluster(), []):
            clients = os.sched_getaffinity(0)
            self.assertLess(clients, cores)
            for process in cluster().processes():
                self.assertEqual(os.sched_getaffinity(process), cores - clients)
            self.addCleanup(self.give_back, cores)
        self.assertEqual(os.sched_getaffinity(0), cores)
        with patch.object(scaling, "MIN_CORES_TO_PIN", len(cores) + 1), pinned(cluster(), []):
            self.assertEqual(os.sched_getaffinity(0), cores)

    @staticmethod
    def give_back(cores: set[int]) -> None:
        for process in cluster().processes():
            os.sched_setaffinity(process, cores)


class MeasurementTests(SynchronousTestCase):
    """What is stored is counted, and what it cost."""

    def test_ways(self) -> None:
        """A node and a plain connection store whole batches, which use processor time."""
        payloads = workload.payloads(2, rows=50)
        url = cluster().new_database()
        columns = ", ".join(f"{column} text" for column in workload.TABLE.columns)
        query(url, f"CREATE TABLE batch_rows ({columns})")
        with ExitStack() as stack:
            for way in (Fleet(stack, url, 1, payloads), Connections(url, 2, payloads)):
                measurement = Measurement(cluster(), url, way)
                self.assertGreater(measurement.rows_per_second(50, 0.5), 0)
                costs = measurement.costs
                ((stored,),) = query(url, f"SELECT count(*) FROM {way.table}")
                self.assertEqual(costs.rows, stored)
                self.assertEqual(stored % 50, 0)
                self.assertGreater(costs.for_a_million(costs.database), 0)
                self.assertGreater(costs.wal_bytes, 50 * stored)
                self.assertEqual(costs.nodes > 0, bool(way.processes))

    def test_nothing_stored(self) -> None:
        """A run without a stored row has no figure."""
        url = cluster().new_database()
        query(url, "CREATE TABLE batch_rows ()")
        measurement = Measurement(cluster(), url, Connections(url, 1, []))
        with (
            patch.object(scaling, "batches_per_second", lambda *_: 0.0),
            self.assertRaisesRegex(BenchmarkError, "raise --seconds"),
        ):
            measurement.rows_per_second(50, 0.1)
