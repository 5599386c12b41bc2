"""Inputs to begin with: valid ones, and those at a boundary.

``python -m tests.fuzzing --make-corpus`` writes them; what fuzzing has found stands behind them.
"""

from __future__ import annotations

import ssl
import struct
from array import array
from contextlib import suppress
from uuid import UUID

from cafeteria_orch.wire.framing import INT32, OPCODE_FIRST
from cafeteria_orch.wire.messages import (
    BATCH_HEADER,
    BatchRecvFail,
    BatchRecvSuccess,
    ClientHello,
    Finished,
    RawMessage,
    StoreIdentity,
    StoreIdentityRequest,
    TableBatch,
    encode,
    encode_rows,
    end_of_table,
)
from cafeteria_orch.wire.tables import MENU_ITEMS, TABLES, TRANSACTIONS, USERS, Table
from tests.support.admission import V1, V2, version_2
from tests.support.builders import ECHO, USER_ROW

Inputs = dict[str, bytes]

CELLS = ("", "1", "female", "ñandú", "🧉", "\0", r"\N", "\t\n\r\\", "x" * 40)
HELLO = encode(ClientHello(UUID(int=7)))


def header(rows: int) -> bytes:
    """The header of a table batch."""
    return BATCH_HEADER.pack(rows, 1, 0)


def user_row() -> bytes:
    """A row of users, as it is on the wire."""
    return encode_rows([USER_ROW], USERS)


def _batch(table: Table, rows: int = 1) -> TableBatch:
    width = len(table.columns)
    cells = [[CELLS[(place + row) % len(CELLS)] for place in range(width)] for row in range(rows)]
    return TableBatch(table, 1, 0, tuple(map(tuple, cells)))


_MESSAGES: Inputs = {
    **{table.name: encode(_batch(table)) for table in TABLES},
    "two rows": encode(_batch(USERS, 2)),
    "no rows": encode(_batch(USERS, 0)),
    "an optional column": encode(
        TableBatch(TRANSACTIONS, 2**62, 9, (("1", "2", "3", "4", "5", "6", "7", "8", None),))
    ),
    "an alias": encode(_batch(MENU_ITEMS)).replace(b"\x0a\0\0\0product_id", b"\7\0\0\0item_id"),
    "the end of a table": encode(end_of_table("users")),
    "hello": HELLO,
    "nil hello": bytes([30]) + bytes(16),
    "which store": encode(StoreIdentityRequest()),
    "a store": encode(StoreIdentity(UUID(int=3), 5)),
    "no store": encode(StoreIdentity()),
    "finished": encode(Finished()),
    "finished 7": encode(Finished(7)),
    "success": encode(BatchRecvSuccess()),
    "fail": encode(BatchRecvFail(3)),
    "echo": encode(RawMessage(ECHO, b"hello")),
    "unknown": b"\xc8abc",
    "empty": b"",
}

_NUMBERS = {"-1": -1, "least": -(2**31), "most": 2**31 - 1, "one more": 2, "0": 0}


def messages() -> Inputs:
    """Payloads."""
    users = encode(_batch(USERS))
    made = dict(_MESSAGES)
    for name, number in _NUMBERS.items():
        packed = struct.pack("<i", number)
        made[f"rows {name}"] = users[:1] + packed + users[5:]
        made[f"pairs {name}"] = users[:14] + packed + users[18:]
        made[f"length of a key {name}"] = users[:18] + packed + users[22:]
        made[f"length of a value {name}"] = users[:29] + packed + users[33:]
    made["not UTF-8"] = users.replace("ñ".encode(), b"\xff\xfe")
    made["a surrogate"] = users.replace("ñ".encode(), b"\xed\xa0\x80")
    made["left over"] = users + b"\0"
    made["cut off"] = users[:-1]
    made["a column twice"] = users.replace(b"\6\0\0\0gender", b"\7\0\0\0user_id")
    made["header only"] = users[:14]
    return made


def framing() -> Inputs:
    """Streams, with two bytes before them."""
    made: Inputs = {}
    payloads = [b"a", b"\2", b"three", b"\0\0\0\1", b"5" * 290]
    for choice in (INT32, OPCODE_FIRST):
        stream = b"".join(map(choice.encode, payloads))
        for how in (b"\0\0", b"\4\1", b"\x08\7", b"\x0c\x85"):
            made[f"{choice.name} {how.hex()}"] = how + stream
        kind = b"\1\3" if choice is INT32 else b"\2\3"
        order = ">i" if choice is INT32 else "<i"
        for name, number in {**_NUMBERS, "limit": 300, "above": 301, "299": 299}.items():
            lead = b"" if choice is INT32 else b"\4"
            made[f"{choice.name} length {name}"] = (
                kind + stream[:12] * 0 + lead + struct.pack(order, number) + b"z" * 300
            )
        made[f"{choice.name} cut off"] = kind + stream[:-1]
    made["many messages"] = b"\0\0" + b"\0\0\0\1a" * 200
    made["empty frames"] = b"\1\1" + bytes(4 * 20)
    return made


def codec() -> Inputs:
    """The number of a table, that of rows, the rows."""
    numbers: dict[int, int] = {table.opcode: number for number, table in enumerate(TABLES)}
    return {
        name: bytes([numbers[payload[0]]]) + payload[1:5] + payload[14:]
        for name, payload in messages().items()
        if payload[:1] and payload[0] in numbers
    }


def sql() -> Inputs:
    """The number of a table, how bodies are cut, the bodies; or sizes of one's own."""
    numbers: dict[int, int] = {table.opcode: number for number, table in enumerate(TABLES)}
    made: Inputs = {}
    for name, payload in messages().items():
        if payload[:1] and payload[0] in numbers:
            start, body = bytes([numbers[payload[0]]]), payload[1:]
            made[name] = start + b"\0" + body
            if len(body) < 128:
                made[f"{name}, twice"] = start + bytes([len(body)]) + body * 2
    body = _MESSAGES["users"][1:]
    users = bytes([TABLES.index(USERS)])
    for size in (-1, 0, 1, 2**63 - 1, -(2**63), len(body)):
        sizes = array("q", (1, len(body), 2, size, 3, 0)).tobytes()
        made[f"a size of {size}"] = users + b"\x80" + sizes + body
    return made


def sql_users(rows: int) -> bytes:
    """One long body of users."""
    return bytes([TABLES.index(USERS)]) + b"\0" + header(rows) + user_row() * rows


def connection() -> Inputs:
    """Conversations, with two bytes before them."""
    known = _MESSAGES
    conversations = {
        "all": ["hello", *(table.name for table in TABLES), "the end of a table", "finished"],
        "echoes": ["echo"] * 20,
        "which store": ["hello", "which store", "finished 7"],
        "which store, of whom": ["which store"],
        "hello twice": ["hello", "hello"],
        "responses": ["success", "fail", "users"],
        "after the end": ["users", "finished", "users"],
        "unknown": ["users", "unknown", "users"],
        "nil": ["nil hello"],
        "no rows": ["no rows", "two rows"],
    }
    made: Inputs = {}
    for name, parts in conversations.items():
        for number, choice in enumerate((INT32, OPCODE_FIRST)):
            stream = b"".join(choice.encode(known[part]) for part in parts)
            made[f"{name}, {choice.name}"] = bytes([number * 0x85, len(parts) % 4]) + stream
    made["an empty frame"] = b"\1\1\0\0\0\0"
    made["too long"] = b"\0\1" + INT32.encode(known["users"]) + b"\0\1\0\0aaaa"
    made["negative"] = b"\0\3" + OPCODE_FIRST.encode(known["users"]) + b"\4\xff\xff\xff\xff"
    made["half a frame"] = b"\7\1" + INT32.encode(known["users"])[:-3]
    return made


def proxy() -> Inputs:
    """Headers of both versions."""
    return {
        "version 1": V1,
        "IPv6": b"PROXY TCP6 ::1 2001:db8::1 1 65535\r\n",
        "mapped": b"PROXY TCP6 ::ffff:10.0.0.1 ::1 1 2\r\n",
        "unknown": b"PROXY UNKNOWN\r\n",
        "unknown with addresses": b"PROXY UNKNOWN ff::1 ff::2 1 2\r\n",
        "longest": b"PROXY UNKNOWN " + b"x" * 91 + b"\r\n",
        "too long": b"PROXY UNKNOWN " + b"x" * 92 + b"\r\n",
        "port": b"PROXY TCP4 1.2.3.4 1.2.3.4 65536 1\r\n",
        "address": b"PROXY TCP4 1.2.3.256 1.2.3.4 1 1\r\n",
        "address twice": b"PROXY TCP4 1.2.3.4 1.2.3.4 1 1\r\nGET",
        "zone": b"PROXY TCP6 fe80::1%eth0 ::1 1 1\r\n",
        "version 2": V2,
        "local": version_2(command=0x20),
        "unspecified": version_2(0, b""),
        "UNIX": version_2(0x31, bytes(216)),
        "IPv6, version 2": version_2(0x21, bytes(range(36))),
        "mapped, version 2": version_2(
            0x21, bytes(10) + b"\xff\xff\1\2\3\4" + bytes(16) + b"\0\1\0\2"
        ),
        "UDP": version_2(0x12),
        "short": version_2(0x11, bytes(11)),
        "more": version_2(more=b"\4\0\3abc"),
        "long": V2[:14] + b"\xff\xff",
        "command": version_2(command=0x22),
        "nothing": b"",
        "P": b"P",
        "CR": b"\r\n\r\n",
        "HTTP": b"GET / HTTP/1.1\r\n\r\n",
    }


def _client_hello(**options: ssl.TLSVersion) -> bytes:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    for name, value in options.items():
        setattr(context, name, value)
    outgoing = ssl.MemoryBIO()
    client = context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="localhost")
    with suppress(ssl.SSLWantReadError):
        client.do_handshake()
    return outgoing.read()


def admission() -> Inputs:
    """What a connection begins with, with two bytes before it."""
    tls_1_3, tls_1_2 = _client_hello(), _client_hello(maximum_version=ssl.TLSVersion.TLSv1_2)
    stream = INT32.encode(_MESSAGES["users"])
    made: Inputs = {}
    for how in (0, 1, 0x93):
        made[f"TLS 1.3, {how}"] = bytes([2, how]) + tls_1_3
        made[f"TLS 1.2, {how}"] = bytes([6, how]) + tls_1_2
        made[f"header and TLS, {how}"] = bytes([3, how]) + V1 + tls_1_2
        made[f"header and frames, {how}"] = bytes([1, how]) + V2 + stream * 2
        made[f"frames, {how}"] = bytes([0, how]) + stream
    made["an alert"] = b"\2\0\x15\3\3\0\2\2\x28"
    made["two hellos"] = b"\2\0" + tls_1_2 * 2
    made["a short record"] = b"\2\1\x16\3\1\0\1\1"
    made["an empty record"] = b"\2\0\x16\3\1\0\0"
    made["SSL 2"] = b"\2\0\x80\x2e\1\0\2\0\x15\0\0\0\x10"
    made["a long record"] = b"\2\0\x16\3\1\xff\xff" + bytes(100)
    made["a long hello"] = b"\2\0\x16\3\1\0\x08\1\xff\xff\xff\3\3\0\0"
    made["application data"] = b"\2\0\x17\3\3\0\1a"
    made["not TLS"] = b"\2\0GET / HTTP/1.1\r\n\r\n"
    made["two headers"] = b"\1\0" + V1 + V1
    made["no header"] = b"\1\0" + stream
    made["half a header"] = b"\3\1" + V2[:20]
    return made


def http() -> Inputs:
    """Requests, with a byte before them."""
    paths = "/", "/livez", "/readyz", "/metrics", "/status.json?range=1h", "/status.json?range=x"
    made = {
        f"GET {path}": b"\0" + f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode() for path in paths
    }
    livez = b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n"
    head = livez[:-2]
    made |= {
        "cut": b"\1" + livez,
        "two": b"\7" + livez * 2,
        "many": b"\x93" + livez * 20,
        "HEAD": b"\0" + livez.replace(b"GET", b"HEAD"),
        "POST": b"\0" + livez.replace(b"GET", b"POST"),
        "1.0": b"\0GET /livez HTTP/1.0\r\n\r\n",
        "0.9": b"\0GET /livez\r\n\r\n",
        "2": b"\0PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        "a body": b"\3" + head + b"Content-Length: 3\r\n\r\nabc" + livez,
        "chunked": b"\0" + head + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
        "both": b"\0" + head + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        "two lengths": b"\0" + head + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabc",
        "a length": b"\0" + head + b"Content-Length: -1\r\n\r\n",
        "continue": b"\0" + head + b"Expect: 100-continue\r\nContent-Length: 1\r\n\r\na",
        "upgrade": b"\0" + head + b"Connection: Upgrade, close\r\nUpgrade: h2c\r\n\r\n",
        "folded": b"\0" + head + b"X: a\r\n b\r\n\r\n",
        "no colon": b"\0" + head + b"X\r\n\r\n",
        "cookies": b"\0" + head + b"Cookie: a=b; c; =d\r\n\r\n",
        "accept": b"\0" + head + b"Accept: application/openmetrics-text;version=1.0.0\r\n\r\n",
        "escapes": b"\0GET /%6civez?%zz=%ff&range=%00 HTTP/1.1\r\nHost: x\r\n\r\n",
        "absolute": b"\0GET http://x/livez HTTP/1.1\r\nHost: x\r\n\r\n",
        "basic": b"\0" + head + b"Authorization: Basic \xff\xff\r\n\r\n",
        "TLS": b"\0\x16\3\1\0\1\1\r\n\r\n",
        "blank lines": b"\0\r\n\r\n" + livez,
        "bare newlines": b"\0" + livez.replace(b"\r", b""),
    }
    return made
