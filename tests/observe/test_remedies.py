"""What an operator is told to do: something for each state and each reason."""

from __future__ import annotations

import re

from twisted.trial.unittest import SynchronousTestCase

from cafeteria_orch.observe.remedies import _REFUSALS, remedy_for
from tests.support.package import MODULES


class RemedyTests(SynchronousTestCase):
    """By the state and the reason of the refusal."""

    def test_nothing_to_mend(self) -> None:
        """A server that takes batches needs nothing."""
        self.assertIsNone(remedy_for("ready", None))

    def test_states(self) -> None:
        """Before and after it takes batches there is something to wait for."""
        self.assertIn("Wait", remedy_for("starting", "starting") or "")
        self.assertIn("--drain-timeout", remedy_for("draining", "draining") or "")

    def test_reasons(self) -> None:
        """The cause counts more than the form of the line, and any other line has an answer too."""
        for reason, expected in {
            "the store takes nothing now: database or disk is full": "Make room",
            "the store takes nothing now: could not extend file: No space left on device": "Make room",
            "the store takes nothing now: database is locked": "lock",
            "the store takes nothing now: connection refused": "network",
            "the store has not answered for 5 s": "hangs",
            "the store has not answered for 5 s: its commit waits for a synchronous standby": "standby",
            "the store refuses some batches now: table users has no column named gender": "undo",
            "the store's writer has ended: MemoryError; restart the server": "Restart",
            "the store takes nothing now: the last commit is still in progress": "Wait",
        }.items():
            self.assertIn(expected, remedy_for("refusing", reason) or "", reason)

    def test_reasons_are_those_of_the_store(self) -> None:
        """What a reason is told by stands in the store's code, or is the database's own."""
        code = " ".join(
            path.read_text() for name, (path, _) in MODULES.items() if name.startswith("store.")
        )
        texts = re.sub(r'"\s*f?"', "", code)
        for part in _REFUSALS.keys() - {"disk is full", "No space left", "locked"}:
            self.assertIn(part, texts)
