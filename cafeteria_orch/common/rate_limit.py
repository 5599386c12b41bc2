"""The rate-limited log: what a client can cause again and again gives a few lines a minute."""

from __future__ import annotations

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

_OTHERS = "others"

_Key = tuple[str, "str | None"]


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
        self._pairs: dict[_Key, _Pair] = {}
        self._pairs_of_kind: Counter[str] = Counter()
        self._timer: IDelayedCall | None = None

    def add(self, kind: str, event: _Event, limit: Limit) -> None:
        """Log an event, or count it."""
        now = self._reactor.seconds()
        self._settle(now)
        address: str | None = event.fields.get("ip")
        key = self._key_of(kind, address, limit)
        pair = self._pairs.get(key) or self._begin(key, _Pair(), now)
        if pair.lines < limit.lines:
            pair.lines += 1
            event.write(1)
            return
        # A failure would keep all that its traceback refers to.
        pair.count(event._replace(failure=None), address)
        if self._timer is None:
            self._timer = self._reactor.callLater(pair.due - now, self._report)
        elif self._timer.getTime() > pair.due:
            self._timer.reset(pair.due - now)

    def stop(self) -> None:
        """Report what was counted, and begin again with the next event."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        pairs = list(self._pairs.values())
        self._pairs.clear()
        self._pairs_of_kind.clear()
        for pair in pairs:
            pair.report()

    def _key_of(self, kind: str, address: str | None, limit: Limit) -> _Key:
        if (kind, address) in self._pairs:
            return kind, address
        if kind not in self._pairs_of_kind and len(self._pairs_of_kind) >= MAX_KINDS:
            return _OTHERS, None
        has_room = self._pairs_of_kind[kind] < limit.addresses
        return kind, address if has_room else None

    def _begin(self, key: _Key, pair: _Pair, now: float) -> _Pair:
        pair.due = now + REPORT_INTERVAL
        self._pairs[key] = pair
        self._pairs_of_kind[key[0]] += 1
        return pair

    def _forget(self, key: _Key) -> None:
        kind, _ = key
        del self._pairs[key]
        self._pairs_of_kind[kind] -= 1
        if not self._pairs_of_kind[kind]:
            del self._pairs_of_kind[kind]

    def _settle(self, now: float) -> None:
        """Report, or forget, the pairs whose intervals are over."""
        while self._pairs:
            key, pair = next(iter(self._pairs.items()))
            if pair.due > now:
                return
            self._forget(key)
            if pair.report():
                self._begin(key, pair, now)

    def _report(self) -> None:
        self._timer = None
        now = self._reactor.seconds()
        self._settle(now)
        due = next((pair.due for pair in self._pairs.values() if pair.has_counted), None)
        if due is not None:
            self._timer = self._reactor.callLater(due - now, self._report)


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

    def warn(self, kind: str, message: str, **fields: object) -> None:
        """Log an event as a warning, or count it.

        :param kind: names what the line speaks for.
        :param message: the format of the line; its field ``refused`` is the number of events that
            the line speaks for. It is added if it is more than one.
        """
        self._add(kind, _Event(self._log, LogLevel.warn, message, fields), FAILURES)

    def error(self, kind: str, message: str, limit: Limit = FAILURES, **fields: object) -> None:
        """The same for an error.

        :param limit: how many lines there are.
        """
        self._add(kind, _Event(self._log, LogLevel.error, message, fields), limit)

    def failure(self, kind: str, message: str, failure: Failure, **fields: object) -> None:
        """The same for a bug; what is logged at once has the traceback."""
        event = _Event(self._log, LogLevel.critical, message, fields, failure)
        self._add(kind, event, FAILURES)

    def info(self, kind: str, message: str, **fields: object) -> None:
        """The same for what happens in normal operation."""
        self._add(kind, _Event(self._log, LogLevel.info, message, fields), TRAFFIC)

    def _add(self, kind: str, event: _Event, limit: Limit) -> None:
        self._limits.add(f"{self._log.namespace} {kind}", event, limit)


class _Event(NamedTuple):
    log: Logger
    level: NamedConstant
    message: str
    fields: dict[str, Any]
    failure: Failure | None = None

    def write(self, events: int, addresses: int = 1) -> None:
        """Log it, as the last of several events."""
        fields, message = self.fields, self.message
        if events > 1 and "{refused}" not in message:
            message += " | repeated: {refused}"
        if addresses > 1:
            message += " | addresses: {addresses}"
            fields = {**fields, "addresses": addresses}
        if self.failure is not None:
            fields = {**fields, "log_failure": self.failure}
        self.log.emit(self.level, message, refused=events, **fields)


class _Pair:
    """The events of a kind and an address since the last line.

    :ivar due: when its interval is over.
    :ivar lines: the number of lines in this interval.
    """

    __slots__ = ("_addresses", "_events", "_last", "due", "lines")

    def __init__(self) -> None:
        self.due = 0.0
        self.lines = 0
        self._events = 0
        self._last: _Event | None = None
        self._addresses: set[str | None] = set()

    @property
    def has_counted(self) -> bool:
        """Whether the next line is due at the end of the interval."""
        return self._last is not None

    def count(self, event: _Event, address: str | None) -> None:
        """Count an event that is not logged."""
        self._events += 1
        self._last = event
        if len(self._addresses) < MAX_COUNTED_ADDRESSES:
            self._addresses.add(address)

    def report(self) -> bool:
        """Log what was counted, and begin to count again; return whether there was anything."""
        if self._last is None:
            return False
        self._last.write(self._events, len(self._addresses))
        self.lines = 1
        self._events, self._last = 0, None
        self._addresses.clear()
        return True
