"""Twisted's own receiver of frames, which acknowledges each and does nothing else with it.

``python -m tests.benchmarks.plain_receiver`` runs it as a process.
"""

from __future__ import annotations

from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.endpoints import TCP4ServerEndpoint
from twisted.internet.protocol import Factory
from twisted.internet.task import react
from twisted.protocols.basic import Int32StringReceiver

from cafeteria_orch.wire.messages import BatchRecvSuccess, encode

from . import workload

_SUCCESS = encode(BatchRecvSuccess())


class Acknowledger(Int32StringReceiver):
    """Answers each frame with SUCCESS."""

    transport: Any
    MAX_LENGTH = workload.FULL

    def connectionMade(self) -> None:
        self.transport.setTcpNoDelay(True)

    def stringReceived(self, string: bytes) -> None:
        self.sendString(_SUCCESS)


async def main(reactor: Any) -> None:
    """Serve until a signal; the first line of output names the port."""
    endpoint = TCP4ServerEndpoint(reactor, 0, interface="127.0.0.1")
    listening = await endpoint.listen(Factory.forProtocol(Acknowledger))
    print(f"listening on port {listening.getHost().port}", flush=True)
    await Deferred()


if __name__ == "__main__":
    react(main)
