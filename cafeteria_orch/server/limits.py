"""How many connections there may be."""

from __future__ import annotations

from collections import Counter
from typing import Any

from twisted.logger import Logger

from cafeteria_orch.common.rate_limit import RateLimitedLog

from .counters import Counters

_log = Logger()


class ConnectionLimits:
    """Counts connections, and says whether one more is admitted.

    :param reactor: for the time.
    :param counters: of the hits.
    :param most: so many connections at once; ``None`` for any number.
    :param most_per_host: so many of one address; ``None`` for any number.
    """

    def __init__(
        self, reactor: Any, counters: Counters, most: int | None, most_per_host: int | None
    ) -> None:
        self._counters = counters
        self._most = most
        self._most_per_host = most_per_host
        self._open: Counter[str] = Counter()
        self._log = RateLimitedLog(reactor, _log)

    def admits(self, host: str | None) -> bool:
        """Whether a connection may be made; if not, that is counted, and logged now and then.

        :param host: the peer's address; ``None`` for a local socket, which has none.
        """
        if self._most is not None and self._open.total() >= self._most:
            self._counters.limit_hit("max_connections")
            self._refuse(
                host,
                f"{self._most} are open, the limit of --max-connections, or of descriptors",
            )
            return False
        most_of_it = None if host is None else self._most_per_host
        if most_of_it is not None and self._open[host or ""] >= most_of_it:
            self._counters.limit_hit("max_connections_per_host")
            self._refuse(host, f"it has {most_of_it}, the limit of --max-connections-per-host")
            return False
        return True

    def opened(self, host: str) -> None:
        """A connection was made."""
        self._open[host] += 1

    def closed(self, host: str) -> None:
        """It is gone."""
        self._open[host] -= 1
        if not self._open[host]:
            del self._open[host]

    def _refuse(self, host: str | None, why: str) -> None:
        self._log.warn(
            "refused",
            "action: accept_connections | result: refused | ip: {ip} | refused: {refused}"
            " | error: {error}",
            ip=host or "unix",
            error=why,
        )
