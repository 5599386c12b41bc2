"""The corpus is handled: nothing crashes, two ways agree, the cost is linear in the input."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from twisted.logger import Logger
from twisted.trial.unittest import SkipTest, SynchronousTestCase

from cafeteria_orch.edge.proxy import parse_header
from tests.support.admission import V1
from tests.support.cases import case
from tests.support.codecs import IS_BUILT

from . import corpus, native
from .campaign import MISSING, Campaign, is_installed
from .target import Cost, Target, chunks, no_failure
from .targets import TARGETS

LONG = 8 * 1024
MINUTES = 2


def seconds(run: Callable[[bytes], object], data: bytes) -> float:
    """The least processor time of a few runs."""
    times = []
    for _ in range(3):
        begun = time.process_time()
        run(data)
        times.append(time.process_time() - begun)
    return min(times)


def targets() -> Iterator[tuple[str, Target]]:
    """Those that are built here."""
    for name, target in TARGETS.items():
        if IS_BUILT or name != "sql":
            yield name, target


class CorpusTests(SynchronousTestCase):
    """The corpus itself."""

    def test_every_input_is_handled(self) -> None:
        """What fuzzing has found once, and what it begins with."""
        for name, target in targets():
            for what, data in corpus.load(name).items():
                with case(target=name, input=what):
                    target.check(data)

    def test_time_is_linear_in_the_input(self) -> None:
        """Four times the bytes take four times as long, not sixteen times."""
        for name, target in targets():
            for what, make in target.long_inputs.items():
                short, long = make(LONG), make(4 * LONG)
                target.run(short)
                ratios: list[float] = []
                # Another process may take the processor's cache in one of the runs.
                while len(ratios) < 5 and (not ratios or ratios[-1] > 8):
                    ratios.append(seconds(target.run, long) / seconds(target.run, short))
                with case(target=name, input=what, ratios=ratios):
                    self.assertLess(ratios[-1], 8)

    def test_has_all_inputs_to_begin_with(self) -> None:
        """A seed that was added is written to the corpus."""
        for name, target in TARGETS.items():
            with case(target=name):
                inputs = corpus.load(name)
                self.assertLessEqual(set(target.seeds()), set(inputs))
                self.assertLessEqual(max(map(len, inputs.values())), target.max_length)


class TargetTests(SynchronousTestCase):
    """What a target measures."""

    def target(self, run: Callable[[bytes], None]) -> Target:
        return Target(run, (), dict, {})

    def test_memory_beyond_the_input_is_a_finding(self) -> None:
        """A count that was believed allocates by it."""
        self.target(lambda data: None).check(b"x")
        with self.assertRaisesRegex(Cost, "bytes for an input of 1 "):
            self.target(lambda data: bytearray(1 << 20).clear()).check(b"x")

    def test_quadratic_work_is_a_finding(self) -> None:
        """Lines are counted: a busy machine does not matter."""

        def linear(data: bytes) -> None:
            for _ in data:
                parse_header(V1)

        def quadratic(data: bytes) -> None:
            for _ in data:
                linear(data)

        replace(self.target(linear), steps=(0, 50)).check(bytes(20))
        with self.assertRaisesRegex(Cost, "lines for an input of 20 "):
            replace(self.target(quadratic), steps=(0, 50)).check(bytes(20))

    def test_logged_failure_is_a_finding(self) -> None:
        """Twisted catches exceptions far from their cause, and logs them."""
        with self.assertRaisesRegex(AssertionError, "ZeroDivisionError"), no_failure():
            try:
                _ = 1 // 0
            except ZeroDivisionError:
                Logger().failure("caught")
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)

    def test_chunks_are_the_stream(self) -> None:
        """However it is cut."""
        for how in range(256):
            self.assertEqual(b"".join(chunks(bytes(range(200)), how)), bytes(range(200)))


class FuzzingTests(SynchronousTestCase):
    """The fuzzer itself."""

    @pytest.mark.slow
    def test_finds_nothing(self) -> None:
        """Some minutes of inputs for each target, made by the coverage of those before."""
        # pytest has its marker for that.
        if "PYTEST_VERSION" not in os.environ and os.environ.get("CAFEORCH_SLOW") != "1":
            raise SkipTest("it takes half an hour: set CAFEORCH_SLOW=1")
        if not is_installed():
            raise SkipTest(MISSING)
        for name, _ in targets():
            folder = Path(self.mktemp())
            folder.mkdir()
            result = Campaign(name, folder).run(MINUTES * 60)
            print(result)
            with case(target=name):
                self.assertIsNone(result.finding)
                self.assertGreater(min(result.executions, result.edges), 10)
                self.assertGreater(min(result.lines.values()), 10)

    @pytest.mark.slow
    def test_finds_nothing_in_compiled_code(self) -> None:
        """With the edges of the compiled modules, and AddressSanitizer in them."""
        if "PYTEST_VERSION" not in os.environ and os.environ.get("CAFEORCH_SLOW") != "1":
            raise SkipTest("it takes minutes: set CAFEORCH_SLOW=1")
        for name in native.TARGETS:
            folder = Path(self.mktemp())
            folder.mkdir()
            try:
                campaign = Campaign(name, folder, native=True)
            except native.NotBuilt as error:
                raise SkipTest(str(error)) from error
            result = campaign.run(MINUTES * 60)
            print(result)
            with case(target=name):
                self.assertIsNone(result.finding)
