"""A process that is stopped for a while, as a machine that is suspended stops it."""

from __future__ import annotations

import signal
import time

from tests.support.builders import FAIL, SUCCESS, batch_frame, frame
from tests.support.processes import HELLO, ProcessTestCase

CLIENTS = 5
FRAME_TIMEOUT = 1


class StoppedTests(ProcessTestCase):
    """What had arrived meanwhile is read before its client is judged."""

    def test_frames_that_arrived_whole_are_answered(self) -> None:
        """Though their time is up: short frames, and one that takes many reads."""
        server = self.start("--store=none", f"--frame-timeout={FRAME_TIMEOUT}")
        short, long = batch_frame(), frame(b"\x63" + bytes(1_000_000))
        clients = [(self.client(server), short, SUCCESS) for _ in range(CLIENTS)]
        clients.append((self.client(server), long, FAIL + b"\x03"))
        silent = self.client(server)
        silent.send(short[:-1])
        for client, data, _ in clients:
            client.send(data[:6])
        # What came first has been read when what came last is answered.
        last = self.client(server)
        last.send(HELLO)
        last.read(len(SUCCESS))
        server.signal(signal.SIGSTOP)
        try:
            for client, data, _ in clients:
                client.send(data[6:])
            time.sleep(FRAME_TIMEOUT + 0.5)
        finally:
            server.signal(signal.SIGCONT)
        for client, _, answer in clients:
            self.assertEqual(client.read(len(answer)), answer)
        self.assertEqual(silent.read_to_the_end(), b"")
        server.wait_until_logged("1 bytes were missing")
        self.assertEqual(server.log.count("bytes were missing"), 1)
