"""The charts' points: rates, levels and latencies of each interval, in a range."""

from __future__ import annotations

import json
from typing import Any

from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from cafeteria_orch.observe import host, sampling
from cafeteria_orch.observe.history import RANGES
from cafeteria_orch.observe.sampling import SAMPLE_INTERVAL, Sampler
from cafeteria_orch.server.factory import OrchestratorFactory
from tests.support.builders import USER_ROW, batch_frame, connect, frame
from tests.support.services import RecordingSink


class SamplerTests(SynchronousTestCase):
    """A factory on a clock, sampled every five seconds."""

    def setUp(self) -> None:
        self.clock = Clock()
        self.factory = OrchestratorFactory(self.clock)
        self.factory.wall_time = lambda: 1.7e9 + self.clock.seconds()
        self.sampler = Sampler(self.clock, self.factory, RecordingSink())
        self.sampler.take()

    def sample(self, number: int = 1) -> None:
        for _ in range(number):
            self.clock.advance(SAMPLE_INTERVAL)
            self.sampler.take()

    def points(self, name: str = "10m") -> list[dict[str, Any]]:
        history = self.sampler.history(name)
        return [dict(zip(history["columns"], point)) for point in history["points"]]

    def test_a_point_has_the_rates_of_its_interval(self) -> None:
        """What was accepted, what failed, what was read."""
        protocol, _ = connect(self.factory)
        data = batch_frame(rows=[USER_ROW] * 10) + frame(b"\x04bad")
        protocol.dataReceived(data)
        self.sample(2)
        first, second = self.points()
        self.assertEqual(
            [first[name] for name in ("time", "rows", "batches", "failed", "bytes")],
            [1.7e9 + 5, 2.0, 0.2, 0.2, len(data) / 5],
        )
        self.assertEqual(
            [second[name] for name in ("time", "rows", "batches", "failed", "bytes")],
            [1.7e9 + 10, 0, 0, 0, 0],
        )

    def test_the_process_and_its_machine(self) -> None:
        """Processor seconds become a share of a core; memory and disk are as they were."""
        seconds = iter([10.0, 14.0])
        self.patch(sampling, "cpu_seconds", lambda: next(seconds))
        self.patch(sampling, "resident_bytes", lambda: 123)
        self.sample(2)
        _, point = self.points()
        names = ("cpu", "resident_bytes", "free_bytes")
        self.assertEqual([point[name] for name in names], [0.8, 123, 10**9])

    def test_where_the_platform_says_nothing(self) -> None:
        """Memory is unknown without ``/proc``, and so is the disk without a store."""
        self.patch(host, "_STATM", host._STATM / "missing")
        self.sampler = Sampler(self.clock, self.factory, None)
        self.sampler.take()
        self.sample()
        (point,) = self.points()
        self.assertIsNone(point["resident_bytes"])
        self.assertIsNone(point["free_bytes"])

    def test_latencies_are_those_of_the_interval_and_of_the_range(self) -> None:
        """An interval without commits has none."""
        for seconds in (0.0001, 0.02):
            self.factory.counters.commit_seconds.observe(seconds)
            self.sample()
        self.sample()
        first, second, third = self.points()
        self.assertLessEqual(first["commit_p99"], 0.0005)
        self.assertGreater(second["commit_p50"], 0.01)
        self.assertIsNone(third["commit_p95"])
        latency = self.sampler.history("10m")["latency"]
        self.assertEqual(latency["commit"]["p50"], 0.0005)
        self.assertGreater(latency["commit"]["p99"], 0.01)
        self.assertEqual(latency["batch"], {"p50": None, "p95": None, "p99": None})

    def test_an_hour_has_the_sums_of_ten_minutes(self) -> None:
        """Its points are fewer, and their rates times their seconds are as many rows."""
        protocol, _ = connect(self.factory)
        for number in range(100):
            protocol.dataReceived(batch_frame(rows=[USER_ROW] * (number % 7)))
            self.sample()
        rows = {}
        for name in RANGES:
            points, before = self.points(name), 1.7e9
            rows[name] = 0.0
            for point in points:
                rows[name] += point["rows"] * (point["time"] - before)
                before = point["time"]
        self.assertEqual(len(self.points("1h")), 17)
        for total in rows.values():
            self.assertAlmostEqual(total, self.factory.counters.total().accepted_rows, 0)

    def test_bounded(self) -> None:
        """A day and a half take no more than a day, and an answer is not long."""
        ((_, sample),) = self.sampler._history.samples("10m")
        for number in range(36 * 720):
            self.sampler._history.add(SAMPLE_INTERVAL * number, sample)
        for name, limit in (("10m", 15_000), ("1h", 15_000), ("24h", 35_000)):
            history = self.sampler.history(name)
            self.assertEqual(len(history["points"]), RANGES[name].points)
            self.assertLess(len(json.dumps(history)), limit)

    def test_before_the_first_sample(self) -> None:
        """There are no points and no latencies."""
        self.sampler.clear()
        history = self.sampler.history("1h")
        self.assertEqual((history["points"], history["latency"]), ([], None))


class HostTests(SynchronousTestCase):
    """The figures of this process."""

    def test_they_are_plausible(self) -> None:
        """Python takes some megabytes, and has worked for a while."""
        self.assertGreater(host.cpu_seconds(), 0.01)
        resident = host.resident_bytes()
        assert resident is not None
        self.assertTrue(5e6 < resident < 1e10)
