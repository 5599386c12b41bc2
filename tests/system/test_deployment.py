"""The examples in ``docs/`` for systemd and docker fit the program."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from difflib import unified_diff
from pathlib import Path
from unittest.mock import patch

from twisted.scripts._twistd_unix import ServerOptions
from twisted.trial.unittest import SkipTest, SynchronousTestCase

from cafeteria_orch.daemon.environment import PREFIX
from cafeteria_orch.daemon.options import Options
from cafeteria_orch.daemon.service import DEFAULT_DRAIN_TIMEOUT
from tests.support.disks import make_folder

DOCS = Path(__file__).parent.parent.parent / "docs"
DOCKER_STOP_TIMEOUT = 10.0
"""Seconds that docker waits for a container to stop."""


MEANT = """
-Description=cafeteria_orch, the orchestrator of the coffee shops' tables
+Description=cafeteria_orch, the orchestrator of the coffee shops' tables, node %i
-StateDirectory=cafeorch
+StateDirectory=cafeorch/%i
-WorkingDirectory=/var/lib/cafeorch
-Environment=CAFEORCH_STORE=/var/lib/cafeorch/cafeorch.sqlite3
+WorkingDirectory=/var/lib/cafeorch/%i
+Environment=CAFEORCH_STORE=/var/lib/cafeorch/%i/cafeorch.sqlite3
+Environment=CAFEORCH_NODE=%H-%i
+Environment=CAFEORCH_REUSE_PORT=1
+# Each node has figures of its own, on port 9101, 9102, ...
+Environment=CAFEORCH_METRICS=tcp:910%i:interface=127.0.0.1
+EnvironmentFile=-/etc/cafeorch@%i.env
-SyslogIdentifier=cafeorch
+SyslogIdentifier=cafeorch@%i
"""
"""What sets a node of several apart, by the lines of the two units."""


def options_of(command: Sequence[str], environment: dict[str, str]) -> Options:
    """Return the server's options for a command line of ``twistd`` and an environment.

    :raises SystemExit: if it is not understood.
    """
    config = ServerOptions()
    with patch.dict(os.environ, environment, clear=True):
        config.parseOptions(list(command))
    assert isinstance(config.subOptions, Options)
    assert config["nodaemon"]
    assert not config["pidfile"]
    return config.subOptions


def settings(text: str) -> dict[str, str]:
    """Return the server's variables that a text sets."""
    return dict(re.findall(rf"\b({PREFIX}[A-Z_]+)=(\S+)", text))


class ExampleTestCase(SynchronousTestCase):
    """The program understands an example."""

    def assert_known(self, text: str) -> None:
        """Every variable of the server that the text names is an option."""
        names = re.findall(rf"\b{PREFIX}([A-Z_]+)", text)
        self.assertNotEqual(names, [])
        known = {name.rstrip("=") for name in Options().longOpt}
        for name in names:
            self.assertIn(name.lower().replace("_", "-"), known)


class Units(ExampleTestCase):
    """``cafeorch.service``, ``cafeorch.socket`` and ``cafeorch@.service``."""

    def setUp(self) -> None:
        self.service = (DOCS / "cafeorch.service").read_text()
        self.socket = (DOCS / "cafeorch.socket").read_text()
        self.template = (DOCS / "cafeorch@.service").read_text()

    def values(self, key: str, unit: str | None = None) -> list[str]:
        """Return all values of a key in a unit."""
        return re.findall(rf"(?m)^{key}=(.*)$", unit or self.service)

    def value(self, key: str, unit: str | None = None) -> str:
        """Return the only value of a key."""
        (value,) = self.values(key, unit)
        return value

    def test_command(self) -> None:
        """The command is understood, and the store is in the folder that may be written."""
        program, *command = shlex.split(self.value("ExecStart"))
        self.assertEqual(Path(program).name, "twistd")
        environment = dict(entry.split("=", 1) for entry in self.values("Environment"))
        options = options_of(command, environment)
        folder = Path("/var/lib", self.value("StateDirectory"))
        self.assertEqual(Path(options["store"]).parent, folder)
        self.assertEqual(self.value("WorkingDirectory"), str(folder))

    def test_names(self) -> None:
        """The variables are those of options."""
        self.assert_known(self.service)
        self.assert_known(self.socket)
        self.assert_known(self.template)

    def test_the_template_is_the_unit(self) -> None:
        """A node of several differs in what it is called and what is its own, and in no more."""
        one, several = (
            text[text.index("[Unit]") :].splitlines() for text in (self.service, self.template)
        )
        # Behind the names of the two files; without the places of what differs.
        _, _, *lines = unified_diff(one, several, n=0, lineterm="")
        differences = [line for line in lines if not line.startswith("@@")]
        self.assertEqual(differences, MEANT.strip().splitlines())

    def test_nodes(self) -> None:
        """Each shares the port, and has a name, a store and figures of its own."""
        _, *command = shlex.split(self.value("ExecStart", self.template))
        nodes = []
        for instance in "12":
            unit = self.template.replace("%i", instance).replace("%H", "cafe.example")
            environment = dict(entry.split("=", 1) for entry in self.values("Environment", unit))
            options = options_of(command, environment)
            self.assertTrue(options["reuse-port"])
            self.assertEqual(options["node"], f"cafe.example-{instance}")
            self.assertEqual(options["metrics"], f"tcp:910{instance}:interface=127.0.0.1")
            folder = Path("/var/lib", self.value("StateDirectory", unit))
            self.assertEqual(Path(options["store"]).parent, folder)
            self.assertEqual(self.value("WorkingDirectory", unit), str(folder))
            nodes.append((options["store"], options["port"]))
        (first, port), (second, same_port) = nodes
        self.assertNotEqual(first, second)
        self.assertEqual(port, same_port)

    def test_stop(self) -> None:
        """The server has time for its drain and its log."""
        self.assertGreaterEqual(float(self.value("TimeoutStopSec")), DEFAULT_DRAIN_TIMEOUT + 5)

    def test_notifications(self) -> None:
        """The manager waits for notifications, and the sandbox allows them."""
        self.assertEqual(self.value("Type"), "notify")
        self.assertGreater(float(self.value("WatchdogSec")), 0)
        self.assertIn("AF_UNIX", self.value("RestrictAddressFamilies").split())

    def test_reload(self) -> None:
        """A reload sends SIGHUP."""
        self.assertEqual(self.value("ExecReload"), "/bin/kill -HUP $MAINPID")

    def test_descriptors(self) -> None:
        """There are descriptors for all connections, and some more."""
        options = options_of(["--nodaemon", "--pidfile=", "cafeorch"], {})
        self.assertGreater(int(self.value("LimitNOFILE")), options["max-connections"] + 100)

    def test_tls(self) -> None:
        """Nothing forbids the executable memory of pyOpenSSL's callbacks."""
        self.assertEqual(self.values("MemoryDenyWriteExecute"), [])

    def test_socket(self) -> None:
        """The server listens on the socket of this name and address family."""
        options = options_of(["--nodaemon", "--pidfile=", "cafeorch"], settings(self.socket))
        name = self.value("FileDescriptorName", self.socket)
        self.assertEqual(options["listen"], [f"systemd:domain=INET:name={name}"])
        # A port without an address is a socket of IPv6.
        self.assertRegex(self.value("ListenStream", self.socket), r"^\d+\.\d+\.\d+\.\d+:\d+$")

    def test_verify(self) -> None:
        """``systemd-analyze`` accepts the units; program and user need not exist."""
        if shutil.which("systemd-analyze") is None:
            raise SkipTest("there is no systemd-analyze here")
        folder = make_folder(self)
        program = shlex.split(self.value("ExecStart"))[0]
        for name, text in (("cafeorch", self.service), ("cafeorch@1", self.template)):
            service = re.sub(r"(?m)^(User|Group)=.*\n", "", text)
            (folder / f"{name}.service").write_text(service.replace(program, "/bin/true"))
        (folder / "cafeorch.socket").write_text(self.socket)
        found = subprocess.run(
            ["systemd-analyze", "verify", *folder.iterdir()],
            check=False,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
        )
        self.assertEqual((found.returncode, found.stdout), (0, ""))


class Image(ExampleTestCase):
    """``Dockerfile``."""

    def setUp(self) -> None:
        text = (DOCS / "Dockerfile").read_text()
        self.text = text
        lines = re.sub(r"\\\n\s*", "", re.sub(r"(?m)^#.*\n", "", text)).splitlines()
        self.instructions = [line.partition(" ")[::2] for line in lines if line]

    def value(self, instruction: str) -> str:
        """Return the value of an instruction that occurs once."""
        (value,) = [value for name, value in self.instructions if name == instruction]
        return value

    def test_command(self) -> None:
        """The command is understood, and the store is on the volume."""
        program, *command = json.loads(self.value("CMD"))
        self.assertEqual(program, "twistd")
        options = options_of(command, settings(self.value("ENV")))
        self.assertEqual(str(Path(options["store"]).parent), self.value("VOLUME"))
        self.assertEqual(options["interface"], "0.0.0.0")
        self.assertEqual(str(options["port"]), self.value("EXPOSE"))

    def test_stop(self) -> None:
        """The stop signal drains the server, within the time that docker allows."""
        options = options_of(["--nodaemon", "--pidfile=", "cafeorch"], settings(self.value("ENV")))
        self.assertEqual(self.value("STOPSIGNAL"), "SIGTERM")
        self.assertLess(options["drain-timeout"], DOCKER_STOP_TIMEOUT)

    def test_manual(self) -> None:
        """The image is built with the manual that the server shows."""
        # A link in a checkout, and a file in the source distribution.
        manual = DOCS.parent / "cafeteria_orch" / "observe" / "manual.md"
        self.assertEqual(manual.read_bytes(), (DOCS / "operations.md").read_bytes())
        copied = [value.split()[0] for name, value in self.instructions if name == "COPY"]
        self.assertIn("docs/operations.md", copied)

    def test_user(self) -> None:
        """The user is not root, and is given by number."""
        self.assertRegex(self.value("USER"), "^[1-9][0-9]*:[1-9][0-9]*$")

    def test_health(self) -> None:
        """The check uses the address of ``--metrics``."""
        metrics = settings(self.value("ENV"))["CAFEORCH_METRICS"]
        _, port, *_ = metrics.split(":")
        check = re.sub(r"^.* CMD ", "", self.value("HEALTHCHECK"))
        self.assertIn(f"http://127.0.0.1:{port}/livez", json.loads(check)[-1])

    def test_names(self) -> None:
        """The variables are those of options."""
        self.assert_known(self.text)
