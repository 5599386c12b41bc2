"""What a target is, and what must hold for each input: no crash, and cost linear in its length."""

from __future__ import annotations

import gc
import sys
import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from twisted.logger import ILogObserver, LogEvent, formatEvent, globalLogPublisher
from zope.interface import provider

ROOT = Path(__file__).parents[2]
_COUNTED = (str(ROOT / "cafeteria_orch"), "/twisted/web/")


class Cost(AssertionError):
    """An input that costs more than its length allows."""


@dataclass(frozen=True)
class Target:
    """A part of the package that takes hostile bytes.

    :ivar run: takes an input; an exception is a finding.
    :ivar modules: what is fuzzed, by the names of modules, for the report of coverage.
    :ivar seeds: valid inputs and boundary cases, by what they are.
    :ivar long_inputs: make inputs of about so many bytes, by what they are.
    :ivar max_length: the length of an input, in bytes.
    :ivar memory: how many bytes an input may have allocated at once, and how many more for each of
        its bytes.
    :ivar steps: how many lines of code it may have run, and how many more for each of its bytes.
    """

    run: Callable[[bytes], None]
    modules: tuple[str, ...]
    seeds: Callable[[], Mapping[str, bytes]]
    long_inputs: Mapping[str, Callable[[int], bytes]]
    max_length: int = 1024
    memory: tuple[int, int] = (256 * 1024, 256)
    steps: tuple[int, int] = (2_000, 40)

    def check(self, data: bytes) -> tuple[int, int]:
        """Feed an input twice: to see whether it is handled, and what it costs.

        The first time, caches are filled whose cost is no input's.

        :return: the peak of the memory and the number of lines.
        :raises Cost: if it costs too much.
        """
        self.run(data)
        lines = _Lines()
        gc.collect(0)
        tracemalloc.start()
        try:
            with lines:
                self.run(data)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        for what, used, (base, per_byte) in (
            ("bytes", peak, self.memory),
            ("lines", lines.count, self.steps),
        ):
            limit = base + per_byte * len(data)
            if used > limit:
                raise Cost(f"{used} {what} for an input of {len(data)} bytes, not {limit}")
        return peak, lines.count

    def reached(self, data: bytes) -> set[object]:
        """Feed an input, and return which lines it runs, each with the one before."""
        lines = _Lines()
        with lines:
            self.run(data)
        return lines.pairs


class _Lines:
    """Traces the lines that run in the package, and in what it has from Twisted for HTTP.

    :ivar count: how many run.
    :ivar pairs: those that run one after the other in a function.
    """

    def __init__(self) -> None:
        self.count = 0
        self.pairs: set[object] = set()
        self._tracer: Any = None

    def __enter__(self) -> None:
        self._tracer = sys.gettrace()
        sys.settrace(self._enter)

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._tracer)

    def _enter(self, frame: FrameType, event: str, argument: object) -> Any:
        file = frame.f_code.co_filename
        if not any(part in file for part in _COUNTED):
            return None
        before = 0

        def count(frame: FrameType, event: str, argument: object) -> Any:
            nonlocal before
            if event == "line":
                self.count += 1
                self.pairs.add((file, before, frame.f_lineno))
                before = frame.f_lineno
            return count

        return count


def chunks(stream: bytes, how: int) -> list[bytes]:
    """Cut a stream: in one chunk, in chunks of a size, or of that and one byte in turn."""
    size, at = how & 0x7F, 0
    pieces: list[bytes] = []
    if not size:
        return [stream]
    while at < len(stream):
        step = 1 if how & 0x80 and len(pieces) % 2 else size
        pieces.append(stream[at : at + step])
        at += step
    return pieces


def cuts(stream: bytes, how: int) -> list[list[bytes]]:
    """A stream as one chunk, and as several, where that is another way."""
    pieces = chunks(stream, how)
    return [pieces] if pieces == [stream] else [[stream], pieces]


@contextmanager
def no_failure() -> Iterator[None]:
    """Make sure that no exception is logged: one that was caught far from its cause."""
    failures: list[str] = []

    @provider(ILogObserver)
    def observe(event: LogEvent) -> None:
        if "log_failure" in event:
            failures.append(f"{formatEvent(event)}\n{event['log_failure'].getTraceback()}")

    globalLogPublisher.addObserver(observe)
    try:
        yield
    finally:
        globalLogPublisher.removeObserver(observe)
    if failures:
        raise AssertionError("\n".join(failures))


def same(what: str, first: object, second: object) -> None:
    """Make sure that two ways lead to the same."""
    if first != second:
        raise AssertionError(f"{what}: {first!r}, and {second!r}")
