"""The status page as a browser shows it: headless Chromium, with a real server and a hostile one."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Mapping
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

from twisted.trial.unittest import SkipTest, SynchronousTestCase

from cafeteria_orch.wire.messages import encode, end_of_table
from cafeteria_orch.wire.tables import STORES, TABLES
from tests.support.builders import USER_ROW, batch_frame, frame
from tests.support.http import get, metrics_address
from tests.support.processes import HELLO, ProcessTestCase, wait_until

CHROMIUM = shutil.which("chromium")

PAGE = (
    Path(__file__).parent.parent.parent / "cafeteria_orch" / "observe" / "status.html"
).read_text()


def render(url: str, budget: int) -> tuple[str, str]:
    """The document after a time in milliseconds of the browser's clock, and its complaints."""
    if CHROMIUM is None:
        raise SkipTest("there is no chromium to show the page")
    with tempfile.TemporaryDirectory() as profile:
        completed = subprocess.run(
            [
                CHROMIUM,
                *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
                *("--enable-logging=stderr", f"--user-data-dir={profile}"),
                *(f"--virtual-time-budget={budget}", "--dump-dom", url),
            ],
            capture_output=True,
            text=True,
            timeout=50,
            check=False,
        )
    console = [line for line in completed.stderr.splitlines() if "CONSOLE" in line]
    return completed.stdout, "\n".join(console)


def text_of(markup: str) -> str:
    """The text that a part of a document shows."""
    return html.unescape(" ".join(re.sub(r"<[^>]*>", " ", markup).split()))


def table_of(document: str, name: str) -> list[str]:
    """The rows of a table, each as its text."""
    (table,) = re.findall(rf'<table id="{name}".*?<tbody>(.*?)</tbody>', document, re.DOTALL)
    return [text_of(row) for row in re.findall("<tr.*?</tr>", table, re.DOTALL)]


class RealPage(ProcessTestCase):
    """The page of a server that serves."""

    def test_the_page_of_a_server_at_work(self) -> None:
        """It shows connections, tables and problems, and its policy allows all that it does."""
        if CHROMIUM is None:
            raise SkipTest("there is no chromium to show the page")
        server = self.start("--metrics", "tcp:0:interface=127.0.0.1", "--log-level", "info")
        client = self.client(server)
        client.send(HELLO + batch_frame(rows=[USER_ROW] * 3) + batch_frame())
        client.send(frame(encode(end_of_table("users"))) + batch_frame(table=STORES, rows=[]))
        self.assertEqual(client.read(25), b"\0\0\0\1\1" * 5)
        with closing(self.client(server)) as bad:
            bad.send(frame(b"\x04nonsense"))
            bad.read(6)
        answer = wait_until(
            lambda: json.loads(get(server, "/status.json")[1])["completeness"], "the store says it"
        )
        self.assertEqual(answer["tables"]["users"]["complete"], 1)
        document, complaints = render(f"http://{metrics_address(server)}/", 3000)
        self.assertEqual(complaints, "")
        self.assertIn('id="state" class="good" role="status">ready<', document)
        self.assertIn('<p id="banner" class="warn" role="alert" hidden="">', document)
        (connection,) = table_of(document, "connections")
        self.assertRegex(
            connection, r"^127\.0\.0\.1 \u2013 \u2013 00010203 stores 3 4 \d+ B 0 \d+ s$"
        )
        tables = table_of(document, "tables")
        self.assertIn("users 2 2 0 0 0 0 0 0 4", tables)
        self.assertIn("menu_items 1 0 0 0 0 0 1 0 0", tables)
        complete = table_of(document, "complete")
        self.assertEqual(complete, ["stores 0 of 1 1 1 0", "users all 1 2 4"])
        (agency,) = table_of(document, "agencies")
        self.assertRegex(agency, r"^unknown \d\d:\d\d:\d\d not stores 0 1 0 0 0 0 4$")
        (problem,) = table_of(document, "problems")
        self.assertRegex(problem, r"^\d\d:\d\d:\d\d error action: receive_message .* opcode: 4 ")
        self.assertNotIn(USER_ROW[2], document)


HOSTILE = "<script>top.hit = 1</script><img src=x onerror='top.hit = 1'>\"'&amp;"


def connection(number: int) -> dict[str, Any]:
    return {
        "ip": HOSTILE if number == 0 else f"2001:db8:85a3:8d3:1319:8a2e:370:{number:04x}",
        "name": None if number % 2 else HOSTILE,
        "agency": None if number % 2 else 2**31 - 1,
        "client": None if number % 3 else "<i>00010203-0405-0607-0809-0a0b0c0d0e0f",
        "table": "transaction_items",
        "batches": 10**7,
        "rows": 10**10,
        "bytes": 10**12,
        "in_progress": 8,
        "connected_at": 1.7e9,
    }


def agency(agency_id: int | None, **complete: bool) -> dict[str, Any]:
    """What the store has of an agency; the tables that it has sent, and whether each is complete."""
    return {
        "agency": agency_id,
        "last_seen": 1.7e9,
        "connections": 10**6,
        "failed": 10**7,
        "complete": bool(complete) and all(complete.values()),
        "tables": {
            name: {"rows": 10**11, "batches": 10**8, "complete": is_complete}
            for name, is_complete in complete.items()
        },
    }


TABLE_NAMES = [table.name for table in TABLES]


def table(name: str) -> dict[str, Any]:
    outcomes = ("processed", "committed", "duplicate", "rejected", "try_again", "malformed")
    return {
        "table": name,
        "received": 10**8,
        "in_progress": 8,
        "failed": 3 * 10**7,
        "rows": 10**11,
    } | dict.fromkeys(outcomes, 10**7)


STATUS: Mapping[str, Any] = {
    "version": "0.1.0",
    "time": 1.7e9 + 86400 * 40,
    "started_at": 1.7e9,
    "state": "ready",
    "reason": None,
    "rates": {
        "columns": ["time", "rows", "batches", "bytes"],
        "points": [
            [1.7e9 + 5 * number, number % 7 * 1e5, number % 5, number**3] for number in range(120)
        ],
    },
    "received_bytes": 10**15,
    "in_flight_bytes": 10**8,
    "node": "h" * 98 + "-1",
    "store": {"file": 10**12, "wal": 10**8},
    "database": {"kind": "sqlite", "asked_at": None, "server": None},
    "connections": {
        "open": 1000,
        "accepted": 10**6,
        "shown": [connection(number) for number in range(200)],
    },
    "tables": [table("transaction_items"), table(HOSTILE)],
    "completeness": {
        "asked_at": 1.7e9,
        "tables": {
            "transaction_items": {
                "batches": 10**8,
                "rows": 10**11,
                "senders": 10**5,
                "complete": 10**4,
            }
        },
    },
    "agencies": {
        "asked_at": 1.7e9,
        "count": 10**6,
        "shown": [
            agency(-(2**31), **dict.fromkeys(TABLE_NAMES, False)),
            agency(7, users=True, stores=True),
            agency(8, users=False, stores=True),
            agency(None),
        ],
    },
    "limits": {"max_connections_per_host": 10**6, HOSTILE: 1},
    "problems": [{"time": 1.7e9, "level": "error", "text": HOSTILE + "x" * 200}] * 50,
}
"""A busy server whose clients are hostile, and whose numbers are long."""

NOTHING: Mapping[str, Any] = {
    **STATUS,
    "rates": {"columns": [], "points": []},
    "node": "cafe-2",
    "store": None,
    "database": None,
    "connections": {"open": 0, "accepted": 0, "shown": []},
    "tables": [],
    "completeness": None,
    "agencies": None,
    "limits": {},
    "problems": [],
}


def standby(name: str, **changes: Any) -> dict[str, Any]:
    good = {
        "state": "streaming",
        "sync_state": "sync",
        "lag_bytes": 10**12,
        "lag_seconds": 86400.0,
    }
    return {"name": name, **good, **changes}


SERVER: Mapping[str, Any] = {
    "host": "db." + "h" * 90 + ".example",
    "port": 5432,
    "version": "15.20",
    "is_primary": True,
    "is_synchronous": True,
    "standbys": [
        standby(HOSTILE),
        standby("far", sync_state="async", lag_bytes=0, lag_seconds=None),
        standby("hidden", **dict.fromkeys(["state", "sync_state", "lag_bytes", "lag_seconds"])),
    ],
}
"""A database's server with standbys of all kinds."""


def with_server(asked_at: float | None, server: Mapping[str, Any] | None) -> Mapping[str, Any]:
    database = {"kind": "postgresql", "asked_at": asked_at, "server": server}
    return {**NOTHING, "store": {"file": None, "wal": None}, "database": database}


ANSWERS: Mapping[str, Mapping[str, Any]] = {
    "busy": STATUS,
    "idle": NOTHING,
    "draining": {**with_server(None, None), "state": "draining", "reason": "draining"},
    "refusing": {
        **STATUS,
        "state": "refusing",
        "reason": HOSTILE,
        "database": with_server(1.7e9, {**SERVER, "is_synchronous": False, "standbys": []})[
            "database"
        ],
    },
    "slow": {
        **STATUS,
        "completeness": {"asked_at": 1.7e9, "tables": None},
        "agencies": {"asked_at": 1.7e9, "count": None, "shown": None},
    },
    "gone": STATUS,
    "standbys": with_server(1.7e9, SERVER),
    "waiting": with_server(1.7e9, {**SERVER, "standbys": [standby("far", sync_state="async")]}),
    "silent": with_server(1.7e9, None),
}

VIEWS = (
    # It has to be silent for long: the first to be loaded.
    ("gone", "gone", 390, "light"),
    ("phone", "busy", 390, "light"),
    ("small", "busy", 320, "light"),
    ("desktop", "busy", 1280, "light"),
    ("dark", "busy", 1280, "dark"),
    ("idle", "idle", 390, "light"),
    ("draining", "draining", 390, "light"),
    ("refusing", "refusing", 390, "light"),
    ("slow", "slow", 390, "light"),
    ("standbys", "standbys", 390, "light"),
    ("waiting", "waiting", 390, "light"),
    ("silent", "silent", 390, "light"),
)
"""Frames of the page: a name, what the server says, the width in pixels, the scheme."""

MEASURE = """
const seen = {};
setTimeout(() => {
  for (const frame of document.querySelectorAll("iframe")) {
    const page = frame.contentDocument, root = page.documentElement;
    seen[frame.id] = {
      width: root.scrollWidth,
      background: getComputedStyle(page.body).backgroundColor,
      text: page.body.innerText,
      markup: root.outerHTML,
    };
  }
  seen.hit = window.hit === undefined ? 0 : 1;
  document.body.textContent = JSON.stringify(seen);
}, 15000);
"""


class Handler(BaseHTTPRequestHandler):
    """Serves the page for each answer, and all of them in frames that can be measured."""

    asked_for: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        name, _, file = self.path.strip("/").partition("/")
        status, kind = 200, "text/html"
        if not name:
            frames = "".join(
                f'<iframe id="{view}" src="/{answer}/" width="{width}" height="800"'
                f' style="border:0;color-scheme:{scheme}"></iframe>'
                for view, answer, width, scheme in VIEWS
            )
            body = f"<!doctype html><body>{frames}<script>{MEASURE}</script>"
        elif file == "status.json":
            kind, body = "application/json", json.dumps(ANSWERS[name])
            self.asked_for.append(name)
            if name == "gone" and self.asked_for.count(name) > 1:
                # What stands between may answer in the server's place.
                status = 503
        else:
            body = PAGE
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_: object) -> None:
        """Not to the tests' output."""


class AnyPage(SynchronousTestCase):
    """The page in all states, at all widths."""

    _shared: ClassVar[dict[str, Any]] = {}

    @property
    def seen(self) -> dict[str, Any]:
        """What a browser made of it; it is asked once."""
        if not self._shared:
            server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
            thread = threading.Thread(target=server.serve_forever, args=(0.05,))
            thread.start()
            try:
                document, _ = render(f"http://127.0.0.1:{server.server_port}/", 16000)
            finally:
                server.shutdown()
                server.server_close()
                thread.join()
            body = re.sub(r"^.*<body[^>]*>|</body>.*$", "", document, flags=re.DOTALL)
            self._shared.update(json.loads(html.unescape(body)))
        return self._shared

    def test_no_width_scrolls_sideways(self) -> None:
        """No width of a window makes the page scroll sideways, however long its numbers are."""
        for view, _, width, _ in VIEWS:
            self.assertLessEqual(self.seen[view]["width"], width, view)

    def test_texts_of_clients_are_never_markup(self) -> None:
        """Texts of clients are shown as they are, and are never markup."""
        self.assertEqual(self.seen["hit"], 0)
        for view in ("desktop", "phone", "refusing", "standbys"):
            self.assertIn(HOSTILE, self.seen[view]["text"])
            self.assertEqual(re.findall("<img|<i>", self.seen[view]["markup"]), [])

    def test_the_page_is_dark_where_the_browser_is(self) -> None:
        """It is dark where the browser is."""
        self.assertEqual(self.seen["desktop"]["background"], "rgb(245, 246, 248)")
        self.assertEqual(self.seen["dark"]["background"], "rgb(17, 21, 27)")

    def test_a_busy_server(self) -> None:
        """A thousand connections: some are shown, all counted; the lines are drawn."""
        text = self.seen["desktop"]["text"]
        self.assertIn("The 200 of 1000 that sent most", text)
        markup = self.seen["desktop"]["markup"]
        self.assertEqual(markup.count("<polyline"), 3)
        self.assertEqual(markup.count("NaN"), 0)
        self.assertIn("10000 of 100000", text)
        self.assertIn("top: 1M/s", text)
        self.assertIn("10 min ago", text)
        self.assertRegex(text, r"batches failed\s+60M")

    def test_a_server_without_connections_and_store(self) -> None:
        """A server that nobody is connected to, and that has no store."""
        text = self.seen["idle"]["text"]
        self.assertIn("No connections.", text)
        self.assertIn("None since the start.", text)
        self.assertNotIn("Completeness", text)
        self.assertNotIn("Agencies", text)

    def test_the_banner_says_why_the_server_is_not_ready(self) -> None:
        """It says when the server stops, when its store refuses, and why."""
        self.assertIn("draining: it is stopping", self.seen["draining"]["text"])
        self.assertIn("takes no new connections", self.seen["draining"]["text"])
        self.assertIn("the store refuses batches", self.seen["refusing"]["text"])

    def test_a_store_that_does_not_answer_in_time(self) -> None:
        """It says when the store could not be asked which tables are complete."""
        self.assertIn("query its view ingest_status", self.seen["slow"]["text"])
        self.assertIn("ask it by cafeorch store status", self.seen["slow"]["text"])

    def test_the_agencies(self) -> None:
        """Each with what it has not ended, its failures, its connections, and its rows by table."""
        self.assertIn("The 4 of 1,000,000 that were last seen", self.seen["desktop"]["text"])
        rows = [
            re.sub(r"\S+ \d\d:\d\d:\d\d ", "", row)
            for row in table_of(self.seen["desktop"]["markup"], "agencies")
        ]
        much, failed = "100,000,000,000", "10,000,000 1,000,000"
        self.assertEqual(
            rows,
            [
                f"-2147483648 not {', '.join(TABLE_NAMES)} {failed} {' '.join([much] * 5)}",
                f"7 all {failed} 0 {much} 0 0 {much}",
                f"8 not users {failed} 0 {much} 0 0 {much}",
                f"unknown nothing sent {failed} 0 0 0 0 0",
            ],
        )

    def test_the_node_is_named(self) -> None:
        """Whoever has the pages of several nodes open can tell them apart."""
        self.assertIn("cafe-2 · version", self.seen["idle"]["text"])
        self.assertIn(
            "<title>ready \u2013 cafe-2 \u2013 cafeteria_orch</title>", self.seen["idle"]["markup"]
        )

    def test_the_standbys_of_a_database(self) -> None:
        """Each with its state and its lag; where there is none, or none is known, a line says so."""
        text = self.seen["standbys"]["text"]
        self.assertIn("PostgreSQL 15.20 at db.", text)
        self.assertIn(":5432, the primary; a commit waits for a standby", text)
        markup = self.seen["standbys"]["markup"]
        first, second, third = table_of(markup, "standbys")
        self.assertEqual(first, f"{HOSTILE} streaming yes (sync) 1.0 TB 86400.000 s")
        self.assertEqual(second, "far streaming no (async) 0 B \u2013")
        self.assertEqual(third, "hidden \u2013 \u2013 \u2013 \u2013")
        self.assertIn("GRANT pg_monitor", text)
        self.assertIn("commits wait for no standby", self.seen["refusing"]["text"])
        self.assertIn("No standbys.", self.seen["refusing"]["text"])
        self.assertIn("nothing is acknowledged", self.seen["waiting"]["text"])
        self.assertIn("the database's server did not answer", self.seen["silent"]["text"])
        self.assertIn("Waiting for the database.", self.seen["draining"]["text"])
        self.assertNotIn("Waiting for the database.", self.seen["desktop"]["text"])

    def test_a_server_that_is_gone_is_shown_as_gone(self) -> None:
        """A server that answers no more is not shown as if it did."""
        text = self.seen["gone"]["text"]
        self.assertRegex(text, r"The server has not answered for 1\d s\. The figures are from \d")
        self.assertIn("no answer", text)
        self.assertNotIn("not answered", self.seen["phone"]["text"])

    def test_tables_and_charts_can_be_read_aloud(self) -> None:
        """Each table has a caption and heads with scopes, each line a name, each part a heading."""
        markup = self.seen["desktop"]["markup"]
        self.assertEqual(markup.count("<table"), markup.count("<caption>"))
        self.assertEqual(markup.count("<caption></caption>"), 0)
        self.assertGreaterEqual(markup.count('scope="col"'), 25)
        self.assertEqual(markup.count("<svg"), markup.count('role="img" aria-label="'))
        self.assertEqual(markup.count("<section"), markup.count("<h2"))
