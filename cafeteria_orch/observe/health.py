"""Whether the server takes batches now, and why not."""

from __future__ import annotations

from cafeteria_orch.store.sink import Sink


class Health:
    """What load balancers and operators are told of a server's state.

    :param sink: the store, if there is one.
    :ivar is_started: whether it serves; to be set.
    :ivar is_draining: whether it is stopping; to be set.
    """

    def __init__(self, sink: Sink | None = None) -> None:
        self.sink = sink
        self.is_started = False
        self.is_draining = False

    @property
    def state(self) -> str:
        """``starting``, ``ready``, ``refusing`` or ``draining``."""
        if self.is_draining:
            return "draining"
        if not self.is_started:
            return "starting"
        return "ready" if self._store_refusal is None else "refusing"

    @property
    def refusal(self) -> str | None:
        """Why the server is not ready, in one line; ``None`` if it is."""
        state = self.state
        if state == "refusing":
            return self._store_refusal
        return None if state == "ready" else state

    @property
    def _store_refusal(self) -> str | None:
        if self.sink is None or self.sink.refusal is None:
            return None
        return " ".join(str(self.sink.refusal).split())
