"""One run of a world, by its seed."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import NamedTuple
from unittest.mock import patch

from cafeteria_orch.server.timeouts import Timeouts
from cafeteria_orch.store import sink

from .clients import FieldClient, HonestClient, Sender
from .disk import install
from .exporter import Exporter, burying, in_place
from .faults import WEIGHTS, Nemesis
from .hostile import HostileClient
from .network import Network
from .server import Limits, Server
from .world import Violation, World

MAX_CALM = 1800.0
"""How long, in seconds, everybody may take to be done when the world is calm."""


@dataclass(frozen=True)
class Settings:
    """How large a world is.

    :ivar hours: for how long things go wrong.
    :ivar kinds: the faults that happen.
    """

    field_clients: int = 3
    clients: int = 4
    exporters: int = 1
    hostile_clients: int = 2
    batches: int = 60
    hours: float = 1.0
    kinds: tuple[str, ...] = tuple(WEIGHTS)
    pause: float = 20.0


class Outcome(NamedTuple):
    """What a run has come to.

    :ivar violation: what was wrong, if anything.
    :ivar digest: of the whole story: the same for the same seed.
    :ivar simulated: seconds in the world.
    """

    seed: int
    violation: str | None
    story: list[str]
    digest: str
    faults: Counter[str]
    simulated: float
    seconds: float
    acknowledged: int
    events: int


def run(
    seed: int, settings: Settings = Settings(), verbose: Callable[[str], object] | None = None
) -> Outcome:
    """Run a world until all is done."""
    with burying():
        return _run(seed, settings, verbose)


def _run(seed: int, settings: Settings, verbose: Callable[[str], object] | None) -> Outcome:
    began = time.perf_counter()
    digest = blake2b(digest_size=8)

    def note(line: str) -> None:
        digest.update(line.encode())
        if verbose is not None:
            verbose(line)

    # Twisted's retry policies ask the module.
    random.seed(seed)
    world = World(seed, note)
    uninstall = install()
    # Few enough that a slow disk fills the sink.
    small = patch.object(sink, "MAX_WAITING_BATCHES", world.chance.choice((4, 1024)))
    small.start()
    server = None
    violation = None
    try:
        network = Network(world)
        server = Server(world, network, _limits(world))
        with in_place(world):
            _live(world, network, server, settings)
    except Violation as error:
        violation = str(error)
    finally:
        if server is not None:
            server.close()
        small.stop()
        uninstall()
        for end in world.at_end:
            end()
    acknowledged = 0 if server is None else len(server.acknowledged)
    return Outcome(
        seed, violation, list(world.story), digest.hexdigest(), world.faults, world.now,
        time.perf_counter() - began, acknowledged, world.events,
    )  # fmt: skip


def _limits(world: World) -> Limits:
    chance = world.chance
    return Limits(
        Timeouts(chance.choice((None, None, 60.0)), chance.choice((5.0, 30.0)), 60.0),
        max_connections=chance.choice((10, 50)),
        max_in_flight_bytes=chance.choice((700_000, 700_000, 4_000_000)),
        max_frame_bytes=500_000,
        patience=chance.choice((0.0, 0.0, 5.0, 30.0, 30.0)),
        drain_timeout=chance.choice((1.0, 1.0, 10.0)),
    )


def _live(world: World, network: Network, server: Server, settings: Settings) -> None:
    hours = settings.hours * world.scale
    server.start()
    senders: list[Sender] = []
    numbers = iter(range(1000))
    for kind, count in (
        (FieldClient, settings.field_clients),
        (HonestClient, settings.clients),
        (Exporter, settings.exporters),
    ):
        for _ in range(count):
            batches = world.chance.randrange(1, settings.batches + 1)
            # Some are done soon, others have something to send as long as things go wrong.
            pause = hours * 3600 / batches * world.chance.random() ** 2
            senders.append(kind(world, network, server, next(numbers), pause, batches))
    hostile = [
        HostileClient(world, network, server, next(numbers), 30.0 * world.scale)
        for _ in range(settings.hostile_clients * (1 + 3 * world.is_large))
    ]
    nemesis = Nemesis(
        world, network, server, senders, kinds=settings.kinds, pause=settings.pause * world.scale
    )
    end = hours * 3600

    def all_done() -> bool:
        return all(sender.is_done for sender in senders)

    world.run_until(end, all_done)
    nemesis.calm()
    for each in hostile:
        each.is_done = True
    for sender in senders:
        sender.hurry()
    calm = world.now
    if not world.run_until(calm + MAX_CALM, all_done):
        waiting = [sender.name for sender in senders if not sender.is_done]
        world.fail(f"{', '.join(waiting)} not done {MAX_CALM:g} s after the last fault")
    world.run_until(world.now + 200)
    server.check_hostages()
    # Whoever says nothing has all the time that the server gives.
    for pair in network.pairs:
        network.cut(pair)
    world.run_until(world.now + 120)
    if not server.is_up:
        world.fail("the server is not up though all is calm")
    server.check_store("in the end")
    server.check_rest()
    for sender in senders:
        if isinstance(sender, HonestClient) and sender.has_batches:
            server.check_completeness(str(sender.client_id))


def shrink(outcome: Outcome, settings: Settings) -> tuple[Outcome, Settings]:
    """Find a smaller world in which a seed fails too: fewer clients, batches, kinds of faults."""
    best, smallest = outcome, settings
    changed = True
    while changed:
        changed = False
        for candidate in _smaller(smallest):
            found = run(outcome.seed, candidate)
            if found.violation is not None:
                best, smallest, changed = found, candidate, True
                break
    return best, smallest


def _smaller(settings: Settings) -> list[Settings]:
    candidates = []
    for name in ("hostile_clients", "field_clients", "clients", "exporters", "batches"):
        value = getattr(settings, name)
        least = 1 if name == "batches" else 0
        candidates += [
            replace(settings, **{name: smaller})
            for smaller in sorted({least, value // 2, value - 1})
            if least <= smaller < value
        ]
    for kind in settings.kinds:
        candidates.append(
            replace(settings, kinds=tuple(each for each in settings.kinds if each != kind))
        )
    if settings.hours > 0.02:
        candidates.append(replace(settings, hours=settings.hours / 2))
    return candidates
