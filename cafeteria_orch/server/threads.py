"""The threads of blocking processors."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.threads import deferToThreadPool
from twisted.python.threadpool import ThreadPool


class ProcessorThreads:
    """A thread pool that is started when it is needed, and that never keeps the process alive.

    :param reactor: to come back from the threads.
    """

    def __init__(self, reactor: Any) -> None:
        self._reactor = reactor
        self._pool: _DaemonThreadPool | None = None

    def call(self, function: Callable[..., Any], *arguments: Any) -> Deferred[Any]:
        """Call a function in a thread; fires with its result in the reactor's thread."""
        if self._pool is None:
            self._pool = _DaemonThreadPool(minthreads=0, name="cafeorch-blocking")
            self._pool.start()
        return deferToThreadPool(self._reactor, self._pool, function, *arguments)

    def stop(self) -> None:
        """Let go of the threads; what still runs in them is not waited for."""
        if self._pool is not None and not self._pool.working:
            self._pool.stop()
        self._pool = None


class _DaemonThreadPool(ThreadPool):
    """A processor that hangs must not keep the process from ending."""

    threadFactory = staticmethod(  # type: ignore[assignment]
        partial(threading.Thread, daemon=True)
    )
