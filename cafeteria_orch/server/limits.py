"""The limits of open connections: of all clients together, and of one address."""

from __future__ import annotations

from collections import Counter

from twisted.logger import Logger

from cafeteria_orch.common.rate_limit import RateLimitedLog, RateLimits

from .counters import Counters

_log = Logger()


class ConnectionLimits:
    """Counts open connections, and decides whether one more is admitted.

    :param rate_limits: of the lines about refusals.
    :param counters: count how often a limit was hit.
    :param max_connections: the limit of open connections; ``None`` sets none.
    :param max_per_host: the limit of open connections from one address; ``None`` sets none.
    """

    def __init__(
        self,
        rate_limits: RateLimits,
        counters: Counters,
        max_connections: int | None,
        max_per_host: int | None,
    ) -> None:
        self._counters = counters
        self._max_connections = max_connections
        self._max_per_host = max_per_host
        self._open: Counter[str] = Counter()
        self._log = RateLimitedLog(rate_limits, _log)

    def admits(self, host: str | None) -> bool:
        """Return whether one more connection is admitted; count and log a refusal.

        :param host: the peer's address; ``None`` for a local socket, which has none.
        """
        if self._max_connections is not None and self._open.total() >= self._max_connections:
            self._counters.limit_hit("max_connections")
            self._refuse(
                host,
                f"{self._max_connections} are open, the limit of --max-connections,"
                " or of descriptors",
            )
            return False
        if host is None or self._max_per_host is None:
            return True
        if self._open[host] >= self._max_per_host:
            self._counters.limit_hit("max_connections_per_host")
            self._refuse(
                host, f"it has {self._max_per_host}, the limit of --max-connections-per-host"
            )
            return False
        return True

    def opened(self, host: str) -> None:
        """Count a connection that was made."""
        self._open[host] += 1

    def closed(self, host: str) -> None:
        """Forget a connection that was lost, and its address with the last one of it."""
        self._open[host] -= 1
        if not self._open[host]:
            del self._open[host]

    def _refuse(self, host: str | None, error: str) -> None:
        self._log.warn(
            "refused",
            "action: accept_connections | result: refused | ip: {ip} | refused: {refused}"
            " | error: {error}",
            ip=host or "unix",
            error=error,
        )
