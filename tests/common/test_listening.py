"""Listening: an endpoint's port at once, or what keeps it from listening."""

from __future__ import annotations

from twisted.internet.defer import Deferred, fail
from twisted.internet.endpoints import TCP4ServerEndpoint, UNIXServerEndpoint
from twisted.internet.error import CannotListenError
from twisted.internet.protocol import Factory
from twisted.internet.testing import MemoryReactor
from twisted.trial.unittest import SynchronousTestCase

from cafeteria_orch.common.listening import address_of, listen
from tests.support.services import RecordingEndpoint


class ListeningTests(SynchronousTestCase):
    """``listen`` and ``address_of``."""

    def test_the_port(self) -> None:
        """An endpoint that listens gives its port, and has the factory."""
        endpoint, factory = RecordingEndpoint(), Factory()
        self.assertIs(listen(endpoint, factory), endpoint.port)
        self.assertEqual(endpoint.factories, [factory])

    def test_what_keeps_it_from_listening(self) -> None:
        """It is raised as it is."""
        endpoint = RecordingEndpoint()
        error = CannotListenError("127.0.0.1", 70, OSError("taken"))
        self.patch(endpoint, "listen", lambda _: fail(error))
        self.assertIs(self.assertRaises(CannotListenError, listen, endpoint, Factory()), error)

    def test_an_endpoint_that_says_so_later(self) -> None:
        """It is refused: a service must not say that it runs while nothing listens."""
        endpoint = RecordingEndpoint()
        self.patch(endpoint, "listen", lambda _: Deferred())
        self.assertRaises(RuntimeError, listen, endpoint, Factory())

    def test_the_address(self) -> None:
        """Host and port of a TCP port, and the path of a local socket."""
        reactor = MemoryReactor()
        port = listen(TCP4ServerEndpoint(reactor, 70, interface="127.0.0.1"), Factory())
        self.assertRegex(address_of(port), r"^[\d.]+:\d+$")
        port = listen(UNIXServerEndpoint(reactor, "cafe.socket"), Factory())
        self.assertIn("cafe.socket", address_of(port))
