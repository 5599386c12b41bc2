"""File descriptors: as many as the connections need, and few words where there are none left."""

from __future__ import annotations

import resource

from twisted.logger import ILogObserver, LogEvent, Logger
from zope.interface import implementer

REPORT_INTERVAL = 60.0
"""How often, in seconds, it is reported that there are too few, while that goes on."""

_OTHERS = 64
"""So many are kept for all that is no connection: listening, the store, the log, processors."""

# How Twisted says that it could not accept a connection, and how it coped.
_REFUSED = "EMFILE recovery: Closed socket from {address}"
_FAILED = "Could not accept new connection ({acceptError})"
_COPING = frozenset(
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
    """Raise the limit of this process as far as needed, and allowed; warn if that is too low.

    Connections are not to take the descriptors that all else needs: a log file that is rotated,
    a word to systemd.

    :param connections: so many are to be possible at once.
    :param each: so many descriptors for each: two, where as many again may be on their way to
        become clients.
    :return: so many are.
    """
    needed = connections * each + _OTHERS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return connections
    allowed = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    except (OSError, ValueError):
        # A sandbox may forbid what the limits allow.
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
    """Passes events on, but for those of connections refused for want of a descriptor.

    Twisted refuses such a connection with three lines for each. Here it is one line, and no
    more than one in :data:`REPORT_INTERVAL`.

    :param observer: who gets the events.
    :ivar observer: the same.
    """

    def __init__(self, observer: ILogObserver) -> None:
        self.observer = observer
        self._refused = 0
        self._reported: float | None = None

    def __call__(self, event: LogEvent) -> None:
        """Take an event."""
        said = event.get("log_format")
        if said == _REFUSED or (said == _FAILED and event["acceptError"] in _OUT_OF_DESCRIPTORS):
            self._refuse(event["log_time"])
        elif said not in _COPING:
            self.observer(event)

    def _refuse(self, now: float) -> None:
        self._refused += 1
        if self._reported is None or now - self._reported >= REPORT_INTERVAL:
            self._reported = now
            _log.warn(
                "action: accept_connections | result: fail | refused: {refused} | error: out of"
                " file descriptors: raise LimitNOFILE (systemd) or ulimit -n, or lower"
                " --max-connections",
                refused=self._refused,
            )
            self._refused = 0
