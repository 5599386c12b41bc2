"""Mistakes that are planted into the server: a world must find each of them.

Each is a function of what it replaces, which it takes as its first argument.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import count
from typing import Any, NamedTuple
from unittest.mock import patch

from cafeteria_orch.daemon.service import OrchestratorService
from cafeteria_orch.server import responses
from cafeteria_orch.server.connection import OrchestratorProtocol
from cafeteria_orch.server.factory import OrchestratorFactory
from cafeteria_orch.server.limits import ConnectionLimits
from cafeteria_orch.server.memory import MemoryBudget, MemoryShare
from cafeteria_orch.server.reading import Pause, Reading
from cafeteria_orch.server.receiver import FrameReceiver
from cafeteria_orch.server.responses import Session
from cafeteria_orch.server.state import State
from cafeteria_orch.server.timeouts import Countdown
from cafeteria_orch.server.turns import Turns
from cafeteria_orch.server.window import Window
from cafeteria_orch.store import sqlite
from cafeteria_orch.store.database import SessionIds, client_id_text
from cafeteria_orch.store.sink import Sink
from cafeteria_orch.store.writer import Report, Writer

from .run import Outcome, run


class Planted(NamedTuple):
    """A mistake.

    :ivar what: in words.
    :ivar owner: has the attribute that is replaced.
    """

    what: str
    owner: Any
    name: str
    mistake: Callable[..., Any]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Have the server make the mistake."""
        original = vars(self.owner)[self.name]
        with ExitStack() as patches:
            if isinstance(original, property):
                replaced: Any = property(lambda it: self.mistake(original.fget, it))
            elif callable(original):

                def replaced(*args: Any, **options: Any) -> Any:
                    return self.mistake(original, *args, **options)
            else:
                replaced = self.mistake(original)
            patches.enter_context(patch.object(self.owner, self.name, replaced))
            yield


def _acknowledge_first(original: Any, sink: Any, batch: Any, client: Any) -> Any:
    responses.send_success(client)
    return original(sink, batch, client)


def _acknowledge_refused(original: Any, sink: Any, done: Any, client: Any) -> Any:
    done.addErrback(lambda _: True)
    return original(sink, done, client)


def _acknowledge_twice(original: Any, protocol: Any) -> None:
    original(protocol)
    if protocol.state is State.OPEN and protocol.factory.counters.accepted_connections % 7 == 0:
        protocol.output.send(protocol.encodeAnswer(b"\1"))


def _out_of_order(original: Any, window: Any) -> list[bytes]:
    due = [place for place in window._places if place.settled and place.payload]
    answers = [place.payload for place in due]
    for place in due:
        place.payload = b""
    original(window)
    return answers


def _forget_reservation(original: Any, share: Any) -> None:
    if share.is_waiting or not share.is_reserved:
        original(share)


def _leave_memory(original: Any, share: Any, buffered: int, in_progress: int, missing: int) -> Any:
    return original(share, max(buffered, share._held - share._in_progress), in_progress, missing)


def _resume_after_end(original: Any, receiver: Any) -> None:
    original(receiver)
    if receiver.state in {State.OPEN, State.ENDING}:
        receiver.transport.resumeProducing()


def _lose_wake_up(original: Any, factory: Any) -> None:
    if len(factory._paused_by_sink) > 1:
        factory._paused_by_sink.popitem()
    original(factory)


def _stay_busy(original: Any, protocol: Any, result: Any) -> None:
    if not (protocol.reading.reasons & Pause.BUSY and protocol.state is State.OPEN):
        original(protocol, result)


def _lose_a_row(original: Any, connection: Any, table: Any, batches: Any) -> Any:
    inserted = original(connection, table, batches)
    if len(batches) > 1:
        connection.execute(f"DELETE FROM {table.name} WHERE rowid = last_insert_rowid()")
    return inserted


def _close_early(original: Any, protocol: Any) -> None:
    if protocol.state is State.ENDING:
        protocol.close()
        return
    original(protocol)


def _close_at_half_close(original: Any, receiver: Any) -> None:
    original(receiver)
    receiver.transport.loseConnection()


def _drop_at_reset(original: Any, receiver: Any, reason: Any) -> None:
    receiver._decoder.clear()
    receiver.factory.connections.pop(receiver, None)
    original(receiver, reason)


def _reverse(original: Any, writer: Any, group: Any) -> None:
    report = writer._report

    def report_in_order(told: Report) -> None:
        report(told._replace(outcomes=[*reversed(told.outcomes)]))

    writer._report = report_in_order
    original(writer, [*reversed(group)])
    writer._report = report


def _give_up(original: Any, writer: Any, job: Any) -> None:
    writer._refused = None


def _forget_hello(original: Any, session: Any, message: Any) -> None:
    original(session, message)
    session.client_id = None


def _ignore_digest(original: Any, database: Any, arrival: Any) -> Any:
    batch, client_id = arrival.batch, client_id_text(arrival.session)
    known = database._connection.execute(
        "SELECT 1 FROM batch WHERE client_id = ? AND opcode = ? AND batch_number = ?",
        (client_id, batch.opcode, batch.batch_number),
    ).fetchone()
    return None if known else original(database, arrival)


def _never_sync(original: Any, database: Any, pragma: str) -> Any:
    return original(database, pragma.replace("synchronous = FULL", "synchronous = OFF"))


def _sync_checkpoints(original: Any, database: Any, pragma: str) -> Any:
    return original(database, pragma.replace("synchronous = FULL", "synchronous = NORMAL"))


@contextmanager
def _remember_sessions(_: Any, sessions: Any) -> Iterator[None]:
    yield


def find(planted: Planted, seconds: float, seed: int = 0) -> tuple[float, Outcome] | None:
    """Run worlds until one finds a mistake.

    :return: how long that took, and what was found; ``None`` if nothing was, in all that time.
    """
    began = time.perf_counter()
    with planted.in_place():
        for number in count(seed):
            outcome = run(number)
            took = time.perf_counter() - began
            if outcome.violation is not None:
                return took, outcome
            if took > seconds:
                return None
    return None


PLANTED = (
    Planted("an acknowledgement before the commit", Sink, "_store_batch", _acknowledge_first),
    Planted("an acknowledgement of what was refused", Sink, "_answer", _acknowledge_refused),
    Planted("a second answer", OrchestratorProtocol, "answered", _acknowledge_twice),
    Planted("answers out of order", Window, "answers", _out_of_order),
    Planted("a reservation that is not given back", MemoryShare, "leave", _forget_reservation),
    Planted("memory that stays charged", MemoryShare, "update", _leave_memory),
    Planted("a memory budget that admits all", MemoryBudget, "is_short", lambda _, it: False),
    Planted("a timer that is not cancelled", Reading, "stop", lambda _, it: None),
    Planted("a frame timeout that never comes", Countdown, "_judge",
            lambda _, it: setattr(it, "_call", None)),
    Planted("a resumed half-close", FrameReceiver, "readConnectionLost", _resume_after_end),
    Planted("a connection that the sink does not wake", OrchestratorFactory, "resumeProducing",
            _lose_wake_up),
    Planted("a connection that stays busy", OrchestratorProtocol, "_go_on", _stay_busy),
    Planted("a turn that never comes", Turns, "_iterated", lambda _, it: None),
    Planted(
        "a duplicate key without the digest", sqlite.Database, "_insert_batch", _ignore_digest
    ),
    Planted("a CLIENT_HELLO that is forgotten", Session, "learn", _forget_hello),
    Planted("no sync of a commit", sqlite.Database, "_pragma", _never_sync),
    Planted("no sync of each commit", sqlite.Database, "_pragma", _sync_checkpoints),
    Planted("a session that is known though its row was undone", SessionIds, "forgetting",
            _remember_sessions),
    Planted("a row that is lost in a group", sqlite, "insert_bodies", _lose_a_row),
    Planted("a close before the last answer", OrchestratorProtocol, "ends", _close_early),
    Planted("a half-close that ends all", FrameReceiver, "readConnectionLost",
            _close_at_half_close),
    Planted("a lost connection that stays in the table", ConnectionLimits, "closed",
            lambda _, it, host: None),
    Planted("a limit of connections that admits all", ConnectionLimits, "admits",
            lambda _, it, host: True),
    Planted("groups in the wrong order", Writer, "commit", _reverse),
    Planted("an outage that does not end by itself", Writer, "try_again", _give_up),
    Planted("a drain without a timeout", OrchestratorService, "_hurry", lambda _, it: None),
)  # fmt: skip
