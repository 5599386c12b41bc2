"""Worlds in which everything goes wrong at once keep the promises, and planted mistakes are found."""

from __future__ import annotations

import time
from collections import Counter

from twisted.trial.unittest import SynchronousTestCase

from tests.support.faults import slow
from tests.support.tracing import untraced

from .planted import PLANTED, find
from .run import Settings, run, shrink

SEEDS = range(8)

SHORT = Settings(hours=0.3, batches=30, pause=5.0)

SECONDS = 600.0
"""How long new worlds live in the slow test."""

FOUND_AT_ONCE = (
    "an acknowledgement before the commit",
    "answers out of order",
    "a timer that is not cancelled",
)


@untraced
class Worlds(SynchronousTestCase):
    """Servers and senders, unchanged, on simulated networks, disks and clocks."""

    def check(self, seed: int, settings: Settings) -> Counter[str]:
        """A world keeps all promises; return its faults."""
        outcome = run(seed, settings)
        story = "\n".join(outcome.story)
        command = f"python -m tests.simulation --seed {seed} --hours {settings.hours:g}"
        self.assertIsNone(outcome.violation, f"{command}\n{story}")
        return outcome.faults

    def test_seeds(self) -> None:
        """Some that are always the same."""
        faults = sum((self.check(seed, SHORT) for seed in SEEDS), Counter())
        for kind in ("split", "cut", "power", "kill", "full disk", "stall", "kill of a sender"):
            self.assertIn(kind, faults)

    @slow
    def test_new_seeds(self) -> None:
        """Ten minutes of new ones; prints what went wrong in them."""
        began, faults, seed = time.monotonic(), Counter[str](), time.time_ns()
        worlds = 0
        while time.monotonic() < began + SECONDS:
            worlds += 1
            faults += self.check(seed % 2**32 + worlds, Settings())
        print(f"{worlds} worlds, {faults.total():,} faults: {faults.most_common()}")

    def test_a_seed_repeats_its_world(self) -> None:
        """To the last event."""
        one, other = (run(5, SHORT) for _ in range(2))
        self.assertEqual(one.digest, other.digest)
        self.assertEqual((one.events, one.faults), (other.events, other.faults))
        self.assertNotEqual(run(6, SHORT).digest, one.digest)


@untraced
class Mistakes(SynchronousTestCase):
    """What the worlds are for: they find mistakes."""

    def test_some_are_found_at_once(self) -> None:
        """In a world or two."""
        for planted in PLANTED:
            if planted.what in FOUND_AT_ONCE:
                self.assertIsNotNone(find(planted, 10), planted.what)

    def test_a_story_is_short(self) -> None:
        """A world that breaks a promise is made smaller as long as it does."""
        (planted,) = (each for each in PLANTED if each.what == FOUND_AT_ONCE[0])
        with planted.in_place():
            found, smallest = shrink(run(1, SHORT), SHORT)
        assert found.violation is not None
        self.assertIn("not committed", found.violation)
        senders = smallest.clients + smallest.field_clients + smallest.exporters
        self.assertEqual((senders, smallest.hostile_clients, smallest.kinds), (1, 0, ()))
        self.assertLess(len(found.story), 10)

    @slow
    def test_all_are_found(self) -> None:
        """Each within a minute; prints how soon."""
        for planted in PLANTED:
            found = find(planted, 60)
            assert found is not None, planted.what
            print(f"| {planted.what} | {found[0]:.1f} | {found[1].violation!s:.100} |", flush=True)
