"""Threads that run one at a time, when the world says so."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import Empty
from typing import Any, Generic, TypeVar
from unittest.mock import patch

from cafeteria_orch.store import asking, sink, writer

from .world import Event, World

MAX_DELAY = 0.002
"""How long, in seconds, a thread waits at most for a core."""

_T = TypeVar("_T")


def _taken_lock() -> threading.Lock:
    """A lock that whoever waits for acquires, and another thread releases."""
    lock = threading.Lock()
    lock.acquire()
    return lock


class Killed(BaseException):
    """The thread's process is no more."""


class SimulatedThread:
    """A real thread, of which a part runs at each event of the world, and the world waits for it.

    It stands in for ``threading.Thread``.

    :ivar is_dead: whether its process is no more: it ends where it stands.
    """

    def __init__(
        self, threads: Threads, target: Callable[..., object], args: Any, name: str
    ) -> None:
        self.is_dead = False
        self.error: BaseException | None = None
        self._threads = threads
        self._target = target
        self._args = args
        self._go = _taken_lock()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._wake: Event | None = None
        self._has_ended = False

    def start(self) -> None:
        """Have it run soon."""
        self._threads.alive.append(self)
        self._thread.start()
        self.wake()

    def is_alive(self) -> bool:
        """Whether it has not ended."""
        return not self._has_ended

    def wake(self, seconds: float | None = None) -> None:
        """Have it go on after a time; soon by default."""
        if self._wake is not None:
            self._wake.cancel()
        world = self._threads.world
        if seconds is None:
            seconds = world.chance.uniform(0, MAX_DELAY)
        self._wake = world.after(seconds, self.proceed)

    def proceed(self) -> None:
        """Let it run until it waits. In the world's thread."""
        self._wake = None
        if self._has_ended:
            return
        previous, self._threads.running = self._threads.running, self
        self._go.release()
        self._threads.baton.acquire()
        self._threads.running = previous
        if self.error is not None:
            error, self.error = self.error, None
            raise error

    def pause(self, seconds: float | None) -> None:
        """Wait, in this thread, until it is woken.

        :param seconds: wake it after that time; ``None`` leaves it to others.
        :raises Killed: if its process is no more.
        """
        if self.is_dead:
            raise Killed
        if seconds is not None:
            self.wake(seconds)
        self._threads.baton.release()
        self._go.acquire()
        if self.is_dead:
            raise Killed

    def _run(self) -> None:
        self._go.acquire()
        try:
            if not self.is_dead:
                self._target(*self._args)
        except Killed:
            pass
        except BaseException as error:
            self.error = error
        finally:
            self._has_ended = True
            self._threads.alive.remove(self)
            self._threads.baton.release()


class SimulatedQueue(Generic[_T]):
    """Stands in for a ``SimpleQueue`` that one thread reads."""

    def __init__(self, threads: Threads) -> None:
        self._threads = threads
        self._items: deque[_T] = deque()
        self._reader: SimulatedThread | None = None

    def put(self, item: _T) -> None:
        """Add an item."""
        self._items.append(item)
        if self._reader is not None:
            reader, self._reader = self._reader, None
            reader.wake()

    def get(self, timeout: float) -> _T:
        """Take the next item, after waiting for it."""
        if not self._items:
            self._reader = self._threads.current()
            self._reader.pause(timeout)
            self._reader = None
        return self.get_nowait()

    def get_nowait(self) -> _T:
        """Take the next item."""
        if not self._items:
            raise Empty
        return self._items.popleft()

    def qsize(self) -> int:
        """How many there are."""
        return len(self._items)


class _SimulatedEvent:
    def __init__(self, threads: Threads) -> None:
        self._threads = threads

    def wait(self, seconds: float) -> None:
        self._threads.current().pause(seconds)


class Threads:
    """The threads of one process. It stands in for the module ``threading``.

    :ivar baton: has whoever may run.
    :ivar alive: those that have not ended.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.baton = _taken_lock()
        self.alive: list[SimulatedThread] = []
        self.running: SimulatedThread | None = None

    def Thread(
        self, *, target: Callable[..., object], args: Any = (), name: str = "", daemon: bool = True
    ) -> SimulatedThread:
        """Make a thread."""
        return SimulatedThread(self, target, args, name)

    def Event(self) -> _SimulatedEvent:
        """Make what only a timeout ends the waiting for."""
        return _SimulatedEvent(self)

    def SimpleQueue(self) -> SimulatedQueue[Any]:
        """Make a queue."""
        return SimulatedQueue(self)

    def current(self) -> SimulatedThread:
        """The thread that runs."""
        assert self.running is not None
        return self.running

    def kill(self) -> None:
        """End all where they stand."""
        for thread in self.alive:
            thread.is_dead = True
        while self.alive:
            self.alive[0].proceed()

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Have the store's modules make threads, queues and events of this process."""
        with (
            patch.object(sink, "threading", self),
            patch.object(sink, "SimpleQueue", self.SimpleQueue),
            patch.object(writer, "threading", self),
            patch.object(asking, "threading", self),
        ):
            yield
