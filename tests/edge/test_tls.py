"""The server's certificates: read at the start, read again, and warned about."""

from __future__ import annotations

import gc
import sys
import time
import weakref
from pathlib import Path
from typing import Any
from unittest.mock import patch

from twisted.internet.protocol import Protocol
from twisted.logger import LogLevel, capturedLogs
from twisted.protocols.tls import TLSMemoryBIOFactory
from twisted.trial.unittest import SynchronousTestCase

from cafeteria_orch.common.clock import WallTime
from cafeteria_orch.common.pem import PEMError
from cafeteria_orch.edge.tls import ServerTLS
from tests.support.builders import texts
from tests.support.certificates import Files, issue, pem


class TLSTestCase(SynchronousTestCase):
    """A server's files, in a folder of the test's own."""

    def setUp(self) -> None:
        self.folder = Path(self.mktemp()).absolute()
        self.folder.mkdir()
        self.files = Files(self.folder)

    def load(self, wall_time: WallTime = time.time, **files: str) -> ServerTLS:
        """Read the server's files, with some of another name."""
        return ServerTLS(wall_time, **{"cert": self.files.cert, **files})


class StartTests(TLSTestCase):
    """A server reads its files before it starts."""

    def test_each_option_names_its_file_in_an_error(self) -> None:
        """The line about a file that cannot be used begins with the option and the file."""
        missing = str(self.folder / "missing.pem")
        for option in ("cert", "key", "client_ca"):
            error = self.assertRaises(PEMError, self.load, **{option: missing})
            name = option.replace("_", "-")
            self.assertRegex(str(error), rf"^--tls-{name} {missing}: No such file[^\n]+$")

    def test_without_the_extra_the_error_says_what_to_install(self) -> None:
        """A server without pyOpenSSL does not start with ``--tls-cert``."""
        with patch.dict(sys.modules, {"OpenSSL": None}):
            error = self.assertRaises(PEMError, self.load)
        self.assertRegex(str(error), r"^--tls-cert [^\n]*pip install 'cafeteria_orch\[tls\]'$")

    def test_a_certificate_outside_its_dates_is_served_with_a_warning(self) -> None:
        """The log says that clients will refuse a certificate that has expired, or is early."""
        path = self.files.write("old.pem", pem(issue("server", days=-1)))
        for wall_time, cert, problem in (
            (time.time, path, r"it has expired at .*: renew it"),
            (lambda: 0.0, self.files.cert, r"it is not valid before .*"),
        ):
            with capturedLogs() as events:
                self.load(wall_time, cert=cert)
            (line,) = texts(list(events), LogLevel.warn)
            self.assertRegex(line, rf"tls_cert: {cert} \| error: {problem}, clients will refuse")

    def test_a_valid_certificate_is_not_logged(self) -> None:
        """The start with valid files logs nothing."""
        with capturedLogs() as events:
            self.load(client_ca=self.files.client_ca)
        self.assertEqual(list(events), [])


class ReloadTests(TLSTestCase):
    """A server reads its files again while it runs."""

    def subject(self, tls: ServerTLS) -> str:
        """The name in the certificate of a connection that is made now."""
        factory: Any = TLSMemoryBIOFactory(tls, False, None)  # type: ignore[arg-type]
        connection = tls.serverConnectionForTLS(factory.protocol(factory, Protocol()))
        certificate: Any = connection.get_certificate(as_cryptography=True)
        return str(certificate.subject.rfc4514_string())

    def test_new_connections_get_the_new_certificate(self) -> None:
        """A reload takes what the files hold now, and the log says so."""
        tls = self.load()
        self.assertIn("CN=server", self.subject(tls))
        self.files.write("server.pem", pem(issue("renewed")))
        with capturedLogs() as events:
            tls.reload()
        self.assertIn("CN=renewed", self.subject(tls))
        (line,) = texts(list(events), LogLevel.info)
        expected = f"action: reload | result: success | tls_cert: {self.files.cert}"
        self.assertEqual(line, expected)

    def test_a_bad_file_changes_nothing(self) -> None:
        """If one file cannot be used, the old certificate stays, and the log says why."""
        tls = self.load(client_ca=self.files.client_ca)
        self.files.write("server.pem", pem(issue("renewed")))
        for name, option in (("ca.pem", "--tls-client-ca"), ("server.pem", "--tls-cert")):
            self.files.write(name, b"half a")
            with capturedLogs() as events:
                tls.reload()
            (line,) = texts(list(events), LogLevel.error)
            part = f"action: reload | result: fail | error: {option} {self.folder / name}: "
            self.assertIn(part, line)
            self.assertIn("CN=server", self.subject(tls))

    def test_a_reload_warns_of_dates_too(self) -> None:
        """An expired certificate is taken by a reload as at the start."""
        tls = self.load()
        self.files.write("server.pem", pem(issue("server", days=-1)))
        with capturedLogs() as events:
            tls.reload()
        self.assertEqual(len(texts(list(events), LogLevel.warn)), 1)
        self.assertEqual(len(texts(list(events), LogLevel.info)), 1)

    def test_a_reload_frees_what_was_read_before(self) -> None:
        """Reloads do not add up in memory."""
        tls = self.load(client_ca=self.files.client_ca)
        held: list[Any] = [tls._options, tls._options.getContext()]
        before = [weakref.ref(each) for each in held]
        held.clear()
        for _ in range(20):
            tls.reload()
        gc.collect()
        self.assertEqual([each() for each in before], [None, None])
