"""A Twisted server that takes tables from coffee-shop agencies, batch by batch.

A processor answers through :mod:`cafeteria_orch.responses` and is registered with an
:class:`OrchestratorFactory`. A program that sends uses an :class:`OrchestratorClient`.
"""

from __future__ import annotations

from .sender.client import OrchestratorClient
from .server import responses
from .server.factory import OrchestratorFactory
from .server.responses import Exchange
from .wire.errors import BatchRejected, ProtocolError, TryAgainLater
from .wire.messages import (
    BatchRecvFail,
    BatchRecvSuccess,
    ClientHello,
    Finished,
    RawMessage,
    StoreIdentity,
    TableBatch,
)
from .wire.opcodes import BatchStatus, FailReason, Opcode
from .wire.tables import (
    MENU_ITEMS,
    STORES,
    TABLES,
    TRANSACTION_ITEMS,
    TRANSACTIONS,
    USERS,
    Table,
)

__version__ = "0.1.0"

__all__ = [
    "MENU_ITEMS",
    "STORES",
    "TABLES",
    "TRANSACTIONS",
    "TRANSACTION_ITEMS",
    "USERS",
    "BatchRecvFail",
    "BatchRecvSuccess",
    "BatchRejected",
    "BatchStatus",
    "ClientHello",
    "Exchange",
    "FailReason",
    "Finished",
    "Opcode",
    "OrchestratorClient",
    "OrchestratorFactory",
    "ProtocolError",
    "RawMessage",
    "StoreIdentity",
    "Table",
    "TableBatch",
    "TryAgainLater",
    "responses",
]
