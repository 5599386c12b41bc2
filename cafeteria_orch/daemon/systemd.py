"""Notifications to systemd: the server is ready, is alive, stops.

The protocol is that of ``sd_notify(3)``: datagrams to the socket that the environment names.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping

from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import LoopingCall
from twisted.logger import Logger

_log = Logger()


class SystemdNotifier:
    """Notifies the service manager about this process. In the reactor's thread.

    :param address: the manager's socket; ``@`` stands for the first byte of an abstract one.
    :param watchdog: seconds after which the manager takes a silent process for dead; ``None``
        without a watchdog.
    """

    def __init__(self, address: str, watchdog: float | None = None) -> None:
        self._address = f"\0{address[1:]}" if address.startswith("@") else address
        self._watchdog = watchdog
        self._alive = LoopingCall(self._notify, "WATCHDOG=1")

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> SystemdNotifier | None:
        """Make the notifier that the environment asks for; ``None`` without a service manager."""
        address = environment.get("NOTIFY_SOCKET")
        if not address:
            return None
        microseconds = environment.get("WATCHDOG_USEC", "")
        # The manager may watch another process of the service.
        is_watched = environment.get("WATCHDOG_PID") in {None, str(os.getpid())}
        watches = is_watched and microseconds.isdecimal() and int(microseconds) > 0
        return cls(address, int(microseconds) / 1e6 if watches else None)

    def ready(self, clock: IReactorTime) -> None:
        """Say that the server serves; from now on say that it is alive, twice as often as needed.

        :param clock: measures the time; a wall clock that is set back would starve the watchdog.
        """
        self._notify(f"READY=1\nMAINPID={os.getpid()}")
        if self._watchdog is not None:
            self._alive.clock = clock
            self._alive.start(self._watchdog / 2)

    def stopping(self) -> None:
        """Say that the server drains. It is still alive."""
        self._notify("STOPPING=1")

    def stopped(self) -> None:
        """Say nothing more."""
        if self._alive.running:
            self._alive.stop()

    def _notify(self, state: str) -> None:
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sender:
                sender.sendto(state.encode(), self._address)
        except OSError as error:
            # The batches matter more than the manager.
            _log.warn(
                "action: notify | result: fail | state: {state} | error: {error}",
                state=state.partition("\n")[0],
                error=error,
            )
