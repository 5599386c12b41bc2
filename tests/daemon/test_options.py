"""The options of ``twistd cafeorch``: the command line, the environment, mistakes."""

from __future__ import annotations

import io
import os
import socket
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from twisted.application.twist._options import TwistOptions
from twisted.logger import LogLevel, capturedLogs
from twisted.python import usage
from twisted.scripts._twistd_unix import ServerOptions
from twisted.trial.unittest import SynchronousTestCase

from cafeteria_orch import __version__
from cafeteria_orch.daemon.node import DEFAULT_NODE, node_name
from cafeteria_orch.daemon.options import Options
from cafeteria_orch.edge.proxy import parse_networks
from cafeteria_orch.observe.logs import as_json, as_text
from cafeteria_orch.store.location import shown_location
from cafeteria_orch.wire.framing import INT32, OPCODE_FIRST
from tests.support.builders import texts

DEFAULTS = {
    "port": 8080,
    "interface": "127.0.0.1",
    "backlog": 128,
    "reuse-port": False,
    "listen": [],
    "processors": [],
    "tls-cert": None,
    "tls-key": None,
    "tls-client-ca": None,
    "agencies": None,
    "proxy-protocol": False,
    "proxy-from": parse_networks("127.0.0.0/8,::1"),
    "store-patience": 30.0,
    "max-frame-bytes": 1048576,
    "framing": None,
    "max-connections": 1000,
    "max-connections-per-host": None,
    "max-in-flight-bytes": 268435456,
    "idle-timeout": None,
    "frame-timeout": 30.0,
    "processing-timeout": 60.0,
    "drain-timeout": 10.0,
    "metrics": None,
    "log-level": LogLevel.info,
    "log-format": as_text,
    "log-bytes": 64 * 1024 * 1024,
    "log-files": 10,
}
"""All but the store and the node, whose defaults depend on the working directory and the host."""

SINGLE = (
    ("port", "0", 0),
    ("port", "65535", 65535),
    ("interface", "::1", "::1"),
    ("backlog", "1", 1),
    ("node", "till_2.north-7", "till_2.north-7"),
    ("node", "%H-2", "cafe.example-2"),
    ("node", "x" * 100, "x" * 100),
    ("store", "none", None),
    ("store", "/srv/tables.db", "/srv/tables.db"),
    ("store-patience", "0", 0.0),
    ("store-patience", "2.5", 2.5),
    ("max-frame-bytes", "16", 16),
    ("max-frame-bytes", "2147483647", 2**31 - 1),
    ("framing", "auto", None),
    ("framing", "int32", INT32),
    ("framing", "opcode-first", OPCODE_FIRST),
    ("max-connections", "1", 1),
    ("max-connections-per-host", "20", 20),
    ("max-connections-per-host", "none", None),
    ("max-in-flight-bytes", "1000000", 1_000_000),
    ("idle-timeout", "0.5", 0.5),
    ("idle-timeout", "none", None),
    ("frame-timeout", "120", 120.0),
    ("processing-timeout", "2.5", 2.5),
    ("processing-timeout", "none", None),
    ("drain-timeout", "0", 0.0),
    ("drain-timeout", "2.5", 2.5),
    ("metrics", "none", None),
    ("metrics", "tcp:9100:interface=127.0.0.1", "tcp:9100:interface=127.0.0.1"),
    ("log-level", "debug", LogLevel.debug),
    ("log-level", "info", LogLevel.info),
    ("log-level", "warn", LogLevel.warn),
    ("log-level", "error", LogLevel.error),
    ("log-format", "text", as_text),
    ("log-format", "json", as_json),
    ("log-bytes", "4096", 4096),
    ("log-bytes", "none", None),
    ("log-files", "1", 1),
)
"""Options that are given once: name, text, value."""

REPEATED = ("listen", "processors")

FLAGS = ("proxy-protocol", "reuse-port")
"""They take no value on the command line."""

PATHS = ("tls-cert", "tls-key", "tls-client-ca", "agencies")

SHORT = {"port": "p", "interface": "i", "backlog": "b", "store": "s", "listen": "l"}

BAD = (
    ("port", ("x", "80.5", "-1", "65536", "8080 8081")),
    ("backlog", ("x", "0", "-1", "1e3")),
    ("node", ("two words", "-2", ".x", "caf\xe9", "a\nb", "a/b", "%i", '"', "x" * 101)),
    ("store-patience", ("x", "-1", "none", "inf")),
    ("max-frame-bytes", ("x", "0", "-1", "2147483648", "1MiB")),
    ("max-connections", ("x", "0", "-1", "none")),
    ("max-connections-per-host", ("x", "0", "-1")),
    ("max-in-flight-bytes", ("x", "0", "-1", "none", "256M")),
    ("idle-timeout", ("x", "0", "-1", "nan", "5s")),
    ("frame-timeout", ("x", "0", "-1", "none")),
    ("processing-timeout", ("x", "0", "-1", "inf")),
    ("log-format", ("x", "JSON")),
    ("log-bytes", ("x", "0", "4095", "64M")),
    ("log-files", ("x", "0", "-1", "none", "1001")),
    ("framing", ("x", "INT32", "none", "opcode_first")),
    ("drain-timeout", ("x", "-1", "nan", "inf", "10s")),
    ("proxy-from", ("x", "none", "10.0.0.0/33", "10.0.0.1/8", "10.0.0.1,,::1")),
    ("log-level", ("x", "INFO", "warning", "debug info")),
)
"""Bad values, by option."""


def variable(name: str) -> str:
    """The environment variable of an option."""
    return "CAFEORCH_" + name.upper().replace("-", "_")


class OptionsTestCase(SynchronousTestCase):
    """Reads options, in an environment that has none of its own."""

    parent: usage.Options | None = None

    def parse(self, *arguments: str, **environment: str) -> Options:
        """The options that these arguments and variables give."""
        self.patch(socket, "gethostname", lambda: "cafe.example")
        kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
        self.patch(os, "environ", kept | environment)
        options = Options()
        options.parent = self.parent
        options.parseOptions(list(arguments))
        return options

    def refusal(self, *arguments: str, **environment: str) -> str:
        """The one line that they end in."""
        error = self.assertRaises(SystemExit, self.parse, *arguments, **environment)
        self.assertRegex(str(error.code), r"^cafeorch: [^\n]+$")
        return str(error.code)


class Values(OptionsTestCase):
    """Where a value comes from."""

    def check(self, options: Options, **changes: Any) -> None:
        """Options are the defaults, except for these changes."""
        changes = {name.replace("_", "-"): value for name, value in changes.items()}
        depending = {"store": str(Path.cwd() / "cafeorch.sqlite3"), "node": "cafe.example-1"}
        expected = DEFAULTS | depending | changes
        self.assertEqual({name: options[name] for name in expected}, expected)

    def test_defaults(self) -> None:
        """Without options, and with empty or unknown variables, the defaults hold, as values."""
        self.check(self.parse())
        empty = {variable(name): "" for name in (*DEFAULTS, "store", "node")}
        self.check(self.parse(**empty, CAFEORCH_COLOUR="red", PORT="9000"))

    def test_single_values(self) -> None:
        """An option comes from the command line, in each form of it, or from the environment."""
        for name, text, value in SINGLE:
            self.check(self.parse(f"--{name}", text), **{name: value})
            self.check(self.parse(f"--{name}={text}"), **{name: value})
            self.check(self.parse(**{variable(name): text}), **{name: value})
            if name in SHORT:
                self.check(self.parse(f"-{SHORT[name]}", text), **{name: value})

    def test_the_command_line_wins(self) -> None:
        """An option in both has the command line's value, default or not; others are untouched."""
        environment = {variable(other): good for other, good, _ in SINGLE}
        for name, text, value in SINGLE:
            expected = {other: last for other, _, last in SINGLE} | {name: value}
            self.check(self.parse(f"--{name}={text}", **environment), **expected)
        self.check(self.parse("--port=8080", CAFEORCH_PORT="9000"))

    def test_certificates(self) -> None:
        """Their files are found from where ``twistd`` was started."""
        files = {name: str(Path.cwd() / f"{name}.pem") for name in PATHS}
        self.check(self.parse(*(f"--{name}={name}.pem" for name in PATHS)), **files)
        self.check(self.parse(**{variable(name): f"{name}.pem" for name in PATHS}), **files)
        self.check(self.parse(*(f"--{name}=none" for name in PATHS)))

    def test_flags(self) -> None:
        """A flag is given by its name alone; in the environment by a word for yes or no."""
        for name in FLAGS:
            self.check(self.parse(f"--{name}"), **{name: True})
            for word in ("1", "yes", "true", "on", "YES", "True"):
                self.check(self.parse(**{variable(name): word}), **{name: True})
            for word in ("0", "no", "false", "off", "No"):
                self.check(self.parse(**{variable(name): word}))
                self.check(self.parse(f"--{name}", **{variable(name): word}), **{name: True})

    def test_balancers(self) -> None:
        """Their networks may come from elsewhere than the option that needs them."""
        networks = parse_networks("10.0.0.0/8,192.0.2.7,2001:db8::/32")
        changes = {"proxy-from": networks, "proxy-protocol": True}
        text = "10.0.0.0/8, 192.0.2.7,2001:db8::/32"
        self.check(self.parse("--proxy-protocol", "--proxy-from", text), **changes)
        self.check(self.parse("--proxy-protocol", CAFEORCH_PROXY_FROM=text), **changes)
        self.check(self.parse("--proxy-from", text, CAFEORCH_PROXY_PROTOCOL="1"), **changes)

    def test_host_names(self) -> None:
        """Whatever the host is called, its server has a name and starts."""
        for host, expected in (
            ("", "host-1"),
            ("...", "host-1"),
            ("caf\xe9 of/north\n", "caf-of-north-1"),
            ("-x_Y.9", "x_Y.9-1"),
            ("h" * 300, "h" * 64 + "-1"),
        ):
            with self.subTest(host=host):
                self.patch(socket, "gethostname", lambda host=host: host)
                self.assertEqual(node_name(DEFAULT_NODE), expected)

    def test_repeated_values(self) -> None:
        """All values count, in their order; those of the command line replace all others.

        In the environment white space of any kind separates them.
        """
        self.check(self.parse("-l", "tcp:1"), listen=["tcp:1"])
        for name in REPEATED:
            given = ("--" + name, "a:b", f"--{name}=c:d")
            self.check(self.parse(*given), **{name: ["a:b", "c:d"]})
            environment = {variable(name): " a:b  c:d\n\te:f "}
            self.check(self.parse(**environment), **{name: ["a:b", "c:d", "e:f"]})
            self.check(self.parse(*given, **environment), **{name: ["a:b", "c:d"]})

    def test_one_place_to_listen(self) -> None:
        """Where to listen, by the command line, wins over the environment's other way."""
        options = self.parse("--listen", "unix:/run/x", CAFEORCH_PORT="9000")
        self.assertEqual(options["listen"], ["unix:/run/x"])
        options = self.parse("--port", "9000", CAFEORCH_LISTEN="unix:/run/x")
        self.check(options, port=9000)

    def test_the_store_is_absolute(self) -> None:
        """It is found from where ``twistd`` was started: ``--rundir`` does not move it."""
        folder = Path(self.mktemp())
        folder.mkdir()
        options = self.parse("--store", "sub/tables.db")
        expected = str(Path.cwd() / "sub/tables.db")
        self.addCleanup(os.chdir, Path.cwd())
        os.chdir(folder)
        self.assertEqual(options["store"], expected)

    def test_kinds_of_store(self) -> None:
        """A path may say that it is SQLite's; a URL stays as it is."""
        expected = str(Path.cwd() / "tables.db")
        self.assertEqual(self.parse("--store", "sqlite:tables.db")["store"], expected)
        url = "postgresql://me:a%2Fb@h1,h2:5433/db?target_session_attrs=read-write"
        self.assertEqual(self.parse("--store", url)["store"], url)

    def test_refused_stores(self) -> None:
        """A place that is no store is refused, and nothing of a password is shown."""
        for place, pattern in (
            ("mysql://me:hidden@h/db", "mysql:// is no store"),
            ("postgresql://me:hid/den@h/db", "write / "),
            ("postgresql://me:hid@den@h/db", "write / "),
            ("postgresql://me:hid\nden@h/db", "cannot be printed"),
            ("postgresql://me:hidden@[::1/db", "cannot be read"),
            ("sqlite:", "the path is missing"),
        ):
            with self.assertRaisesRegex(SystemExit, f"^cafeorch: --store: .*{pattern}") as caught:
                self.parse("--store", place)
            self.assertNotRegex(str(caught.exception), "hid|den")

    def test_password_that_others_can_read(self) -> None:
        """A password on the command line is warned of, and not shown; one elsewhere is not."""
        for url in ("postgresql://me:hidden@h/db", "postgresql://me@h/db?password=hidden"):
            with capturedLogs() as events:
                self.parse("--store", url)
            (warning,) = texts(events, LogLevel.warn)
            self.assertIn("the process list shows the password of --store", warning)
            self.assertNotIn("hidden", warning)
        with capturedLogs() as events:
            self.parse(CAFEORCH_STORE=url)
            self.parse("--store", "postgresql://me@h/db?passfile=x")
            self.parse("--store", "me:hidden@h")
        self.assertEqual(texts(events, LogLevel.warn), [])

    def test_unknown_variables(self) -> None:
        """A variable that sets nothing is warned of, with the right name, and not its value."""
        with capturedLogs() as events:
            self.parse(CAFEORCH_STROE="me:hidden", CAFEORCH_PORT="1", CAFEORCH_PURE="1")
        (warning,) = texts(events, LogLevel.warn)
        self.assertRegex(
            warning,
            "error: CAFEORCH_STROE in the environment .*: did you mean CAFEORCH_STORE[?]$",
        )


class Changes(OptionsTestCase):
    """What the log says of the options at the start."""

    def test_only_what_differs_is_named(self) -> None:
        """A value that is the default is not, wherever it comes from; the store has a place of its own."""
        self.assertEqual(self.parse().describe_changes(), "-")
        options = self.parse(
            "--port=8080",
            "--backlog=5",
            "--store=none",
            CAFEORCH_LOG_LEVEL="debug",
            CAFEORCH_BACKLOG="6",
            CAFEORCH_IDLE_TIMEOUT="none",
        )
        self.assertEqual(options.describe_changes(), "--backlog=5 --log-level=debug")

    def test_flags_and_repeated_options(self) -> None:
        """They can be pasted into a command line again."""
        options = self.parse(
            "--proxy-protocol", "--listen=tcp:1", "--listen=unix:a b", CAFEORCH_REUSE_PORT="1"
        )
        self.assertEqual(
            options.describe_changes(),
            "--listen=tcp:1 --listen='unix:a b' --proxy-protocol --reuse-port",
        )

    def test_no_password_is_shown(self) -> None:
        """That of a URL is hidden, in whatever option it stands."""
        url = "postgresql://me:s3cr3t@db1/tables?sslpassword=s3cr3t"
        for options in (self.parse(f"--store={url}"), self.parse(CAFEORCH_STORE=url)):
            self.assertNotIn("s3cr3t", options.describe_changes())
            self.assertEqual(shown_location(options["store"]), "postgresql://me@db1/tables")
        options = self.parse("--metrics=tcp://me:s3cr3t@host")
        self.assertEqual(options.describe_changes(), "--metrics='tcp://me:***@host'")


class Mistakes(OptionsTestCase):
    """A mistake ends in one line that names it, and in status 1."""

    def test_bad_values(self) -> None:
        """The line names the option, or the variable, and shows the value."""
        for name, values in BAD:
            for text in values:
                refusal = self.refusal(f"--{name}={text}")
                self.assertIn(f"--{name}", refusal)
                self.assertIn(repr(text), refusal)
                refusal = self.refusal(**{variable(name): text})
                self.assertIn(variable(name), refusal)
                self.assertNotIn("--", refusal)
                self.assertIn(repr(text), refusal)

    def test_what_would_be_right(self) -> None:
        """The line shows the range of a number, or the words of a choice."""
        self.assertIn("from 0 to 65535", self.refusal("--port=65536"))
        self.assertIn("debug, info, warn, error", self.refusal("--log-level=loud"))
        self.assertIn("auto, int32, opcode-first", self.refusal("--framing=both"))

    def test_not_an_option(self) -> None:
        """An option without its value, an unknown one, and a word that is none."""
        for name in (*DEFAULTS, "store"):
            if name not in FLAGS:
                self.assertIn(name, self.refusal(f"--{name}"))
        for argument in ("--prot=1", "-x", "9000"):
            self.assertIn(argument.partition("=")[0], self.refusal(argument))
        self.assertIn("'9000'", self.refusal("--store", "none", "9000"))

    def test_what_was_meant(self) -> None:
        """An option like the one that there is not is named."""
        self.assertIn("--prot not recognized: did you mean --port?", self.refusal("--prot=1"))
        self.assertRegex(self.refusal("--colour"), "--colour not recognized$")
        self.assertRegex(self.refusal("-x"), "-x not recognized$")

    def test_options_of_the_program(self) -> None:
        """Those of twistd and of twist come before the word cafeorch: the line says so."""
        for parent, program, options in (
            (None, "twistd", ("-n", "--nodaemon", "--logfile")),
            (ServerOptions(), "twistd", ("-n", "--pidfile")),
            (TwistOptions(), "twist", ("--reactor",)),
        ):
            self.parent = parent
            for option in options:
                command = f"stands before the word cafeorch: {program} {option} cafeorch"
                self.assertIn(command, self.refusal(option))
        self.assertNotIn("before", self.refusal("-n"))

    def test_listen_excludes_the_others(self) -> None:
        """``--listen`` stands with none of the three options that it replaces."""
        for name, text in (("port", "1"), ("interface", "::1"), ("backlog", "1")):
            refusal = self.refusal("--listen=tcp:1", f"--{name}={text}")
            self.assertIn("--listen", refusal)
            self.assertIn(f"--{name}", refusal)
            refusal = self.refusal(CAFEORCH_LISTEN="tcp:1", **{variable(name): text})
            self.assertIn("CAFEORCH_LISTEN", refusal)
            self.assertIn(variable(name), refusal)

    def test_an_option_that_needs_another(self) -> None:
        """Four options need another one, which is named."""
        for name, text, needed in (
            ("tls-key", "key.pem", "tls-cert"),
            ("tls-client-ca", "ca.pem", "tls-cert"),
            ("agencies", "agencies", "tls-client-ca"),
            ("proxy-from", "10.0.0.0/8", "proxy-protocol"),
            ("proxy-from", "127.0.0.0/8,::1", "proxy-protocol"),
        ):
            self.assertIn(f"--{name} needs --{needed}", self.refusal(f"--{name}={text}"))
            refusal = self.refusal(**{variable(name): text})
            self.assertIn(f"{variable(name)} needs {variable(needed)}", refusal)

    def test_bad_flags(self) -> None:
        """A variable must be yes or no; on the command line a flag has no value."""
        refusal = self.refusal(CAFEORCH_PROXY_PROTOCOL="maybe")
        self.assertIn("CAFEORCH_PROXY_PROTOCOL: 'maybe' is not one of 1, yes, true, on", refusal)
        self.assertIn("--proxy-protocol", self.refusal("--proxy-protocol=yes"))


class Help(OptionsTestCase):
    """What ``--help`` and ``--version`` print."""

    def printed(self, argument: str) -> str:
        """What is printed for an option that prints and ends with status 0."""
        with redirect_stdout(io.StringIO()) as output:
            error = self.assertRaises(SystemExit, self.parse, argument)
        self.assertEqual(error.code, 0)
        return output.getvalue()

    def test_help(self) -> None:
        """``--help`` lists every option with its default, and names the variables."""
        text = self.printed("--help")
        self.assertEqual(self.printed("-h"), text)
        shown = {"store": "cafeorch.sqlite3", "log-level": "info", "drain-timeout": "10"}
        shown |= {"log-format": "text", "framing": "auto", "max-connections-per-host": "none"}
        shown |= {"idle-timeout": "none", "frame-timeout": "30", "processing-timeout": "60"}
        shown |= {"metrics": "none", "store-patience": "30"}
        shown |= dict.fromkeys(PATHS, "none") | {"proxy-from": "127.0.0.0/8,::1"}
        for name in FLAGS:
            self.assertRegex(text, rf"(?m)^ +--{name} ")
        for name, default in ({**DEFAULTS, **shown}).items():
            if name in FLAGS:
                continue
            short = f"-{SHORT[name]}, " if name in SHORT else ""
            self.assertRegex(text, rf"(?m)^ +{short}--{name}=")
            if name not in REPEATED:
                self.assertIn(f"[default: {default}]", " ".join(text.split()))
        self.assertIn("CAFEORCH_LOG_LEVEL", text)

    def test_version(self) -> None:
        """``--version`` is the package's."""
        self.assertEqual(self.printed("--version"), f"cafeteria_orch {__version__}\n")
