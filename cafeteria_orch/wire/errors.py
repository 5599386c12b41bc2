"""What can go wrong with a message. Each class carries the reason that its FAIL gives.

The text of these errors is written for the log: it names what is wrong and never holds
anything of a message's content, nor a path. A processor may raise them too.
"""

from __future__ import annotations

from .opcodes import FailReason


class OrchestratorError(Exception):
    """The base of this package's errors.

    :cvar reason: what a client is told when this error is the answer to its message.
    """

    reason = FailReason.REJECTED


class BatchRejected(OrchestratorError):
    """A batch that was understood and is not accepted; sending it again does not help."""


class TryAgainLater(OrchestratorError):
    """A batch that could not be taken now, through no fault of its own."""

    reason = FailReason.TRY_AGAIN


class WrongAgency(OrchestratorError):
    """A FINISHED that names another agency than the client's certificate does.

    :param agency_id: the one that FINISHED names.
    """

    def __init__(self, agency_id: int) -> None:
        super().__init__("its certificate is of another agency")
        self.agency_id = agency_id


class ProtocolError(OrchestratorError, ValueError):
    """Bytes that are no message. The connection that they came from is closed."""

    reason = FailReason.MALFORMED


class FrameTooLong(ProtocolError):
    """A frame that declares more bytes than the limit allows, or a negative number of them.

    :param length: what it declares.
    :param limit: the longest payload, in bytes.
    """

    def __init__(self, length: int, limit: int) -> None:
        what = f"a frame of {length} bytes, the limit is {limit}"
        super().__init__("a frame whose length is negative" if length < 0 else what)
        self.length = length


class UnknownOpcode(ProtocolError):
    """An opcode that neither the wire nor a registered processor knows."""
