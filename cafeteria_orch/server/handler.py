"""What a connection needs of the factory that made it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from cafeteria_orch.common.clock import WallTime
from cafeteria_orch.wire.framing import Framing
from cafeteria_orch.wire.messages import Decoder

from .counters import Counters
from .memory import InFlight
from .responses import Exchange
from .timeouts import Timeouts
from .turns import Turns


class MessageHandler(Protocol):
    """Handles the messages of its connections, and keeps account of them."""

    reactor: Any
    wall_time: WallTime
    max_frame_bytes: int
    framing: Framing | None
    turns: Turns
    counters: Counters
    timeouts: Timeouts
    in_flight: InFlight
    log_info: bool
    log_debug: bool

    @property
    def decoders(self) -> Mapping[int, Decoder]:
        """How the bodies of messages are decoded, by opcode."""

    def handle_message(self, message: Any, client: Exchange) -> Any:
        """Process a message: keep the connection or not, a Deferred or a coroutine of it."""

    def must_answer(self, opcode: int) -> bool:
        """Whether a client waits for an answer to a message of this opcode."""

    def is_pipelined(self, opcode: int) -> bool:
        """Whether others may be in hand while a message of this opcode is."""

    def processor_name(self, opcode: int) -> str:
        """Who processes messages of this opcode: a name for the log."""

    def connection_made(self, connection: Any) -> None:
        """It is open."""

    def connection_lost(self, connection: Any) -> None:
        """It is gone, and nothing that came by it is in hand any more."""
