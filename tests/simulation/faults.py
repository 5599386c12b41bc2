"""What goes wrong, and when: some of everything, until the world is calm."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from .clients import Sender
from .exporter import Exporter
from .network import MAX_STALL, Network
from .server import Server
from .world import World

HEALING = 8.0
"""How long, in seconds, a server may refuse a store that is well."""


class Nemesis:
    """Has a fault happen every now and then.

    :param kinds: the names of those that may happen; all by default.
    :param pause: the mean time between two, in seconds.
    """

    def __init__(
        self,
        world: World,
        network: Network,
        server: Server,
        senders: Sequence[Sender],
        *,
        kinds: Collection[str] | None = None,
        pause: float = 2.0,
    ) -> None:
        self._world = world
        self._network = network
        self._server = server
        self._senders = senders
        self._exporters = [sender for sender in senders if isinstance(sender, Exporter)]
        self._pause = pause
        self._faults = [
            (name, weight, getattr(self, name))
            for name, weight in WEIGHTS.items()
            if kinds is None or name in kinds
        ]
        self._next()

    def _next(self) -> None:
        if self._faults:
            self._world.after(self._world.chance.expovariate(1 / self._pause), self._strike)

    def _strike(self) -> None:
        if self._world.is_calm:
            return
        weights = [weight for _, weight, _ in self._faults]
        self._world.strikes += 1
        ((_, _, fault),) = self._world.chance.choices(self._faults, weights)
        if self._world.chance.random() < 0.3:
            # Trouble comes when all have something to send.
            for sender in self._senders:
                sender.wake_up()
        fault()
        self._next()

    def calm(self) -> None:
        """All is well from now on: what was broken is mended."""
        world, server = self._world, self._server
        world.is_calm = True
        # What is cut now disturbs its clients for the last time.
        world.strikes += 1
        for pair in self._network.pairs:
            if any(end.out.is_lost for end in pair):
                # A connection of which one direction is lost comes to its end some day.
                self._network.cut(pair)
            for end in pair:
                end.out.heal()
        if server.is_up:
            self._mend_disk(server.disk)()
        world.tell("the world is calm")

    def _mend_disk(self, disk: object) -> Callable[[], None]:
        def mend() -> None:
            if self._server.is_up and self._server.disk is disk:
                # A sync that has begun takes as long as it does.
                healing = HEALING + self._server.disk.delay
                self._server.disk.is_full = False
                self._server.disk.fails = 0.0
                self._server.disk.delay = 0.002
                strikes = self._world.strikes
                self._world.after(healing, lambda: look(strikes))

        def look(strikes: int) -> None:
            is_same = self._server.is_up and self._server.disk is disk
            if is_same and self._world.strikes == strikes and not self._server.is_slow:
                self._server.check_healed()

        return mend

    # The faults.

    def cut(self) -> None:
        """A connection is reset."""
        if pairs := self._network.open_pairs():
            pair = self._world.pick(pairs)
            self._world.fault("cut", f"the connection of {pair[0].address} is reset")
            self._network.cut(pair)

    def lose(self) -> None:
        """Of one end of a connection nothing is heard any more."""
        if pairs := self._network.open_pairs():
            pair = self._world.pick(pairs)
            which = self._world.pick((0, 1))
            self._world.fault("lost", f"{pair[which].address} is not heard any more")
            self._network.lose(pair, which)

    def stall(self) -> None:
        """A link stalls, for a moment or for hours."""
        if pairs := self._network.open_pairs():
            end = self._world.pick(self._world.pick(pairs))
            seconds = self._duration(MAX_STALL)
            self._world.fault("stall", f"nothing of {end.address} arrives for {seconds:.1f} s")
            end.is_disturbed = end.peer.is_disturbed = True
            end.out.stall(seconds)

    def stop(self) -> None:
        """The server gets no core for a while."""
        if self._server.is_up:
            seconds = self._duration(300)
            self._world.fault("stopped", f"the server is stopped for {seconds:.1f} s")
            self._server.reactor.stop_for(seconds)
            self._server.slow_until = self._world.now + seconds + HEALING

    def starve(self) -> None:
        """The writer's thread gets no core for a while."""
        if self._server.is_up and self._server.threads.alive:
            seconds = self._duration(60)
            self._world.fault("starved", f"the writer is stopped for {seconds:.1f} s")
            self._server.threads.alive[0].wake(seconds)
            self._server.slow_until = self._world.now + seconds + HEALING

    def kill(self) -> None:
        """The server is killed."""
        if self._server.is_up:
            self._world.fault("kill", "the server is killed")
            self._server.kill(power=False)

    def kill_sender(self) -> None:
        """The command that sends is killed."""
        if self._exporters:
            exporter = self._world.pick(self._exporters)
            self._world.fault("kill of a sender", f"{exporter.name} is killed")
            exporter.kill()

    def power(self) -> None:
        """The server's machine loses its power."""
        if self._server.is_up:
            lost = self._server.disk.unsynced()
            self._world.fault("power", f"the power fails; {lost} writes were not synced")
            self._server.kill(power=True)

    def drain(self) -> None:
        """An operator restarts the server."""
        if self._server.is_up:
            # It is restarted because something is wrong, as often as not.
            self._world.pick((self.full_disk, self.slow_disk, self.scrape))()
            self._world.after(self._world.chance.uniform(0, 4), self._drain)

    def _drain(self) -> None:
        if self._server.is_up and not self._world.is_calm:
            self._world.fault("drain", "the server is told to stop")
            self._server.drain(self._world.chance.uniform(0.5, 5))

    def scrape(self) -> None:
        """An operator looks at the server's figures."""
        if self._server.is_up:
            self._world.fault("scrape")
            self._server.scrape()

    def full_disk(self) -> None:
        """The disk is full for a while."""
        self._break_disk("full", self._duration(120), is_full=True)

    def bad_disk(self) -> None:
        """Some writes and syncs fail for a while."""
        self._break_disk(
            "failing", self._duration(30), fails=self._world.chance.uniform(0.01, 0.6)
        )

    def slow_disk(self) -> None:
        """Syncs take long for a while."""
        self._break_disk("slow", self._duration(120), delay=self._duration(20))

    def _break_disk(self, how: str, seconds: float, **state: float) -> None:
        if self._server.is_up:
            disk = self._server.disk
            self._world.fault(f"{how} disk", f"the disk is {how} for {seconds:.1f} s")
            for name, value in state.items():
                setattr(disk, name, value)
            self._world.after(seconds, self._mend_disk(disk))

    def set_clock(self) -> None:
        """An operator sets the wall clock."""
        seconds = self._world.chance.choice((-1, 1)) * self._duration(86400)
        self._world.fault("clock", f"the wall clock is set by {seconds:.1f} s")
        self._world.wall_offset += seconds

    def _duration(self, most: float) -> float:
        # As many short ones as long ones, whatever the unit.
        chance = self._world.chance
        return float(most ** chance.random() * chance.uniform(0.01, 1.0))


WEIGHTS = {
    "cut": 20, "kill_sender": 6, "lose": 5, "stall": 15, "stop": 4, "starve": 6, "kill": 3, "power": 3, "drain": 10,
    "full_disk": 5, "bad_disk": 5, "slow_disk": 6, "set_clock": 3, "scrape": 8,
}  # fmt: skip
"""How often each fault happens, against the others."""
