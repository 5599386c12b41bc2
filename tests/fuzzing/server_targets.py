"""What a server's sockets deliver: a whole connection, admission, and the operators' endpoint."""

from __future__ import annotations

import atexit
import re
import shutil
import time
from collections.abc import Mapping
from functools import cache
from ipaddress import ip_address
from pathlib import Path
from tempfile import mkdtemp
from typing import Any
from unittest.mock import patch

from twisted.internet.task import Clock
from twisted.protocols import tls

from cafeteria_orch.edge.admission import Admission
from cafeteria_orch.edge.proxy import V1_MAX_BYTES, V2_MAX_BYTES, ProxyError, parse_header
from cafeteria_orch.edge.tls import ServerTLS
from cafeteria_orch.observe.http import Monitor
from cafeteria_orch.server.factory import OrchestratorFactory
from cafeteria_orch.wire.errors import ProtocolError
from cafeteria_orch.wire.framing import INT32, OPCODE_FIRST
from cafeteria_orch.wire.messages import ClientHello, Finished, StoreIdentityRequest, decode
from cafeteria_orch.wire.opcodes import RESPONSES, FailReason, Opcode
from tests.support.admission import BALANCERS, V1, Wire
from tests.support.builders import ECHO, TCPTransport, connect, echo, lose
from tests.support.certificates import Files
from tests.support.services import Reactor, RecordingEndpoint, RecordingSink

from . import seeds
from .target import Target, cuts, no_failure, same
from .wire_targets import split

MAX_FRAME_BYTES = 600
"""The longest payload of a connection's target."""


@cache
def _server() -> tuple[Clock, OrchestratorFactory]:
    # To make a factory takes longer than most inputs do.
    clock = Clock()
    factory = OrchestratorFactory(clock, max_frame_bytes=MAX_FRAME_BYTES)
    factory.register_processor(ECHO, echo)
    return clock, factory


def answers(stream: bytes) -> bytes:
    """What a server owes to a client that sends this: an answer for each message."""
    framing = OPCODE_FIRST if stream[:1] > b"\0" else INT32
    payloads, refused = split(stream, None, MAX_FRAME_BYTES)
    malformed = bytes([Opcode.BATCH_RECV_FAIL, FailReason.MALFORMED])
    decoders = _server()[1].decoders
    sent: list[bytes] = []
    is_known = False
    for number, payload in enumerate(payloads):
        try:
            message = decode(payload, decoders)
        except ProtocolError:
            message = None
        is_hello = isinstance(message, ClientHello)
        is_question = isinstance(message, StoreIdentityRequest)
        if message is None or (is_hello and number) or (is_question and not is_known):
            sent.append(malformed)
            break
        is_known = is_known or is_hello
        if isinstance(message, Finished):
            break
        if payload[0] == ECHO:
            sent.append(payload)
        elif is_question:
            sent.append(payload[:1])
        elif payload[0] not in RESPONSES:
            sent.append(bytes([Opcode.BATCH_RECV_SUCCESS]))
    else:
        if refused is not None:
            sent.append(malformed)
    return b"".join(map(framing.encode_answer, sent))


def run_connection(data: bytes) -> None:
    """A byte says how the rest is cut, and one how the connection ends."""
    how, end, stream = data[0] if data else 0, data[1] if len(data) > 1 else 0, data[2:]
    for pieces in cuts(stream, how):
        clock, factory = _server()
        with no_failure():
            protocol, transport = connect(factory)
            for piece in pieces:
                if transport.aborted or transport.disconnecting:
                    break
                protocol.dataReceived(piece)
                if end & 2:
                    clock.advance(0)
            if end & 1:
                protocol.readConnectionLost()
            for _ in range(len(stream) // 256 + 4):
                clock.advance(0)
            same("answers", transport.value(), answers(stream))
            lose(protocol)
            clock.advance(60)
        same("connections that stay", factory.connections, set())


def run_proxy(data: bytes) -> None:
    """What a balancer sends first; every prefix of it may arrive before the rest."""
    whole = _header(data)
    for size in range(min(len(data), V2_MAX_BYTES)):
        part = _header(data[:size])
        if isinstance(part, str):
            # No further bytes make it a header.
            same("refused", part, whole)
            return
        if part is not None:
            same("its end", (part.size, part), (size, whole))
            return
    if whole is None and len(data) >= V2_MAX_BYTES:
        raise AssertionError("a header that never ends")
    if isinstance(whole, str) or whole is None:
        return
    if not 0 < whole.size <= max(V1_MAX_BYTES, V2_MAX_BYTES):
        raise AssertionError(f"it has {whole.size} bytes")
    if whole.host is not None:
        same("the address", str(ip_address(whole.host)), whole.host)


def _header(data: bytes) -> Any:
    try:
        return parse_header(data)
    except ProxyError as error:
        return str(error)


def run_admission(data: bytes) -> None:
    """A byte says what is expected: a header, TLS, a certificate; one how the rest is cut."""
    kind, how, stream = data[0] if data else 0, data[1] if len(data) > 1 else 0, data[2:]
    whole, *cut = (_admitted(kind, pieces) for pieces in cuts(stream, how))
    same("admission", cut or [whole], [whole])
    if not kind & 3:
        same("answers", whole[2], answers(stream))


def _admitted(kind: int, pieces: list[bytes]) -> tuple[object, ...]:
    clock, factory = _server()
    failed = factory.counters.failed_handshakes
    secure = (_mutual() if kind & 4 else _secure()) if kind & 2 else None
    admission = Admission(
        clock, factory, max_pending=2, trusted=BALANCERS if kind & 1 else None, tls=secure
    )
    # ``startTLS`` takes the global reactor.
    with no_failure(), patch.object(tls, "_get_default_clock", lambda: clock):
        admission.doStart()
        protocol = admission.buildProtocol(TCPTransport().getPeer() if not kind & 1 else None)
        if protocol is None:
            raise AssertionError("it was not admitted at all")
        wire = Wire(protocol)
        for piece in pieces:
            wire.deliver(piece)
        for _ in range(sum(map(len, pieces)) // 256 + 4):
            clock.advance(0)
        clients = {client.session.ip for client in factory.connections}
        sent = wire.value() if secure is None else b""
        outcome = clients, wire.is_closing, sent, factory.counters.failed_handshakes - failed
        wire.lose()
        clock.advance(60)
        admission.doStop()
    same("pending", (admission.pending, factory.connections), ({}, set()))
    return outcome


@cache
def _files() -> Files:
    folder = mkdtemp()
    atexit.register(shutil.rmtree, folder)
    return Files(Path(folder))


@cache
def _secure() -> ServerTLS:
    return ServerTLS(time.time, _files().cert)


@cache
def _mutual() -> ServerTLS:
    return ServerTLS(time.time, _files().cert, client_ca=_files().client_ca)


def run_http(data: bytes) -> None:
    """A byte says how the rest is cut."""
    how, stream = data[0] if data else 0, data[1:]
    whole, *cut = (_responses(pieces) for pieces in cuts(stream, how))
    same("responses", cut or [whole], [whole])
    if len(whole) > stream.count(b"\n") + 1:
        raise AssertionError(f"{len(whole)} responses")


def _responses(pieces: list[bytes]) -> list[bytes]:
    reactor, monitor = _monitor()
    with no_failure():
        protocol: Any = monitor.site.buildProtocol(None)
        transport = TCPTransport()
        protocol.makeConnection(transport)
        for piece in pieces:
            if transport.aborted or transport.disconnecting:
                break
            protocol.dataReceived(piece)
            reactor.advance(0)
        sent = -1
        while sent < len(transport.writes):
            sent = len(transport.writes)
            reactor.advance(0)
        lose(protocol)
        reactor.advance(0)
    same("what stays", (reactor.getDelayedCalls(), list(monitor.site.channels)), ([], []))
    return re.findall(rb"^HTTP/1\.[01] (\d{3}) ", transport.value(), re.MULTILINE)


@cache
def _monitor() -> tuple[Reactor, Monitor]:
    reactor = Reactor()
    factory = OrchestratorFactory(reactor, wall_time=lambda: 1_700_000_000.0)
    monitor = Monitor(reactor, factory, RecordingEndpoint(), "1", sink=RecordingSink())
    return reactor, monitor


TARGETS: Mapping[str, Target] = {
    "connection": Target(
        run_connection,
        (
            "cafeteria_orch.server.connection",
            "cafeteria_orch.server.receiver",
            "cafeteria_orch.server.refusals",
            "cafeteria_orch.server.responses",
            "cafeteria_orch.server.window",
        ),
        seeds.connection,
        {"messages": lambda size: b"\x7f\2" + b"\0\0\0\2(a" * (size // 6)},
        memory=(512 * 1024, 1_000),
        steps=(6_000, 150),
    ),
    "proxy": Target(
        run_proxy,
        ("cafeteria_orch.edge.proxy",),
        seeds.proxy,
        {},
        max_length=512,
        steps=(2_000, 40),
    ),
    "admission": Target(
        run_admission,
        ("cafeteria_orch.edge.admission", "cafeteria_orch.edge.proxy", "cafeteria_orch.edge.tls"),
        seeds.admission,
        {"messages": lambda size: b"\1\x7f" + V1 + b"\0\0\0\2(a" * (size // 6)},
        memory=(512 * 1024, 1_000),
        steps=(6_000, 200),
    ),
    "http": Target(
        run_http,
        ("cafeteria_orch.observe.http", "twisted.web.http"),
        seeds.http,
        {
            "requests": lambda size: (
                b"\x7f" + b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n" * (size // 34)
            )
        },
        memory=(512 * 1024, 1_000),
        steps=(6_000, 100),
    ),
}
