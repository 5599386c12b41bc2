"""Where batches come to rest."""

from __future__ import annotations

from typing import NamedTuple

from twisted.internet.defer import Deferred
from zope.interface import Attribute, Interface

from cafeteria_orch.server.factory import OrchestratorFactory


class StoreSizes(NamedTuple):
    """Bytes: of a store's file, and of what is written ahead of it."""

    file: int
    wal: int


class ISink(Interface):
    """What the service needs of a place that batches come to rest in."""

    refusal = Attribute("Why it takes nothing now, in one line; ``None`` while it does.")

    def register(factory: OrchestratorFactory) -> None:  # noqa: N805
        """Register the sink's processors. Before :meth:`start`."""

    def start() -> None:
        """Open it. Whatever is wrong is raised here, before a client is served."""

    def sizes() -> StoreSizes:
        """The sizes of its files; 0 of one that is not there."""

    def stop() -> Deferred[None]:
        """Take nothing more, finish what was taken, close. Fires when that is done."""
