"""What a processor is, and how the factory has it registered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Optional

from twisted.python.reflect import fullyQualifiedName

from cafeteria_orch.wire.opcodes import FailReason

from .responses import Exchange

Processor = Callable[[Any, Exchange], Any]
"""``processor(message, client)``. It answers through :mod:`~cafeteria_orch.server.responses`, and
returns ``True`` or ``None`` to keep the connection, ``False`` to have it closed once all that
is owed is sent; or a Deferred or a coroutine of that. A store returns an
:class:`~cafeteria_orch.server.counters.Outcome`, which says more than its answer."""


OnRejection = Callable[[Exchange, FailReason, Optional[int]], object]
"""``on_rejection(client, reason, batch_number)``: a message was rejected or malformed. The number
is ``None`` if it has none, or none that can be read."""


class Registration(NamedTuple):
    """How messages of an opcode are processed: see ``register_processor``.

    :ivar call: the processor.
    :ivar name: its name, for the log.
    :ivar answers: whether the client waits for an answer.
    :ivar is_default: whether no processor is registered.
    """

    call: Processor
    name: str = "the default handling"
    answers: bool = True
    pipelined: bool = False
    times_out: bool = True
    is_default: bool = False


def name_of(function: Callable[..., Any]) -> str:
    """Name a function for the log."""
    try:
        return str(fullyQualifiedName(function))
    except AttributeError:
        return repr(function)
