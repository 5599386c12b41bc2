"""Files to begin with: exports, compressed or not, and state files."""

from __future__ import annotations

import gzip
import json
from uuid import UUID

from cafeteria_orch.wire.tables import MENU_ITEMS, TABLES, USERS
from tests.support.builders import USER_ROW

from .seeds import Inputs

CSV_HEAD = b"user_id,gender,birthdate,registered_at\n"
CSV_ROW = ",".join(USER_ROW).encode() + b"\n"


def csv() -> Inputs:
    """Files, with a byte before them: the table, 0x20 compressed too, 0x40 skip, 0x80 gzip."""
    users = TABLES.index(USERS)
    plain = CSV_HEAD + CSV_ROW * 4
    packed = gzip.compress(plain, mtime=0)
    files = {
        "rows": plain,
        "no rows": CSV_HEAD,
        "nothing": b"",
        "a mark": b"\xef\xbb\xbf" + plain,
        "half a mark": b"\xef\xbb",
        "CRLF": plain.replace(b"\n", b"\r\n"),
        "CR": plain.replace(b"\n", b"\r"),
        "no newline": plain[:-1],
        "blank lines": plain.replace(b"\n", b"\n\n"),
        "quotes": CSV_HEAD + b'"7","a ""b""","c\nd",e\n',
        "an open quote": CSV_HEAD + b'7,"a,b,c\n' + CSV_ROW,
        "text behind a quote": CSV_HEAD + b'"7"x,a,b,c\n' + CSV_ROW,
        "not UTF-8": CSV_HEAD + b"7,\xff,b,c\n" + CSV_ROW,
        "not UTF-8 in quotes": CSV_HEAD + b'7,"\xff\n",b,c\n' + CSV_ROW,
        "a NUL": CSV_HEAD + b"7,\0,b,c\n",
        "a surrogate": CSV_HEAD + b"7,\xed\xa0\x80,b,c\n",
        "few cells": CSV_HEAD + b"7\n" + CSV_ROW,
        "many cells": CSV_HEAD + b"7,a,b,c,d\n" + CSV_ROW,
        "a long row": CSV_HEAD + b"7," + b"x" * 300 + b",b,c\n" + CSV_ROW,
        "a column twice": CSV_HEAD[:-1] + b",gender\n",
        "an unknown column": CSV_HEAD[:-1] + b",x\n",
        "a missing column": b"user_id\n7\n",
        "other order": b"gender,user_id,registered_at,birthdate\n1,2,3,4\n",
        "a header of two lines": b'"user_id\n\xff",gender\n1,2\n',
    }
    made: Inputs = {}
    for name, content in files.items():
        made[name] = bytes([users | 0x20]) + content
        made[f"{name}, skipped"] = bytes([users | 0x60]) + content
    menu = b"item_id,item_name,category,price,is_seasonal,available_from,available_to\n"
    made["aliases"] = bytes([TABLES.index(MENU_ITEMS)]) + menu + b"1,2,3,4,5,6,7\n"
    gz = {
        "whole": packed,
        "two members": packed * 2,
        "padded": packed + bytes(8),
        "trailing": packed + b"x",
        "cut off": packed[:-9],
        "no trailer": packed[:-8],
        "checksum": packed[:-8] + bytes(8),
        "head only": packed[:10],
        "not gzip": plain,
        "method": packed[:2] + b"\7" + packed[3:],
        "flags": packed[:3] + b"\x1e" + packed[4:10] + b"\2\0ab" + b"name\0note\0" + packed[10:],
        "data": packed[:10] + b"\xff" * 20,
        "empty": b"",
    }
    made |= {f"gzip: {name}": bytes([users | 0xC0]) + data for name, data in gz.items()}
    return made


_PLAN = {
    "file": "users/a.csv",
    "table": "users",
    "digest": "00" * 16,
    "first": 1,
    "batches": 3,
    "batch_rows": 4000,
    "max_frame_bytes": 1048576,
    "skips_bad_rows": False,
}
STATE = (
    b'{"client_id": "00000000-0000-0000-0000-000000000007"}\n' + json.dumps(_PLAN).encode() + b"\n"
)
ACKNOWLEDGED = b'{"acknowledged": 1, "file": "users/a.csv"}\n'


def journal() -> Inputs:
    """State files."""
    met = {"server": "host:1", "store": str(UUID(int=1)), "agency": 7}
    checked = {
        "checked": "users/a.csv",
        "stamp": [1, 2, 3, 4],
        "rows": [1, 2],
        "sizes": [9, 9],
        "digests": "00" * 32,
    }
    records: dict[str, object] = {
        "acknowledged": {"acknowledged": 1, "file": "users/a.csv"},
        "acknowledged text": {"acknowledged": "1", "file": "users/a.csv"},
        "of no file": {"acknowledged": 1, "file": "x"},
        "met": met,
        "met without a store": {**met, "store": None},
        "met a number": {**met, "server": 7, "agency": "7"},
        "stored": {"stored": 2},
        "stored text": {"stored": "2"},
        "forgotten": {"forgotten": 1},
        "forgotten text": {"forgotten": "x"},
        "found": {"found": True},
        "renamed": {"renamed": "users/a.csv", "file": "users/b.csv"},
        "renamed to a number": {"renamed": "users/a.csv", "file": 7},
        "checked": checked,
        "checked with text": {**checked, "rows": "ab", "stamp": ["a", None, 1, 2]},
        "ended": {"ended": "users"},
        "finished": {"finished": True},
        "a plan of no batches": {**_PLAN, "batches": 0, "batch_rows": 0},
        "a plan with text": {**_PLAN, "first": "1", "batches": []},
        "a plan with floats": {**_PLAN, "first": 1e308, "batches": 1e308},
        "a plan with sets": {**_PLAN, "acknowledged": [1], "lost": 7, "checked": 1},
        "a list": [1],
        "nothing": {},
        "null": None,
    }
    made = {name: STATE + json.dumps(record).encode() + b"\n" for name, record in records.items()}
    made |= {
        "new": b"",
        "whole": STATE + ACKNOWLEDGED,
        "torn": STATE + ACKNOWLEDGED[:-1],
        "torn head": STATE[:20],
        "torn otherwise": b"hello",
        "an old head": STATE[:53].replace(b"}", b', "server": "host:1"}') + b"\n",
        "a number": b'{"client_id": 7}\n',
        "blank": STATE + b"\n\n",
        "deep": STATE + b"[" * 2500 + b"\n",
        "a long number": STATE + b'{"stored": ' + b"9" * 2500 + b"}\n",
        "infinity": STATE + b'{"stored": Infinity}\n',
        "not UTF-8": STATE + b"\xff\n",
    }
    return made
