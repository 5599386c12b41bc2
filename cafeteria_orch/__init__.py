"""A Twisted server that takes tables from coffee-shop agencies, batch by batch.

What a processor needs: :mod:`~cafeteria_orch.responses` to answer with,
:mod:`~cafeteria_orch.errors` to raise, :class:`OrchestratorFactory` to be registered with.
What a program that sends needs: :class:`OrchestratorClient`.
"""

from __future__ import annotations

__version__ = "0.1.0"
