"""File descriptors: the limit that is raised, and a server that has none left."""

from __future__ import annotations

import contextlib
import errno
import resource
import signal
from typing import Any

from twisted.internet import tcp
from twisted.internet.task import Clock
from twisted.logger import LogEvent, Logger, LogLevel, capturedLogs
from twisted.trial.unittest import SkipTest, SynchronousTestCase

from cafeteria_orch.common.rate_limit import REPORT_INTERVAL, RateLimits
from cafeteria_orch.daemon.descriptors import DescriptorReporter, allow_connections
from tests.support.builders import SUCCESS, texts
from tests.support.crowds import Crowd, Member, stored_batches
from tests.support.processes import (
    HELLO,
    PROGRAMS,
    Client,
    ProcessTestCase,
    Server,
    Starter,
    wait_until,
)

REFUSED = "action: accept_connections | result: fail | refused: "
LIMITED = "action: start | result: limited | max_connections: "
UNLIMITED = resource.RLIM_INFINITY


class Limit(SynchronousTestCase):
    """``allow_connections`` raises the soft limit, and warns where the hard one forbids it."""

    def allow(
        self, soft: int, hard: int, each: int = 1
    ) -> tuple[int, list[tuple[int, int]], list[str]]:
        """Ask for 1000 connections: the number allowed, the limits set, and the warnings."""
        changes: list[tuple[int, int]] = []
        self.patch(resource, "getrlimit", lambda kind: (soft, hard))
        self.patch(resource, "setrlimit", lambda kind, limits: changes.append(limits))
        with capturedLogs() as events:
            possible = allow_connections(1000, each)
        return possible, changes, texts(events, LogLevel.warn)

    def test_a_sufficient_limit_stays(self) -> None:
        """A limit that is high enough, or unlimited, stays as it is."""
        self.assertEqual(self.allow(1064, 4096), (1000, [], []))
        self.assertEqual(self.allow(UNLIMITED, UNLIMITED), (1000, [], []))

    def test_a_low_limit_is_raised(self) -> None:
        """It is raised as far as needed, without a warning."""
        self.assertEqual(self.allow(1063, 4096), (1000, [(1064, 4096)], []))
        self.assertEqual(self.allow(256, UNLIMITED), (1000, [(1064, UNLIMITED)], []))

    def test_a_low_hard_limit_leaves_fewer_connections(self) -> None:
        """The log says how many, and what to do."""
        possible, changes, (line,) = self.allow(256, 512)
        self.assertEqual((possible, changes), (448, [(512, 512)]))
        self.assertIn(f"{LIMITED}448 | error: 512 file descriptors are too few for 1000 c", line)
        self.assertIn("ulimit -n to 1064, or lower --max-connections", line)

    def test_two_descriptors_a_connection(self) -> None:
        """Where as many connections may be pending, each one needs two."""
        self.assertEqual(self.allow(1064, 4096, 2), (1000, [(2064, 4096)], []))
        possible, changes, (line,) = self.allow(256, 1064, 2)
        self.assertEqual((possible, changes), (500, [(1064, 1064)]))
        self.assertIn("ulimit -n to 2064", line)

    def test_a_sandbox_that_forbids_to_raise_it(self) -> None:
        """The server starts with the limit that it has."""

        def refuse(*_: object) -> None:
            raise PermissionError

        self.patch(resource, "getrlimit", lambda kind: (256, 4096))
        self.patch(resource, "setrlimit", refuse)
        with capturedLogs() as events:
            self.assertEqual(allow_connections(1000), 192)
        self.assertIn(LIMITED, texts(events, LogLevel.warn)[0])

    def test_one_connection_is_always_allowed(self) -> None:
        """A server that admits nobody is of no use."""
        self.assertEqual(self.allow(32, 32)[0], 1)


class Failing:
    """A listening socket that cannot accept."""

    def __init__(self, error: int) -> None:
        self._error = error

    def accept(self) -> None:
        raise OSError(self._error, "")


class Reporter(SynchronousTestCase):
    """``DescriptorReporter``: one line a minute, where Twisted has several for each connection."""

    def setUp(self) -> None:
        self.passed: list[LogEvent] = []
        observer: Any = self.passed.append
        self.clock = Clock()
        self.reporter = DescriptorReporter(RateLimits(self.clock), observer)

    def report(self, *formats: str, **fields: Any) -> list[str]:
        """Report events of these formats; the warnings that they give."""
        with capturedLogs() as captured:
            for log_format in formats:
                # The wall clock stands still, or was set back: it measures nothing here.
                self.reporter({**fields, "log_format": log_format, "log_time": 0.0})
        return texts(captured, LogLevel.warn)

    def refuse(self) -> list[str]:
        """Refuse a connection as Twisted does with the descriptor that it keeps in reserve."""
        return self.report(
            "EMFILE encountered; releasing reserved file descriptor.",
            "EMFILE recovery: Closed socket from {address}",
            "Re-reserving EMFILE recovery file descriptor.",
        )

    def failing(self, error: int) -> list[str]:
        """Refuse a connection as Twisted does without that descriptor."""
        events: list[LogEvent] = []
        observer: Any = events.append
        reservation = tcp._NullFileDescriptorReservation()
        clients = tcp._accept(Logger("test", observer=observer), "1", Failing(error), reservation)
        self.assertEqual(list(clients), [])
        (event,) = events
        return self.report(event["log_format"], acceptError=event["acceptError"])

    def test_one_line_a_minute(self) -> None:
        """The first refusal is reported, then their number once a minute."""
        (first,) = self.refuse()
        self.assertIn(f"{REFUSED}1 | error: out of file descriptors: raise LimitNOFILE", first)
        self.clock.advance(REPORT_INTERVAL - 1)
        self.assertEqual(self.refuse(), [])
        with capturedLogs() as events:
            self.clock.advance(1)
        (second,) = texts(events, LogLevel.warn)
        self.assertIn(f"{REFUSED}1 |", second)
        self.assertEqual(self.passed, [])

    def test_no_descriptor_in_reserve(self) -> None:
        """The line is the same when Twisted has none, or the whole system."""
        self.assertEqual(len(self.failing(errno.EMFILE)), 1)
        self.setUp()
        self.assertEqual(len(self.failing(errno.ENFILE)), 1)
        self.assertEqual(self.passed, [])

    def test_other_errors(self) -> None:
        """Another reason why a connection is not accepted is passed on."""
        self.assertEqual(self.failing(errno.ECONNABORTED), [])
        self.assertEqual(len(self.passed), 1)

    def test_other_events(self) -> None:
        """So is everything else, with a format and without."""
        self.assertEqual(self.report("action: listen"), [])
        self.reporter({"log_time": 0.0})
        self.assertEqual(len(self.passed), 2)


class ServerTests(ProcessTestCase):
    """A real server that has few descriptors."""

    def start_limited(self, limit: str) -> Server:
        """Start a server under a limit that the shell sets."""
        script = f'ulimit {limit} && exec "$@"'
        command = ("/bin/sh", "-c", script, "sh", str(PROGRAMS / "twistd"), "-n")
        self.starter = Starter(command, "stdout", "Server Shut Down.")
        return self.start()

    def gather(self, server: Server) -> Crowd:
        """Connect three clients that send without a pause."""
        crowd = Crowd(server.port, busy=3)
        self.addCleanup(crowd.close)
        crowd.run_until_busy(1)
        return crowd

    def refuse(self, crowd: Crowd) -> int:
        """Connect 100 more clients, and return how many were refused."""
        others = [crowd.join(Member(crowd.port)) for _ in range(100)]
        crowd.run(lambda: all(each.greeted or each.over for each in others), "all have heard")
        return sum(bool(each.over) for each in others)

    def is_served(self, server: Server) -> bool:
        """Whether one more client is served."""
        suppressed = contextlib.suppress(ConnectionError)
        with suppressed, contextlib.closing(Client(server.port)) as client:
            client.send(HELLO)
            return client.read(5) == SUCCESS
        return False

    def whole_log(self, server: Server) -> str:
        """The log, with the part that may have been rotated."""
        return server.text("my.log.1") + server.log

    def check_goes_on(self, server: Server, crowd: Crowd, line: str) -> None:
        """Connected clients are served, one line names the problem, and the server recovers."""
        before = len(crowd.acknowledged)
        crowd.run(lambda: len(crowd.acknowledged) >= before + 30, "those before are served")
        crowd.finish()
        self.assertEqual({answer for each in crowd.busy for answer in each.answers}, {SUCCESS})
        self.assertEqual(crowd.acknowledged, stored_batches(self.folder / "cafeorch.sqlite3"))
        wait_until(lambda: line in self.whole_log(server), "it is logged")
        self.assertFalse(self.is_served(server))
        crowd.close()
        wait_until(lambda: self.is_served(server), "there is room again")
        log = self.whole_log(server)
        self.assertEqual((log.count(line), log.count("EMFILE")), (1, 0))

    def test_hard_limit(self) -> None:
        """A low hard limit leaves descriptors for everything but connections."""
        server = self.start_limited("-n 128")
        self.assertIn(f"{LIMITED}64 |", server.log)
        crowd = self.gather(server)
        refused = self.refuse(crowd)
        self.assertGreater(refused, 0, f"of 100 were refused {refused}, {crowd}")
        self.check_goes_on(server, crowd, "result: refused")

    def test_soft_limit(self) -> None:
        """A low soft limit is raised, and all clients are served."""
        server = self.start_limited("-S -n 64")
        self.assertEqual(self.refuse(self.gather(server)), 0)
        self.assertNotIn(LIMITED, server.log)

    def test_none_left(self) -> None:
        """A server without a single descriptor goes on, and its log can be rotated."""
        if not hasattr(resource, "prlimit"):
            raise SkipTest("the limits of another process cannot be set here")
        server = self.launch("--port=0", twistd=("--logfile=my.log",))
        server.log_file = self.folder / "my.log"
        server.wait_until_served()
        crowd = self.gather(server)
        _, hard = resource.prlimit(server.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (64, hard))
        refused = self.refuse(crowd)
        self.assertGreater(refused, 0, f"of 100 were refused {refused}, {crowd}")
        server.wait_until_logged(REFUSED)
        server.signal(signal.SIGUSR1)
        wait_until((self.folder / "my.log.1").exists, "the log is rotated")
        self.check_goes_on(server, crowd, REFUSED)
