"""A client whose certificate says its agency: what its FINISHED may say."""

from __future__ import annotations

from twisted.internet.task import Clock
from twisted.logger import LogLevel, capturedLogs
from twisted.trial.unittest import SynchronousTestCase

from cafeteria_orch.server.counters import Outcome
from cafeteria_orch.server.factory import OrchestratorFactory
from cafeteria_orch.server.responses import Exchange
from cafeteria_orch.wire.messages import Finished, Message, encode
from cafeteria_orch.wire.opcodes import Opcode
from tests.support.builders import FAIL, SUCCESS, TCPTransport, batch_frame, connect, frame, texts


class CertifiedTests(SynchronousTestCase):
    """Clients of agency 7."""

    def setUp(self) -> None:
        self.factory = OrchestratorFactory(Clock())
        self.finished: list[int | None] = []
        self.factory.register_processor(Opcode.FINISHED, self.finish, answers=False)

    def finish(self, _: Message, client: Exchange) -> bool:
        self.finished.append(client.agency_id)
        return False

    def send(self, data: bytes) -> TCPTransport:
        """What a client is answered."""
        protocol, transport = connect(self.factory)
        protocol.session.common_name = "cafe-north"
        protocol.session.certify(7)
        protocol.dataReceived(data)
        self.assertTrue(transport.half_closed)
        return transport

    def test_its_own_agency_may_be_named_or_left_out(self) -> None:
        """Either way the session is finished with the agency of the certificate."""
        for named in (7, None):
            transport = self.send(batch_frame() + frame(encode(Finished(named))))
            self.assertEqual(transport.value(), SUCCESS)
        self.assertEqual(self.finished, [7, 7])

    def test_another_agency_is_refused(self) -> None:
        """FINISHED gets FAIL, reason 2, behind all other answers, and does not finish a session."""
        with capturedLogs() as events:
            transport = self.send(
                batch_frame() + frame(encode(Finished(8))) + batch_frame() + frame(b"\x03")
            )
        self.assertEqual(transport.value(), SUCCESS + FAIL + b"\x02")
        self.assertEqual(self.finished, [])
        (line,) = texts(list(events), LogLevel.warn)
        self.assertEqual(
            line,
            "action: finished | result: fail | ip: 192.0.2.7 | common_name: cafe-north"
            " | certified_id: 7 | agency_id: 8 | error: its certificate is of another agency",
        )
        tally = self.factory.counters.tallies[Opcode.FINISHED]
        self.assertEqual((tally.received, tally[Outcome.REJECTED]), (1, 1))

    def test_refusals_are_rate_limited_in_the_log(self) -> None:
        """A client that tries again and again does not fill the log."""
        with capturedLogs() as events:
            for _ in range(50):
                self.send(frame(encode(Finished(8))))
        self.assertEqual(len(texts(list(events), LogLevel.warn)), 1)
        tally = self.factory.counters.tallies[Opcode.FINISHED]
        self.assertEqual(tally[Outcome.REJECTED], 50)

    def test_without_a_certificate_finished_says_the_agency(self) -> None:
        """The last FINISHED counts, as ever."""
        protocol, _ = connect(self.factory)
        protocol.dataReceived(frame(encode(Finished(8))))
        self.assertEqual((self.finished, protocol.session.is_certified), ([8], False))
