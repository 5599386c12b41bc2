"""``makeService``: what it puts together, and what it finds wrong before anything starts."""

from __future__ import annotations

import builtins
import json
import os
import signal
import socket
import sqlite3
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from twisted.application.service import Application, IServiceMaker
from twisted.application.twist._options import TwistOptions
from twisted.internet import reactor
from twisted.internet.endpoints import SSL4ServerEndpoint
from twisted.internet.task import deferLater
from twisted.logger import ILogObserver, LogLevel, capturedLogs
from twisted.plugin import getPlugins
from twisted.scripts._twistd_unix import ServerOptions
from twisted.trial.unittest import SkipTest, TestCase

from cafeteria_orch import tap
from cafeteria_orch.daemon import endpoints
from cafeteria_orch.daemon.descriptors import DescriptorReporter
from cafeteria_orch.daemon.endpoints import BindProbe, check_endpoints
from cafeteria_orch.daemon.service import OrchestratorService
from cafeteria_orch.edge.proxy import parse_networks
from cafeteria_orch.edge.tls import ServerTLS
from cafeteria_orch.observe.http import Monitor
from cafeteria_orch.observe.log_files import DEFAULT_LOG_BYTES, DEFAULT_LOG_FILES, LogFile
from cafeteria_orch.observe.logs import BufferedLogObserver
from cafeteria_orch.tap import SWITCH_INTERVAL, Options, makeService
from tests.support.builders import texts
from tests.support.certificates import Files
from tests.support.services import restore_process

PROCESSORS = """
from cafeteria_orch import Opcode
from cafeteria_orch.server import responses

ORDER = []

def process(message, client):
    responses.send_success(client)

def promotions(factory):
    ORDER.append("promotions")
    factory.register_processor(40, process)

def users(factory):
    ORDER.append("users")
    factory.register_processor(Opcode.NEW_USERS, process, replace=True)

def too_late(factory):
    factory.register_processor(Opcode.NEW_USERS, process)

def broken(factory):
    raise RuntimeError("first line\\nsecond line")

no_function = 7
"""


@contextmanager
def taken_port() -> Iterator[int]:
    """A port of the loopback that somebody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


class TapTestCase(TestCase):
    """Makes services in a working directory of its own, and leaves no trace in the process."""

    def setUp(self) -> None:
        self.folder = Path(self.mktemp()).absolute()
        self.folder.mkdir()
        self.addCleanup(os.chdir, Path.cwd())
        os.chdir(self.folder)
        self.patch(sys, "path", list(sys.path))
        self.patch(os, "environ", {"PATH": os.environ.get("PATH", "")})
        for name in ("cafe_processors", "cafe_broken"):
            self.addCleanup(sys.modules.pop, name, None)
        restore_process(self)
        (self.folder / "cafe_processors.py").write_text(PROCESSORS)

    def make(self, *arguments: str) -> OrchestratorService:
        """The service that these arguments make, on a port that the system picks."""
        options = Options()
        where = (
            [] if arguments and arguments[0].startswith(("--listen", "--port")) else ["--port=0"]
        )
        options.parseOptions([*where, *arguments])
        service = makeService(options)
        assert isinstance(service, OrchestratorService)
        return service

    def refusal(self, *arguments: str) -> str:
        """The one line that making it ends in."""
        error = self.assertRaises(SystemExit, self.make, *arguments)
        self.assertRegex(str(error.code), r"^cafeorch: [^\n]+$")
        return str(error.code)


class Plugin(TapTestCase):
    """How ``twistd`` comes to know it."""

    def test_threads_hand_over_the_interpreter_lock_soon(self) -> None:
        """The store's thread does not wait for Python's 5 ms each time it needs the lock."""
        sys.setswitchinterval(0.005)
        self.make("--store=none")
        self.assertAlmostEqual(sys.getswitchinterval(), SWITCH_INTERVAL)

    def test_plugin(self) -> None:
        """The plugin is found by its name, and leads here."""
        (plugin,) = [maker for maker in getPlugins(IServiceMaker) if maker.tapname == "cafeorch"]
        self.assertIs(plugin.options, Options)
        self.assertIs(plugin.makeService, makeService)


class Listening(TapTestCase):
    """Where it listens."""

    async def addresses(self, *arguments: str) -> list[str]:
        """Where a service listens that these arguments make, by its log."""
        service = self.make(*arguments, "--store=none")
        with capturedLogs() as events:
            service.privilegedStartService()
        self.assertEqual(texts(events, LogLevel.error), [])
        await service.stopService()
        return [
            line.rpartition(" ")[2] for line in texts(events, LogLevel.info) if "action" in line
        ]

    async def test_port_and_interface(self) -> None:
        """The three options make one endpoint."""
        (address,) = await self.addresses("--interface=127.0.0.1", "--backlog=7")
        self.assertRegex(address, r"^127\.0\.0\.1:[1-9]\d*$")

    async def test_ipv6(self) -> None:
        """An IPv6 address is known as such."""
        try:
            socket.create_server(("::1", 0), family=socket.AF_INET6).close()
        except OSError as error:
            raise SkipTest(f"no IPv6 here: {error}") from error
        (address,) = await self.addresses("--interface=::1")
        self.assertRegex(address, r"^::1:[1-9]\d*$")

    async def test_listen(self) -> None:
        """``--listen`` takes any endpoint, and more than one."""
        addresses = await self.addresses(
            "--listen", "unix:cafe.socket", "--listen", "tcp:0:interface=127.0.0.1"
        )
        self.assertEqual(len(addresses), 2)
        self.assertRegex(addresses[0], r"cafe\.socket")
        self.assertRegex(addresses[1], r"^127\.0\.0\.1:[1-9]\d*$")

    def test_port_in_use(self) -> None:
        """A port that is taken, of any option, is found before anything starts, and named."""
        with taken_port() as port:
            address = f"127.0.0.1:{port}"
            endpoint = f"--listen=tcp:{port}:interface=127.0.0.1"
            for arguments in (
                ("--port", str(port)),
                (endpoint,),
                ("--listen=tcp:0:interface=127.0.0.1", endpoint),
                (f"--metrics=tcp:{port}:interface=127.0.0.1",),
            ):
                self.assertIn(address, self.refusal(*arguments, "--store=none"))
            probe: Any = BindProbe()
            tls = SSL4ServerEndpoint(probe, port, object(), interface="127.0.0.1")
            error = self.assertRaises(SystemExit, check_endpoints, [tls], "--listen")
            self.assertIn(address, str(error.code))

    async def test_shared_port(self) -> None:
        """With ``--reuse-port`` two servers have one port, also after one was started again."""
        with taken_port() as port:
            pass
        for place in (f"--port={port}", f"--listen=tcp:{port}:interface=127.0.0.1"):
            services = [self.make(place, "--reuse-port", "--store=none") for _ in range(2)]
            for service in services:
                service.privilegedStartService()
            await services[0].stopService()
            services[0].startService()
            accepted = [service._factory.counters for service in services]
            with ExitStack() as clients:
                for _ in range(40):
                    clients.enter_context(socket.create_connection(("127.0.0.1", port)))
                await deferLater(reactor, 0.1)
            counts = [counters.accepted_connections for counters in accepted]
            self.assertEqual(sum(counts), 40)
            # Linux balances by a hash: that all go to one of them is less likely than 1e-11.
            self.assertGreater(min(counts), 0)
            self.assertIn(f"127.0.0.1:{port}", self.refusal(place, "--store=none"))
            for service in services:
                await service.stopService()

    def test_port_that_others_do_not_share(self) -> None:
        """``--reuse-port`` makes nobody share: such a port is found before anything starts."""
        with taken_port() as port:
            for place in (f"--port={port}", f"--listen=tcp:{port}:interface=127.0.0.1"):
                refusal = self.refusal(place, "--reuse-port", "--store=none")
                self.assertIn(f"127.0.0.1:{port}", refusal)

    def test_only_tcp_ports_are_shared(self) -> None:
        """What has no port of TCP, or makes its own, cannot be shared: one line says so."""
        cert = Files(self.folder).cert
        for place in (
            "unix:cafe.socket",
            "haproxy:tcp:0",
            f"ssl:0:privateKey={cert}",
        ):
            refusal = self.refusal("--listen=tcp:0", "--listen", place, "--reuse-port")
            self.assertIn(f"--listen {place}: --reuse-port shares a TCP port", refusal)
        self.patch(endpoints, "socket", SimpleNamespace())
        self.assertIn("no SO_REUSEPORT", self.refusal("--reuse-port", "--store=none"))

    def test_port_is_let_go(self) -> None:
        """Making the service takes the port to try it, and lets go of it."""
        with taken_port() as port:
            pass
        self.make("--port", str(port), "--store=none")
        with socket.socket() as server:
            server.bind(("127.0.0.1", port))

    def test_foreign_interfaces(self) -> None:
        """An address that is not this machine's, or no address at all, is refused."""
        self.assertIn("192.0.2.1", self.refusal("--interface=192.0.2.1"))
        self.assertIn("999.0.0.1", self.refusal("--interface=999.0.0.1"))

    def test_bad_endpoints(self) -> None:
        """A description that names no endpoint is refused, and shown."""
        for description in ("tcp", "tcp:port", "nonsense:1", "nonsense", ":", "tcp:1:colour=red"):
            refusal = self.refusal(f"--listen={description}", "--store=none")
            self.assertIn(f"--listen {description}: ", refusal)

    def test_right_endpoints_are_shown(self) -> None:
        """A mistake in a TCP endpoint, the usual one, is answered with its form."""
        form = "give it as tcp:PORT or tcp:PORT:interface=ADDRESS"
        for description in ("tcp", "tcp:", "tcp:abc", "tcp:1:interfce=::1", "tcp:1:backlog=x"):
            refusal = self.refusal(f"--listen={description}", "--store=none")
            self.assertIn(f"--listen {description}: {form}", refusal)
        refusal = self.refusal("--metrics=9100", "--store=none")
        self.assertIn("give it as tcp:9100:interface=127.0.0.1", refusal)
        for description in ("tcp:65536", "tcp:-1"):
            refusal = self.refusal(f"--listen={description}", "--store=none")
            self.assertIn("port must be 0-65535. Choose another --port", refusal)
        self.assertIn("the path is missing. Choose another", self.refusal("--listen=unix:"))

    def test_only_what_listens_can_be_stopped(self) -> None:
        """A port that is taken has a remedy that an address of another machine has not."""
        with taken_port() as port:
            self.assertIn("Stop what listens there", self.refusal("--port", str(port)))
        self.assertNotIn("Stop", self.refusal("--interface=192.0.2.1"))

    async def test_unix_sockets(self) -> None:
        """One in a folder that does not exist, and one that another server has, are refused."""
        refusal = self.refusal("--listen=unix:missing/cafe.socket")
        self.assertIn("missing/cafe.socket", refusal)
        self.assertIn(f"make the folder {self.folder / 'missing'}", refusal)
        other = self.make("--listen=unix:cafe.socket", "--store=none")
        other.privilegedStartService()
        try:
            self.assertIn("cafe.socket", self.refusal("--listen=unix:cafe.socket"))
        finally:
            await other.stopService()


class Before(TapTestCase):
    """What connections have to pass: TLS, and the PROXY header."""

    def test_neither(self) -> None:
        """Without either, the factory itself listens."""
        service = self.make("--store=none")
        self.assertIs(service._listener, service._factory)

    def test_tls(self) -> None:
        """With a certificate there is TLS, and something to reload."""
        files = Files(self.folder)
        allowed: list[tuple[int, int]] = []

        def allow(connections: int, each: int) -> int:
            allowed.append((connections, each))
            return 6

        self.patch(tap, "allow_connections", allow)
        self.make("--store=none", "--max-connections=7")
        service = self.make("--store=none", "--tls-cert", files.cert, "--max-connections=7")
        self.assertEqual(allowed, [(7, 1), (7, 2)])
        admission: Any = service._listener
        self.assertIsInstance(admission.tls, ServerTLS)
        self.assertEqual((admission.trusted, admission.max_pending), (None, 6))
        self.assertIsNone(admission.agencies)
        self.assertEqual(service._signals.reload, admission.reload)

    def test_proxy(self) -> None:
        """With the PROXY protocol the balancers are known, and nothing is to be reloaded."""
        admission: Any = self.make("--store=none", "--proxy-protocol")._listener
        self.assertEqual(admission.trusted, parse_networks("127.0.0.0/8,::1"))
        self.assertIsNone(admission.tls)

    def test_bad_certificate(self) -> None:
        """Whatever is wrong with the files is found before anything starts."""
        files = Files(self.folder)
        for name in ("--tls-key", "--tls-client-ca"):
            refusal = self.refusal("--tls-cert", files.cert, name, "missing.pem")
            self.assertIn(f"{name} {self.folder}/missing.pem: ", refusal)

    def test_agencies(self) -> None:
        """The file of the agencies is read at the start, and a bad one is refused."""
        files = Files(self.folder)
        tls = ("--tls-cert", files.cert, "--tls-client-ca", files.client_ca)
        path = files.write("agencies", b"agency-7 = 7")
        admission: Any = self.make("--store=none", *tls, "--agencies", path)._listener
        self.assertEqual(admission.agencies.find("agency-7"), 7)
        files.write("agencies", b"agency-7")
        refusal = self.refusal(*tls, "--agencies", path)
        self.assertIn(f"--agencies {path}: line 1 is not: common name = agency id", refusal)

    def test_endpoints_with_layers_of_their_own(self) -> None:
        """An endpoint that has TLS, or the PROXY protocol, of its own is refused."""
        cert = Files(self.folder).cert
        for arguments in (("--tls-cert", cert), ("--proxy-protocol",)):
            for endpoint in (f"ssl:0:privateKey={cert}", "haproxy:tcp:0"):
                refusal = self.refusal("--listen", endpoint, "--store=none", *arguments)
                self.assertIn(f"--listen {endpoint}: ", refusal)


class Store(TapTestCase):
    """Where batches are to be stored."""

    def test_no_trace(self) -> None:
        """Making sure that the store can be written leaves no file behind."""
        before = set(self.folder.iterdir())
        self.make("--store", "tables.db")
        self.assertEqual(set(self.folder.iterdir()), before)

    def test_nothing_is_open(self) -> None:
        """No thread runs and no database is open yet: neither survives a daemon's fork."""
        threads = set(threading.enumerate())
        service = self.make("--store", "tables.db")
        self.assertEqual(set(threading.enumerate()) - threads, set())
        descriptors = Path("/proc/self/fd")
        if not descriptors.exists():
            raise SkipTest("nothing here says which files are open")
        links = [str(link.readlink()) for link in descriptors.iterdir() if link.is_symlink()]
        self.assertEqual([link for link in links if "tables.db" in link], [])
        del service

    def test_none(self) -> None:
        """``--store none`` looks at no file, and the seed's default handling answers."""
        with sqlite3.connect("none") as database:
            database.execute("CREATE TABLE foreign_one (x)")
        database.close()
        factory: Any = self.make("--store=none")._factory
        self.assertEqual(factory.processor_name(8), "the default handling")

    def test_a_file_that_cannot_be_the_store(self) -> None:
        """It is refused by its path, or by what is wrong, and stays as it is."""
        (self.folder / "text").write_text("this is no database, " * 100)
        for name, statement in (
            ("foreign.db", "CREATE TABLE customers (id)"),
            ("newer.db", "PRAGMA user_version = 99"),
        ):
            with sqlite3.connect(name) as database:
                database.execute(statement)
            database.close()
        for name, part in (
            ("missing/tables.db", "missing/tables.db"),
            (".", str(self.folder)),
            ("text", "text"),
            ("foreign.db", "--store"),
            ("newer.db", "99"),
        ):
            path = self.folder / name
            before = path.read_bytes() if path.is_file() else None
            self.assertIn(part, self.refusal("--store", name))
            self.assertEqual(path.read_bytes() if path.is_file() else None, before)


class Processors(TapTestCase):
    """``--processors``: functions that are called with the factory."""

    def test_working_directory(self) -> None:
        """A module there is found before one elsewhere; several functions are called in order."""
        elsewhere = self.folder / "elsewhere"
        elsewhere.mkdir()
        (elsewhere / "cafe_processors.py").write_text("")
        sys.path.insert(0, str(elsewhere))
        self.make("--processors=cafe_processors:users", "--processors=cafe_processors:promotions")
        self.assertEqual(sys.modules["cafe_processors"].ORDER, ["users", "promotions"])

    def test_after_the_store(self) -> None:
        """The store has registered its own by then: ``replace=True`` takes their place."""
        factory: Any = self.make("--processors=cafe_processors:users")._factory
        self.assertEqual(factory.processor_name(8), "cafe_processors.process")
        self.assertIn("Sink", factory.processor_name(7))

    def test_opcode_that_is_taken(self) -> None:
        """The line names opcode and processor, and says what to do; so for two of one's own."""
        refusal = self.refusal("--processors=cafe_processors:too_late")
        for part in ("--processors cafe_processors:too_late", "opcode 8", "replace=True"):
            self.assertIn(part, refusal)
        self.make("--processors=cafe_processors:too_late", "--store=none")
        twice = ["--processors=cafe_processors:promotions"] * 2
        self.assertIn("opcode 40", self.refusal(*twice))

    def test_mistakes(self) -> None:
        """What is not there, cannot be called, raises, or is no Python or no name."""
        (self.folder / "cafe_broken.py").write_text("def register(")
        form = "package.module:function"
        for name, part in (
            ("cafe_missing:register", "cafe_missing"),
            ("cafe_processors:missing", "missing"),
            ("cafe_processors:no_function", "not callable"),
            ("cafe_processors:broken", "RuntimeError: first line second line"),
            ("cafe_broken:register", "cafe_broken.py, line 1"),
            *((name, form) for name in ("cafe_processors", "cafe_processors:", ":register", ":")),
        ):
            refusal = self.refusal(f"--processors={name}")
            self.assertIn(f"--processors {name}: ", refusal)
            self.assertIn(part, refusal)


class Logging(TapTestCase):
    """Which observer it logs with: its own, where ``twistd`` is told no other."""

    def observer(self, *arguments: str) -> Any:
        """The observer that the application gets from these arguments of ``twistd``."""
        twistd = ServerOptions()
        twistd.parseOptions([*arguments, "cafeorch", "--port=0", "--store=none"])
        # As twistd does before it makes the service.
        twistd["nodaemon"] = twistd["nodaemon"] or twistd["debug"]
        return self.of(makeService(twistd.subOptions))

    def of(self, service: Any) -> Any:
        """The observer that a service gives its application."""
        application = Application("cafeorch")
        service.setServiceParent(application)
        observer = application.getComponent(ILogObserver, None)
        if isinstance(observer, DescriptorReporter):
            buffered: Any = observer.observer
            if isinstance(buffered._writer._file, LogFile):
                self.addCleanup(buffered._writer._file.close)
        return observer

    def log(self, observer: BufferedLogObserver, level: Any = LogLevel.info) -> None:
        """Have it write a line."""
        event = {"log_format": "a line", "log_namespace": "test", "log_time": 0.0}
        observer({**event, "log_level": level})

    def test_foreground(self) -> None:
        """With ``-n`` it writes to standard output."""
        path = Path("output")
        with path.open("w") as output, redirect_stdout(output):
            self.log(self.observer("-n"))
            self.log(self.observer("-n", "--logfile=-"))
        self.assertEqual(path.read_text().count("[test#info] a line\n"), 2)

    def test_log_file(self) -> None:
        """With ``--logfile`` it writes there, in the foreground and not."""
        self.log(self.observer("-n", "--logfile=a.log"))
        self.log(self.observer("--logfile=a.log"))
        self.assertEqual(Path("a.log").read_text().count("[test#info] a line\n"), 2)

    def test_daemon(self) -> None:
        """A daemon writes to ``twistd.log``, of which a bounded number of bytes is kept."""
        observer = self.observer()
        self.log(observer)
        file = observer.observer._writer._file
        self.assertEqual(
            (file._max_bytes, file._max_files), (DEFAULT_LOG_BYTES, DEFAULT_LOG_FILES)
        )
        self.assertIn("[test#info] a line\n", Path("twistd.log").read_text())

    def test_level(self) -> None:
        """``--log-level`` is the observer's too."""
        self.patch(os, "environ", {"CAFEORCH_LOG_LEVEL": "warn"})
        observer = self.observer("-n", "--logfile=a.log")
        self.log(observer)
        self.assertEqual(Path("a.log").read_text(), "")
        self.log(observer, LogLevel.warn)
        self.assertIn("[test#warn] a line\n", Path("a.log").read_text())

    def test_node(self) -> None:
        """Lines of several nodes may meet in a collector: as JSON each has its node's name."""
        self.patch(os, "environ", {"CAFEORCH_LOG_FORMAT": "json", "CAFEORCH_NODE": "cafe-2"})
        self.log(self.observer("-n", "--logfile=a.log"))
        (line,) = Path("a.log").read_text().splitlines()
        self.assertEqual(json.loads(line)["node"], "cafe-2")

    def test_daemon_without_a_file(self) -> None:
        """A daemon has no standard output: ``--logfile -`` is refused."""
        error = self.assertRaises(SystemExit, self.observer, "--logfile=-")
        self.assertRegex(str(error.code), r"^cafeorch: [^\n]*--logfile[^\n]*$")

    def test_log_file_that_cannot_be(self) -> None:
        """A log file that cannot be opened is refused."""
        error = self.assertRaises(SystemExit, self.observer, "-n", "--logfile=missing/a.log")
        self.assertRegex(str(error.code), r"^cafeorch: --logfile missing/a\.log: [^\n]+$")

    def test_twistd_is_told_another(self) -> None:
        """``--syslog`` and ``--logger`` keep Twisted's own."""
        self.assertIsNone(self.observer("--syslog"))
        self.assertIsNone(self.observer("-n", "--syslog"))
        logger = "twisted.logger.LimitedHistoryLogObserver"
        self.assertIsNone(self.observer("-n", "--logger", logger))
        self.assertFalse(Path("twistd.log").exists())

    def test_twist(self) -> None:
        """``twist`` sets up logging of its own."""
        twist = TwistOptions()
        twist.parseOptions(["cafeorch", "--port=0", "--store=none"])
        self.assertIsNone(self.of(makeService(twist.subOptions)))

    def test_no_parent(self) -> None:
        """Options that no command has parsed give none either."""
        self.assertIsNone(self.of(self.make()))

    def test_rotation(self) -> None:
        """SIGUSR1 never ends the process, and keeps a handler that it has."""
        for twistd in ((), ("--logfile=a.log",), ("--syslog",)):
            signal.signal(signal.SIGUSR1, signal.SIG_DFL)
            self.observer("-n", *twistd)
            self.assertTrue(callable(signal.getsignal(signal.SIGUSR1)), twistd)
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        self.observer("-n", "--logfile=a.log")
        self.assertEqual(signal.getsignal(signal.SIGUSR1), signal.SIG_IGN)


class Metrics(TapTestCase):
    """``--metrics``, as ``makeService`` has it."""

    def test_none(self) -> None:
        """Without the option there is no endpoint for operators."""
        self.assertIsNone(self.make("--store", "none")._monitor)

    def test_one(self) -> None:
        """With the option there is an endpoint for operators."""
        service = self.make("--metrics", "tcp:0:interface=127.0.0.1")
        self.assertIsInstance(service._monitor, Monitor)

    def test_who_can_read_it(self) -> None:
        """All interfaces are warned of; one is not."""
        for description, is_warned in (
            ("tcp:0", True),
            ("tcp:0:interface=0.0.0.0", True),
            (r"tcp:0:interface=\:\:", True),
            ("tcp:0:interface=127.0.0.1", False),
            ("unix:page", False),
        ):
            with capturedLogs() as events:
                self.make("--store=none", "--metrics", description)
            found = [text for text in texts(events, LogLevel.warn) if "everybody" in text]
            self.assertEqual(bool(found), is_warned, description)

    def test_bad_endpoint(self) -> None:
        """What is no endpoint is refused by the option's name."""
        self.assertIn("--metrics nonsense:1:", self.refusal("--metrics", "nonsense:1"))

    def test_port_in_use(self) -> None:
        """A port that is taken is found out before the start, and the option named."""
        with taken_port() as port:
            refusal = self.refusal("--metrics", f"tcp:{port}:interface=127.0.0.1")
        self.assertIn("choose another --metrics", refusal)

    def test_missing_extra(self) -> None:
        """Without the extra one line says what to install."""
        real_import = builtins.__import__

        def without(name: str, *rest: Any) -> Any:
            if name.startswith("prometheus_client"):
                raise ImportError(name)
            return real_import(name, *rest)

        self.patch(builtins, "__import__", without)
        refusal = self.refusal("--metrics", "tcp:0:interface=127.0.0.1")
        self.assertIn("pip install 'cafeteria_orch[metrics]'", refusal)
