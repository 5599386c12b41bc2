"""Machines of a test's own on one machine: network namespaces, and cables that can be pulled."""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Sequence
from itertools import count
from pathlib import Path

from twisted.trial.unittest import SkipTest, SynchronousTestCase

_numbers = count(1)


class Network:
    """A switch, to which this machine and others are connected.

    What is sent to a machine whose cable is pulled is lost silently, as when a machine loses its
    power or a switch fails: no reset says so.

    :raises SkipTest: where no network may be made.
    :ivar address: of this machine.
    :ivar subnet: of all of them.
    """

    def __init__(self, test: SynchronousTestCase) -> None:
        # Others may have one on this machine at the same time.
        prefix = f"10.{random.SystemRandom().randrange(64, 255)}.{os.getpid() % 256}"
        self._switch = f"co{os.getpid()}s{next(_numbers)}"
        self._prefix = prefix
        self.address = f"{prefix}.1"
        self.subnet = f"{prefix}.0/24"
        _make("link", "add", self._switch, "type", "bridge")
        test.addCleanup(_ip, "link", "del", self._switch)
        _ip("address", "add", f"{self.address}/24", "dev", self._switch)
        _ip("link", "set", self._switch, "up")

    def connect(self, machine: Machine, number: int) -> str:
        """Connect a machine.

        :param number: the last part of its address.
        :return: its address.
        """
        cable, plug = f"co{os.getpid()}c{next(_numbers)}", f"eth{next(_numbers)}"
        address = f"{self._prefix}.{number}"
        _ip("link", "add", cable, "type", "veth", "peer", "name", plug, "netns", machine.name)
        _ip("-n", machine.name, "address", "add", f"{address}/24", "dev", plug)
        _ip("-n", machine.name, "link", "set", plug, "up")
        _ip("link", "set", cable, "master", self._switch, "up")
        machine.cables[self] = cable
        return address

    def pull(self, machine: Machine) -> None:
        """Pull the cable of a machine out of the switch."""
        _ip("link", "set", machine.cables[self], "nomaster")

    def plug_in(self, machine: Machine) -> None:
        """Put it back."""
        _ip("link", "set", machine.cables[self], "master", self._switch)


class Machine:
    """A machine that is connected to nothing yet.

    :raises SkipTest: where there may be none.
    """

    def __init__(self, test: SynchronousTestCase) -> None:
        self.name = f"cafeorch-{os.getpid()}-{next(_numbers)}"
        self.cables: dict[Network, str] = {}
        _make("netns", "add", self.name)
        test.addCleanup(_ip, "netns", "del", self.name)
        _ip("-n", self.name, "link", "set", "lo", "up")

    def command(self, *command: str | Path) -> Sequence[str]:
        """What runs a command on this machine."""
        return ["nsenter", f"--net=/run/netns/{self.name}", "--", *map(str, command)]


def _make(*arguments: str) -> None:
    try:
        _ip(*arguments)
    except (OSError, subprocess.CalledProcessError) as error:
        raise SkipTest(f"no network may be made here: {error}") from error


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
