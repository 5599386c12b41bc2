"""Where batches come to rest."""

from __future__ import annotations

from twisted.internet.defer import Deferred
from zope.interface import Interface

from cafeteria_orch.factory import OrchestratorFactory


class ISink(Interface):
    """What the service needs of a place that batches come to rest in."""

    def register(factory: OrchestratorFactory) -> None:  # noqa: N805
        """Register the sink's processors. Before :meth:`start`."""

    def start() -> None:
        """Open it. Whatever is wrong is raised here, before a client is served."""

    def stop() -> Deferred[None]:
        """Take nothing more, finish what was taken, close. Fires when that is done."""
