"""The rate-limited log: what a client can cause again and again gives a few lines a minute."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any, NamedTuple

from constantly import NamedConstant
from twisted.internet.interfaces import IDelayedCall
from twisted.logger import Logger, LogLevel
from twisted.python.failure import Failure

REPORT_INTERVAL = 60.0
"""The seconds in which events are counted before a line says how many they were."""

MAX_KINDS = 64
"""The limit of kinds that have lines of their own; all further ones share theirs."""

MAX_COUNTED_ADDRESSES = 1024
"""How many addresses are told apart among those that share a line."""


class Limit(NamedTuple):
    """How many lines there are of a kind of events.

    :ivar lines: how many of an address are logged at once in an interval.
    :ivar addresses: how many addresses have lines of their own at a time.
    """

    lines: int
    addresses: int


FAILURES = Limit(lines=1, addresses=16)
"""What should not happen: the first line says all, the others how often."""

LOST_BATCHES = Limit(lines=100, addresses=16)
"""Batches that are not stored: each line names one."""

TRAFFIC = Limit(lines=100, addresses=1024)
"""What happens in normal operation, and without end only in a flood."""

REPEATED = " | repeated: {refused}"
"""Is added to the format of a line that speaks for several events, and does not say so itself."""

FROM_ADDRESSES = " | addresses: {addresses}"
"""Is added to the format of a line that speaks for several addresses."""

_OTHERS = ("", "others")

_Kind = tuple[str, str]
"""The namespace of a logger, and what names the line there."""

_Event = tuple[Logger, NamedConstant, str, dict[str, Any]]
"""The logger, the level, the format and the fields."""


class RateLimits:
    """Counts the events of each kind and address, and says when a line is due.

    1. The first events of a pair of kind and address are logged at once; how many of them, its
       :class:`Limit` says. The pair's interval begins with the first.
    2. Further ones are counted. When the interval is over, a line says how many they were, with
       what the last of them says. That line is the first of the next interval.
    3. A pair of which nothing was counted in its interval is forgotten.
    4. When as many addresses as the limit allows have pairs, the others share one. Its line says
       how many they are.

    In the reactor's thread.

    :param reactor: measures the time, and calls when a line about what was counted is due.
    """

    def __init__(self, reactor: Any) -> None:
        self._reactor = reactor
        # In the order in which they are due: all intervals are equally long.
        self._pairs: dict[tuple[_Kind, str | None], _Pair] = {}
        self._pairs_of_kind: Counter[_Kind] = Counter()
        self._first_due = math.inf
        self._timer: IDelayedCall | None = None

    def add(
        self, kind: _Kind, event: _Event, limit: Limit, failure: Failure | None = None
    ) -> None:
        """Log an event, or count it.

        :param failure: is logged with an event, and not kept with one that is counted: it refers
            to all that its frames had.
        """
        now = self._reactor.seconds()
        if now >= self._first_due:
            self._settle(now)
        address: str | None = event[3].get("ip")
        pair = self._pairs.get((kind, address)) or self._find(kind, address, limit, now)
        if pair.lines < limit.lines:
            pair.lines += 1
            _write(event, 1, failure=failure)
            return
        if not pair.has_counted:
            self._call_at(pair.due, now)
        pair.count(event, address)

    def stop(self) -> None:
        """Report what was counted, and begin again with the next event."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        pairs = list(self._pairs.values())
        self._pairs.clear()
        self._pairs_of_kind.clear()
        self._first_due = math.inf
        for pair in pairs:
            pair.report()

    def _find(self, kind: _Kind, address: str | None, limit: Limit, now: float) -> _Pair:
        """Begin a pair, or find the one that it shares with others."""
        if kind not in self._pairs_of_kind and len(self._pairs_of_kind) >= MAX_KINDS:
            kind = _OTHERS
            address = None
        elif self._pairs_of_kind[kind] >= limit.addresses:
            address = None
        pair = self._pairs.get((kind, address))
        if pair is None:
            pair = _Pair(kind, address)
            self._begin(pair, now)
        return pair

    def _begin(self, pair: _Pair, now: float) -> None:
        pair.due = now + REPORT_INTERVAL
        self._first_due = min(self._first_due, pair.due)
        self._pairs[pair.kind, pair.address] = pair
        self._pairs_of_kind[pair.kind] += 1

    def _forget(self, pair: _Pair) -> None:
        del self._pairs[pair.kind, pair.address]
        self._pairs_of_kind[pair.kind] -= 1
        if not self._pairs_of_kind[pair.kind]:
            del self._pairs_of_kind[pair.kind]

    def _settle(self, now: float) -> None:
        """Report, or forget, the pairs whose intervals are over."""
        self._first_due = math.inf
        while self._pairs:
            pair = next(iter(self._pairs.values()))
            if pair.due > now:
                self._first_due = pair.due
                return
            self._forget(pair)
            if pair.report():
                self._begin(pair, now)

    def _call_at(self, due: float, now: float) -> None:
        if self._timer is None:
            self._timer = self._reactor.callLater(due - now, self._report)
        elif self._timer.getTime() > due:
            self._timer.reset(due - now)

    def _report(self) -> None:
        self._timer = None
        now = self._reactor.seconds()
        self._settle(now)
        due = next((pair.due for pair in self._pairs.values() if pair.has_counted), None)
        if due is not None:
            self._call_at(due, now)


class RateLimitedLog:
    """Logs events of a module within the limits of all.

    The field ``ip`` of an event is the address that it counts for. All fields are kept for a
    while: none may refer to what is large.

    :param limits: of all modules together.
    :param log: writes the lines.
    """

    def __init__(self, limits: RateLimits, log: Logger) -> None:
        self._limits = limits
        self._log = log
        self._namespace = log.namespace

    def warn(self, kind: str, message: str, **fields: object) -> None:
        """Log an event as a warning, or count it.

        :param kind: names what the line speaks for.
        :param message: the format of the line; its field ``refused`` is the number of events that
            the line speaks for. It is added if it is more than one.
        """
        event = self._log, LogLevel.warn, message, fields
        self._limits.add((self._namespace, kind), event, FAILURES)

    def error(self, kind: str, message: str, limit: Limit = FAILURES, **fields: object) -> None:
        """The same for an error.

        :param limit: how many lines there are.
        """
        event = self._log, LogLevel.error, message, fields
        self._limits.add((self._namespace, kind), event, limit)

    def failure(self, kind: str, message: str, failure: Failure, **fields: object) -> None:
        """The same for a bug; what is logged at once has the traceback."""
        event = self._log, LogLevel.critical, message, fields
        self._limits.add((self._namespace, kind), event, FAILURES, failure)

    def info(self, kind: str, message: str, **fields: object) -> None:
        """The same for what happens in normal operation."""
        event = self._log, LogLevel.info, message, fields
        self._limits.add((self._namespace, kind), event, TRAFFIC)


class _Pair:
    """The events of a kind and an address since the last line.

    :param kind: of the events.
    :param address: ``None`` for the pair that addresses share.
    :ivar due: when its interval is over.
    :ivar lines: the number of lines in this interval.
    """

    __slots__ = ("_addresses", "_events", "_last", "address", "due", "kind", "lines")

    def __init__(self, kind: _Kind, address: str | None) -> None:
        self.kind = kind
        self.address = address
        self.due = 0.0
        self.lines = 0
        self._events = 0
        self._last: _Event | None = None
        self._addresses: set[str] = set()

    @property
    def has_counted(self) -> bool:
        """Whether the next line is due at the end of the interval."""
        return self._last is not None

    def count(self, event: _Event, address: str | None) -> None:
        """Count an event that is not logged."""
        self._events += 1
        self._last = event
        if address != self.address and len(self._addresses) < MAX_COUNTED_ADDRESSES:
            self._addresses.add(str(address))

    def report(self) -> bool:
        """Log what was counted, and begin to count again; return whether there was anything."""
        if self._last is None:
            return False
        _write(self._last, self._events, len(self._addresses))
        self.lines = 1
        self._events, self._last = 0, None
        self._addresses.clear()
        return True


def _write(event: _Event, events: int, addresses: int = 1, failure: Failure | None = None) -> None:
    """Log an event, as the last of several."""
    log, level, message, fields = event
    if events > 1 and "{refused}" not in message:
        message += REPEATED
    if addresses > 1:
        message += FROM_ADDRESSES
        fields = {**fields, "addresses": addresses}
    if failure is not None:
        fields = {**fields, "log_failure": failure}
    log.emit(level, message, refused=events, **fields)
