"""The bounds of admission hold against peers that send anything, in any pieces, at any time."""

from __future__ import annotations

import contextlib
import ssl
import time
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast
from unittest.mock import patch

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from twisted.internet.error import ConnectionAborted
from twisted.internet.task import Clock
from twisted.logger import LogLevel
from twisted.protocols import tls
from twisted.trial.unittest import SynchronousTestCase

from cafeteria_orch.edge.admission import ADMISSION_TIMEOUT, Admission
from cafeteria_orch.edge.tls import ServerTLS
from cafeteria_orch.server.factory import OrchestratorFactory
from cafeteria_orch.server.timeouts import Timeouts
from tests.support.admission import BALANCER, BALANCERS, V1, V2, Wire
from tests.support.builders import ECHO, echo, numbered
from tests.support.certificates import Files, MemoryClient, client_context
from tests.support.tracing import untraced

MAX_PENDING = 4
FRAME = numbered(7)


@cache
def server_tls() -> ServerTLS:
    """The server's side of TLS, read once for all examples."""
    with TemporaryDirectory() as folder:
        return ServerTLS(time.time, Files(Path(folder)).cert)


class Peer:
    """The other side of a connection.

    :ivar to_send: what an honest peer sends next; a hostile one sends whatever the test draws.
    """

    def __init__(self, wire: Wire, connected_at: float, header: bytes, *, by_tls: bool) -> None:
        self.wire = wire
        self.candidate = wire.protocol
        self.connected_at = connected_at
        self.to_send = header
        self.client = MemoryClient(wire, client_context()) if by_tls else None
        self.to_send += self.client.hello() if self.client else FRAME
        self.is_honest = True
        self.is_evicted = False
        self.is_lost = False

    def send(self, size: int) -> None:
        """Send the next bytes, and go on with the handshake when all are sent."""
        data, self.to_send = self.to_send[:size], self.to_send[size:]
        self.wire.deliver(data)
        if self.client and not self.to_send:
            # The TLS of a peer that has sent wrong bytes is broken.
            with contextlib.nullcontext() if self.is_honest else contextlib.suppress(ssl.SSLError):
                self.to_send = self.client.answer(FRAME)

    def answers(self, clock: Clock) -> bytes:
        """The answers that it has."""
        clock.advance(0)
        return self.client.read() if self.client else self.wire.value()


class Peers(RuleBasedStateMachine):
    """Peers of one admission, with TLS, with PROXY headers, or with both."""

    @initialize(mode=st.sampled_from([(True, True), (True, False), (False, True)]))
    def listen(self, mode: tuple[bool, bool]) -> None:
        self.by_tls, self.is_proxied = mode
        self.clock = Clock()
        patcher = patch.object(tls, "_get_default_clock", lambda: self.clock)
        patcher.start()
        self.undo = patcher.stop
        # Only admission closes anything here.
        never = Timeouts(idle=None, frame=None, processing=None)
        self.factory = OrchestratorFactory(self.clock, timeouts=never, log_level=LogLevel.critical)
        self.factory.register_processor(ECHO, echo)
        self.admission = Admission(
            self.clock,
            self.factory,
            max_pending=MAX_PENDING,
            trusted=BALANCERS if self.is_proxied else None,
            tls=server_tls() if self.by_tls else None,
        )
        self.peers: list[Peer] = []

    def pending(self) -> list[Peer]:
        """The peers that are connected, and not clients yet, in the order of connection."""
        return [peer for peer in self.peers if not (peer.is_lost or self.is_client(peer))]

    def is_client(self, peer: Peer) -> bool:
        """Whether the server has admitted a peer."""
        protocol = peer.wire.protocol
        clients = self.factory.connections
        return protocol in clients or getattr(protocol, "wrappedProtocol", None) in clients

    @rule(header=st.sampled_from([V1, V2]))
    def connect(self, header: bytes) -> None:
        """Connect one more peer, in the place of the oldest if too many are pending."""
        pending = self.pending()
        protocol = self.admission.buildProtocol(BALANCER)
        assert protocol is not None
        if len(pending) == MAX_PENDING:
            pending[0].is_evicted = True
            assert pending[0].wire.aborted
        wire = Wire(protocol)
        header = header if self.is_proxied else b""
        self.peers.append(Peer(wire, self.clock.seconds(), header, by_tls=self.by_tls))
        self.lose_aborted()

    @precondition(lambda self: self.pending())
    @rule(which=st.integers(0, 9), size=st.integers(1, 700))
    def send_next(self, which: int, size: int) -> None:
        """A peer sends some of what it has to."""
        pending = self.pending()
        pending[which % len(pending)].send(size)
        self.lose_aborted()

    @precondition(lambda self: self.pending())
    @rule(
        which=st.integers(0, 9),
        data=st.binary(min_size=1, max_size=40)
        | st.binary(max_size=40).map(lambda rest: b"\x16\x03\x01" + rest)
        | st.sampled_from([V1, V2, V1[:20], V2[:15], b"PROXY UNKNOWN\r\n", b"\x16" * 5000]),
    )
    def send_anything(self, which: int, data: bytes) -> None:
        """A peer sends bytes that may be wrong."""
        pending = self.pending()
        peer = pending[which % len(pending)]
        peer.is_honest = False
        peer.wire.deliver(data)
        self.lose_aborted()

    @rule(seconds=st.floats(0, ADMISSION_TIMEOUT) | st.sampled_from([0.0, 5.0, 30.0]))
    def pause(self, seconds: float) -> None:
        """Nobody sends anything for a while."""
        self.clock.advance(seconds)
        self.lose_aborted()

    @precondition(lambda self: self.pending())
    @rule(which=st.integers(0, 9))
    def close(self, which: int) -> None:
        """A peer closes its connection."""
        pending = self.pending()
        self.lose(pending[which % len(pending)])

    def lose_aborted(self) -> None:
        """The reactor loses the connections that were aborted."""
        for peer in self.pending():
            if peer.wire.aborted:
                self.lose(peer, ConnectionAborted())

    def lose(self, peer: Peer, error: Exception | None = None) -> None:
        peer.wire.lose(error)
        peer.is_lost = True

    @invariant()
    def pending_connections_are_bounded(self) -> None:
        """Not more than the limit are pending, in the order that they are closed in."""
        assert len(self.admission.pending) <= MAX_PENDING
        assert list(self.admission.pending) == [peer.candidate for peer in self.pending()]

    @invariant()
    def waiting_is_bounded(self) -> None:
        """No connection is pending for longer than the timeout."""
        for peer in self.pending():
            assert self.clock.seconds() - peer.connected_at < ADMISSION_TIMEOUT

    @invariant()
    def honest_peers_are_admitted(self) -> None:
        """Only the timeout and the limit close a peer that sends what it has to."""
        for peer in self.peers:
            if not peer.is_honest or peer.is_lost:
                continue
            assert not peer.wire.is_closing
            if not peer.to_send:
                assert self.is_client(peer)

    @invariant()
    def each_failure_is_counted_once(self) -> None:
        """Connections that were closed before they sent a byte need not count."""
        lost = [peer for peer in self.peers if peer.is_lost]
        closed = [peer for peer in lost if peer.wire.aborted]
        assert len(closed) <= self.factory.counters.failed_handshakes <= len(lost)

    def teardown(self) -> None:
        if not hasattr(self, "peers"):
            return
        try:
            for peer in self.peers:
                if self.is_client(peer) and peer.is_honest and not peer.to_send:
                    assert peer.answers(self.clock).endswith(FRAME)
                if not peer.is_lost:
                    self.lose(peer)
            assert not self.admission.pending
            assert not self.factory.connections
            self.factory.rate_limits.stop()
            assert not self.clock.getDelayedCalls()
        finally:
            self.undo()


class ModelTests(SynchronousTestCase):
    """Any number of bytes, and any pauses."""

    @untraced
    def test_bounds_hold_against_any_peers(self) -> None:
        """Nothing that peers do exceeds a bound of admission, or keeps an honest peer out."""
        run_state_machine_as_test(
            cast("Any", Peers),
            settings=settings(max_examples=60, stateful_step_count=40, deadline=None),
        )
