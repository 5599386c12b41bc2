"""The status page as a browser shows it: headless Chromium, with a real server and a hostile one."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import tempfile
import threading
from collections import Counter
from collections.abc import Mapping
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar
from urllib.parse import parse_qs, urlsplit

from twisted.trial.unittest import SkipTest, SynchronousTestCase

from cafeteria_orch.observe.history import RANGES
from cafeteria_orch.observe.page import status_page
from cafeteria_orch.wire.messages import encode, end_of_table
from cafeteria_orch.wire.tables import STORES, TABLES
from tests.support.builders import USER_ROW, batch_frame, frame
from tests.support.http import get, metrics_address
from tests.support.processes import HELLO, ProcessTestCase, wait_until

CHROMIUM = shutil.which("chromium")

PAGE = status_page().body.decode()


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
        # Nobody has a name or is an agency, and nothing was a duplicate.
        self.assertRegex(connection, r"^127\.0\.0\.1 00010203 stores 3 4 \d+ B \d+ s$")
        tables = table_of(document, "tables")
        self.assertIn("users 2 2 0 4", tables)
        self.assertIn("menu_items 1 0 1 0", tables)
        complete = table_of(document, "complete")
        self.assertEqual(complete, ["stores 0 of 1 1 1 0", "users all 1 2 4"])
        (agency,) = table_of(document, "agencies")
        self.assertRegex(agency, r"^unknown \d\d:\d\d:\d\d not stores 1 0 4$")
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
    "received_bytes": 10**15,
    "in_flight_bytes": 10**8,
    "node": "h" * 98 + "-1",
    "remedy": None,
    "store": {"file": 10**12, "wal": 10**8, "free": 10**12},
    "database": {"kind": "sqlite", "asked_at": None, "server": None},
    "connections": {
        "open": 1000,
        "accepted": 10**6,
        "shown": [connection(number) for number in range(10)],
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
    "problems": [
        {
            "time": 1.7e9 + 60 * number,
            "first_time": 1.7e9,
            "level": "error",
            "count": 10**number,
            "text": HOSTILE + "x" * 200,
        }
        for number in range(12)
    ],
}
"""A busy server whose clients are hostile, and whose numbers are long."""

NOTHING: Mapping[str, Any] = {
    **STATUS,
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
    "busy": {
        **STATUS,
        "connections": {**STATUS["connections"], "shown": [connection(n) for n in range(200)]},
        "agencies": {
            "asked_at": 1.7e9,
            "count": 300,
            "shown": [agency(n, **dict.fromkeys(TABLE_NAMES, n % 3 > 0)) for n in range(300)],
        },
    },
    "usual": STATUS,
    "idle": NOTHING,
    "draining": {
        **with_server(None, None),
        "state": "draining",
        "reason": "draining",
        "remedy": "Nothing has to be done.",
    },
    "refusing": {
        **STATUS,
        "state": "refusing",
        "reason": HOSTILE,
        "remedy": "Make room on the disk.",
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

COLUMNS = ("time", "rows", "batches", "bytes", "failed", "cpu", "resident_bytes", "free_bytes")
QUANTILES = ("p50", "p95", "p99")


def history(name: str, *, is_busy: bool) -> Mapping[str, Any]:
    """What a server says of a range: in 1 of 10 intervals there were no batches."""
    interval, number = RANGES[name]
    columns = [*COLUMNS, *(f"{of}_{each}" for of in ("batch", "commit") for each in QUANTILES)]
    points = [
        [
            *(
                1.7e9 + interval * index,
                index % 7 * 1e5,
                index % 5,
                index**3,
                0.5,
                0.7,
                7e7,
                10**12,
            ),
            *(None if index % 10 == 9 else share / 1000 for share in (4, 11, 23) * 2),
        ]
        for index in range(number if is_busy else 0)
    ]
    latency = dict(zip(QUANTILES, (0.004, 0.0114, 12.0)))
    return {
        "range": name,
        "interval": interval,
        "seconds": RANGES[name].seconds,
        "columns": columns,
        "points": points,
        "latency": {"batch": latency, "commit": latency} if is_busy else None,
    }


VIEWS = (
    # It has to be silent for long: the first to be loaded.
    ("gone", "gone", 390, "light"),
    ("phone", "busy", 390, "light"),
    ("small", "usual", 320, "light"),
    ("desktop", "busy", 1280, "light"),
    ("dark", "usual", 1280, "dark"),
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
const plot = (view, title) => [...document.getElementById(view).contentDocument.querySelectorAll("figure")]
  .find(figure => figure.querySelector("figcaption").firstChild.textContent === title).querySelector(".plot");
// All frames are there by then, however slow the machine is.
addEventListener("load", () => setTimeout(() => {
  // In the middle of a chart, at the right end of another, and by the keyboard from there.
  for (const [view, title, share, key] of [
    ["desktop", "rows accepted", 0.5, null], ["dark", "batch time", 1, null], ["phone", "batches", 1, "ArrowLeft"],
  ]) {
    const place = plot(view, title), box = place.getBoundingClientRect();
    place.dispatchEvent(new PointerEvent("pointermove", {clientX: box.left + share * box.width}));
    if (key) place.dispatchEvent(new KeyboardEvent("keydown", {key}));
    // What had the focus before loses it, by a touch of this one.
    plot(view, "memory").dispatchEvent(new FocusEvent("blur"));
    const readout = place.querySelector(".readout").getBoundingClientRect();
    seen[`${view} ${title}`] = {
      text: place.innerText, spoken: place.getAttribute("aria-valuetext"),
      isInside: readout.width > 0 && readout.left >= box.left - 1 && readout.right <= box.right + 1,
    };
  }
  plot("desktop", "rows accepted").dispatchEvent(new PointerEvent("pointerleave", {pointerType: "mouse"}));
  seen.left = plot("desktop", "rows accepted").innerText;
  document.getElementById("small").contentDocument.querySelector("input[value='24h']").click();
  setTimeout(measure, 3000);
}, 11000));
function measure() {
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
}
"""


class Handler(BaseHTTPRequestHandler):
    """Serves the page for each answer, and all of them in frames that can be measured."""

    asked_for: ClassVar[Counter[tuple[str, str]]] = Counter()

    def do_GET(self) -> None:
        path, query = urlsplit(self.path)[2:4]
        name, view, file = (*path.strip("/").split("/"), "", "")[:3]
        status, kind = 200, "text/html"
        if not name:
            frames = "".join(
                f'<iframe id="{view}" src="/{answer}/{view}/" width="{width}" height="800"'
                f' style="border:0;color-scheme:{scheme}"></iframe>'
                for view, answer, width, scheme in VIEWS
            )
            body = f"<!doctype html><body>{frames}<script>{MEASURE}</script>"
        elif file == "status.json":
            answer = dict(ANSWERS[name])
            (asked,) = parse_qs(query)["range"]
            if asked != "none":
                answer["history"] = history(asked, is_busy=answer["tables"] != [])
            else:
                del answer["agencies"]
            kind, body = "application/json", json.dumps(answer)
            self.asked_for[view, asked] += 1
            if name == "gone" and self.asked_for["gone", "none"]:
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
                document, _ = render(f"http://127.0.0.1:{server.server_port}/", 30000)
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
        self.assertEqual(markup.count("<path"), 13)
        document = re.sub("<script>.*?</script>", "", markup, flags=re.DOTALL)
        self.assertEqual(re.findall("NaN|undefined|Infinity", document), [])
        self.assertIn("10000 of 100000", text)
        self.assertRegex(markup, r'<dt>failed</dt><dd class="failed">60M')
        self.assertIn('<td class="number failed" role="cell" data-label="rejected">', markup)

    def test_the_axes_of_a_chart(self) -> None:
        """It has the values of its lines, the time that it spans, and what there is now."""
        text = self.seen["desktop"]["text"]
        for values in (
            r"1M\s+500K\s+0",
            r"5\s+2\.5\s+0",
            r"50 ms\s+25 ms\s+0",
            r"100 %\s+50 %\s+0 %",
        ):
            self.assertRegex(text, rf"{values}\s+10 min ago\s+5 min\s+now")
        self.assertRegex(text, r"batch time\s+p50 4 ms\s+p95 11 ms\s+p99 ≥ 10 s")
        self.assertRegex(text, r"batches\s+accepted 4/s\s+failed 0\.5/s")
        self.assertIn("The first point comes after five seconds.", self.seen["idle"]["text"])

    def test_a_pointed_place_of_a_chart_shows_its_values(self) -> None:
        """By a mouse, a finger or the arrow keys; the values are read aloud too."""
        middle, end = self.seen["desktop rows accepted"], self.seen["dark batch time"]
        self.assertRegex(middle["text"], r"\d\d:\d\d:\d\d\n300K/s")
        self.assertRegex(middle["spoken"], r"\d\d:\d\d:\d\d: 300K/s$")
        self.assertRegex(end["text"], "\np50 \u2013\np95 \u2013\np99 \u2013$")
        # The point before the last one.
        self.assertRegex(self.seen["phone batches"]["text"], r"\naccepted 3/s\nfailed 0\.5/s$")
        for each in (middle, end, self.seen["phone batches"]):
            self.assertTrue(each["isInside"])
        self.assertEqual(self.seen["left"], "")

    def test_another_range(self) -> None:
        """Whoever chooses a day gets the points of a day, and the server is asked for them alone."""
        text, markup = self.seen["small"]["text"], self.seen["small"]["markup"]
        self.assertIn("24 h ago", text)
        self.assertNotIn("10 min ago", text)
        self.assertIn("p95 of 24 h", text)
        self.assertEqual(max(int(most) for most in re.findall(r'valuemax="(\d+)"', markup)), 287)
        asked_for = Handler.asked_for
        self.assertEqual(asked_for["small", "24h"], 1)
        self.assertGreater(asked_for["phone", "none"], asked_for["phone", "10m"])

    def test_problems_have_their_number(self) -> None:
        """Each kind is one line: when it was last and first, and how often."""
        markup = self.seen["desktop"]["markup"]
        first, second, *_ = table_of(markup, "problems")
        self.assertRegex(first, r"^[\d-]+ [\d:]+ \u2013 1 error <script>")
        self.assertRegex(second, r"^[\d-]+ [\d:]+ [\d-]+ [\d:]+ 10 error <script>")

    def test_a_server_without_connections_and_store(self) -> None:
        """A server that nobody is connected to, and that has no store."""
        text = self.seen["idle"]["text"]
        self.assertIn("No connections.", text)
        self.assertIn("None since the start.", text)
        self.assertNotIn("Completeness", text)
        self.assertNotIn("Agencies", text)

    def test_the_banner_says_why_the_server_is_not_ready(self) -> None:
        """It says when the server stops, when its store refuses, why, and what to do."""
        self.assertIn("draining: it is stopping", self.seen["draining"]["text"])
        self.assertIn("takes no new connections", self.seen["draining"]["text"])
        self.assertIn("Nothing has to be done.", self.seen["draining"]["text"])
        self.assertIn("Make room on the disk.", self.seen["refusing"]["text"])
        self.assertIn("the store refuses batches", self.seen["refusing"]["text"])

    def test_the_agencies(self) -> None:
        """Each with what it has not ended, its failures, its connections, and its rows by table."""
        self.assertIn("The 4 of 1,000,000 that were last seen", self.seen["dark"]["text"])
        rows = [
            re.sub(r"\S+ \d\d:\d\d:\d\d ", "", row)
            for row in table_of(self.seen["dark"]["markup"], "agencies")
        ]
        failed = "10,000,000 1,000,000"
        self.assertEqual(
            rows,
            [
                f"-2147483648 not {', '.join(TABLE_NAMES)} {failed} 100B 100B 100B 100B 100B",
                f"8 not users {failed} \u2013 100B \u2013 \u2013 100B",
                f"unknown nothing sent {failed} \u2013 \u2013 \u2013 \u2013 \u2013",
                f"7 all {failed} \u2013 100B \u2013 \u2013 100B",
            ],
        )

    def test_many_agencies(self) -> None:
        """Those that are not complete stand before all others, and the list has a height of its own."""
        self.assertIn("All agencies, with their rows", self.seen["desktop"]["text"])
        agencies = table_of(self.seen["desktop"]["markup"], "agencies")
        self.assertEqual(len(agencies), 300)
        self.assertEqual([" not " in agency for agency in agencies], [True] * 100 + [False] * 200)
        self.assertIn("Agencies", self.seen["slow"]["text"])
        self.assertNotIn("Agencies", self.seen["idle"]["text"])

    def test_a_store_that_does_not_answer_in_time(self) -> None:
        """It says when the store could not be asked which tables are complete."""
        self.assertIn("query its view ingest_status", self.seen["slow"]["text"])
        self.assertIn("ask it by cafeorch store status", self.seen["slow"]["text"])

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
        self.assertEqual(markup.count("<svg"), markup.count('aria-valuetext="'))
        self.assertIn('aria-label="rows accepted, the last 10 min"', markup)
        self.assertEqual(markup.count("<section"), markup.count("<h2"))
