"""``cafeorch check``: whether the server would start, and what it says of that."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

from tests.support.certificates import Files
from tests.support.copies import Outcome, cafeorch
from tests.support.processes import PROGRAMS, ROOT
from tests.support.services import restore_process


class CheckTestCase(SynchronousTestCase):
    """A folder of its own, an environment of its own, and the process as it was afterwards."""

    def setUp(self) -> None:
        self.folder = Path(self.mktemp()).absolute()
        self.folder.mkdir()
        self.addCleanup(os.chdir, Path.cwd())
        os.chdir(self.folder)
        self.environment = {"PATH": os.environ.get("PATH", "")}
        self.patch(os, "environ", self.environment)
        self.patch(sys, "path", list(sys.path))
        restore_process(self)

    def check(self, *arguments: str, **environment: str) -> Outcome:
        """Run it, and see that it leaves nothing behind."""
        before = {*self.folder.rglob("*")}
        self.environment.update(environment)
        outcome = cafeorch("check", *arguments)
        for name in environment:
            del self.environment[name]
        left = {path for path in self.folder.rglob("*") if "__pycache__" not in path.parts}
        self.assertEqual(left, before)
        return outcome


class CanStart(CheckTestCase):
    """Nothing is wrong."""

    def test_defaults(self) -> None:
        """The address and the store are shown, whoever set them, and the status is 0."""
        outcome = self.check("--port=0")
        self.assertEqual((outcome.status, outcome.err), (0, ""))
        *settings, verdict = outcome.out.splitlines()
        self.assertEqual(verdict, "The server can start.")
        self.assertEqual(
            [line.split(maxsplit=2) for line in settings],
            [
                ["--interface", "127.0.0.1", "default"],
                ["--metrics", "none", "default"],
                ["--port", "0", "command line"],
                ["--store", str(self.folder / "cafeorch.sqlite3"), "default"],
            ],
        )

    def test_where_options_come_from(self) -> None:
        """Each option that is set is shown with its source; the command line wins."""
        outcome = self.check(
            "--store=none",
            "--log-level=warn",
            CAFEORCH_LISTEN="tcp:0:interface=127.0.0.1 unix:x",
            CAFEORCH_LOG_LEVEL="debug",
            CAFEORCH_PROXY_PROTOCOL="on",
        )
        self.assertEqual((outcome.status, outcome.err), (0, ""))
        lines = [" ".join(line.split()) for line in outcome.out.splitlines()]
        for line in (
            "--listen tcp:0:interface=127.0.0.1 unix:x CAFEORCH_LISTEN",
            "--log-level warn command line",
            "--proxy-protocol yes CAFEORCH_PROXY_PROTOCOL",
            "--store none command line",
        ):
            self.assertIn(line, lines)
        self.assertNotIn("--port", outcome.out)
        outcome = self.check("--port=0", "--store=none", CAFEORCH_LISTEN="unix:x")
        self.assertNotIn("--listen", outcome.out)

    def test_what_the_server_warns_of(self) -> None:
        """Warnings of the start are shown; the server can start all the same."""
        outcome = self.check("--port=0", "--metrics=tcp:0")
        self.assertEqual(outcome.status, 0)
        self.assertIn("everybody who reaches the port of --metrics", outcome.err)

    def test_existing_store(self) -> None:
        """A store that is there is opened, and stays as it was."""
        self.assertEqual(cafeorch("check", "--port=0").status, 0)
        store = self.folder / "cafeorch.sqlite3"
        store.touch()
        self.assertEqual(self.check("--port=0").status, 0)
        self.assertEqual(store.stat().st_size, 0)


class CannotStart(CheckTestCase):
    """Something is wrong: the line of ``twistd cafeorch``, and status 1."""

    def assert_refused(self, line: str, *arguments: str, **environment: str) -> None:
        outcome = self.check(*arguments, **environment)
        self.assertEqual(outcome.status, 1)
        self.assertRegex(outcome.err, rf"\Acafeorch: [^\n]*{line}[^\n]*\n\Z")
        self.assertNotIn("can start", outcome.out)

    def test_mistakes(self) -> None:
        """Options, ports, the store, processors, TLS: all that the server finds at its start."""
        (self.folder / "cert.pem").write_text("nothing")
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
            self.assert_refused("Stop what listens there", f"--port={port}")
        for line, *arguments in (
            ("did you mean --port", "--prot=1"),
            ("twistd -n cafeorch", "-n"),
            ("'x' is not an option", "--port=0", "x"),
            ("make the folder", "--port=0", "--store=missing/x"),
            ("--processors missing:x", "--port=0", "--processors=missing:x"),
            ("--tls-cert", "--port=0", "--tls-cert=cert.pem"),
            ("give it as tcp:PORT", "--listen=tcp:x"),
        ):
            self.assert_refused(line, *arguments)
        self.assert_refused("CAFEORCH_PORT: 'x'", CAFEORCH_PORT="x")

    def test_unknown_variables(self) -> None:
        """A variable that sets nothing is a mistake, though the server would start."""
        outcome = self.check("--port=0", CAFEORCH_STROE="hidden")
        self.assertEqual(outcome.status, 1)
        self.assertRegex(
            outcome.err, r"\ACAFEORCH_STROE in the environment .*CAFEORCH_STORE[?]\n\Z"
        )
        self.assertNotIn("can start", outcome.out)
        self.assertNotIn("hidden", outcome.out + outcome.err)

    def test_passwords_are_not_shown(self) -> None:
        """Neither where the store is shown, nor where it is refused."""
        outcome = self.check("--port=0", "--store=postgresql://me:hidden@127.0.0.1:1/x")
        self.assertEqual(outcome.status, 1)
        self.assertIn("postgresql://me@127.0.0.1:1/x", outcome.out)
        self.assertNotIn("hidden", outcome.out + outcome.err)


class AsTwistd(CheckTestCase):
    """It is the same code: the plugin that ``twistd`` finds."""

    def test_same_line(self) -> None:
        """A process of its own ends as ``twistd -n cafeorch`` does, with the same line."""
        self.environment["PYTHONPATH"] = str(ROOT)
        files = Files(self.folder)
        arguments = ("--port=0", "--store=missing/x", f"--tls-cert={files.cert}")
        lines = []
        for command in (("twistd", "-n", "cafeorch"), ("cafeorch", "check")):
            program, *words = command
            ended = subprocess.run(
                [PROGRAMS / program, *words, *arguments],
                check=False,
                env=self.environment,
                capture_output=True,
                text=True,
            )
            self.assertEqual(ended.returncode, 1)
            lines.append(ended.stderr)
        self.assertEqual(lines[0], lines[1])
        self.assertIn("missing", lines[0])

    def test_help(self) -> None:
        """Its own help, not the server's, says what it does."""
        outcome = cafeorch("check", "--help")
        self.assertIn("the store and the TLS files usable", " ".join(outcome.out.split()))
