"""File descriptors: the limit that the connections need, and a server that has none left."""

from __future__ import annotations

import resource

from twisted.logger import ILogObserver, LogEvent, Logger
from zope.interface import implementer

from cafeteria_orch.common.rate_limit import RateLimitedLog, RateLimits

_OTHERS = 64
"""Descriptors for all but connections: listening, the store, the log, processors."""

# What Twisted logs when it cannot accept a connection, and how it recovers.
_REFUSED = "EMFILE recovery: Closed socket from {address}"
_FAILED = "Could not accept new connection ({acceptError})"
_RECOVERY = frozenset(
    {
        "EMFILE encountered; releasing reserved file descriptor.",
        "Re-reserving EMFILE recovery file descriptor.",
        "Could not reserve EMFILE recovery file descriptor.",
        "Could not re-reserve EMFILE recovery file descriptor.",
    }
)
_OUT_OF_DESCRIPTORS = frozenset({"EMFILE", "ENFILE"})

_log = Logger()


def allow_connections(connections: int, each: int = 1) -> int:
    """Raise the process's limit of descriptors as far as needed and allowed; warn if it is low.

    Connections leave the descriptors alone that the rest needs: a log file that is rotated, a
    notification of systemd.

    :param connections: the limit of connections.
    :param each: descriptors for each of them: two where as many connections may be pending.
    :return: the limit of connections that the descriptors allow.
    """
    needed = connections * each + _OTHERS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return connections
    allowed = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    except (OSError, ValueError):
        # A sandbox may forbid what the hard limit allows.
        allowed = soft
    if allowed == needed:
        return connections
    possible = max((allowed - _OTHERS) // each, 1)
    _log.warn(
        "action: start | result: limited | max_connections: {possible} | error: {allowed} file"
        " descriptors are too few for {connections} connections: raise LimitNOFILE (systemd) or"
        " ulimit -n to {needed}, or lower --max-connections",
        possible=possible,
        allowed=allowed,
        connections=connections,
        needed=needed,
    )
    return possible


@implementer(ILogObserver)
class DescriptorReporter:
    """Passes events on, except those of connections that found no descriptor.

    Twisted logs three lines for each such connection. This logs one line a minute.

    :param limits: of the lines.
    :param observer: takes the other events.
    :ivar observer: the same.
    """

    def __init__(self, limits: RateLimits, observer: ILogObserver) -> None:
        self.observer = observer
        self._log = RateLimitedLog(limits, _log)

    def __call__(self, event: LogEvent) -> None:
        """Take an event."""
        said = event.get("log_format")
        if said == _REFUSED or (said == _FAILED and event["acceptError"] in _OUT_OF_DESCRIPTORS):
            self._log.warn(
                "refused",
                "action: accept_connections | result: fail | refused: {refused} | error: out of"
                " file descriptors: raise LimitNOFILE (systemd) or ulimit -n, or lower"
                " --max-connections",
            )
        elif said not in _RECOVERY:
            self.observer(event)
