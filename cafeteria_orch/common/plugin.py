"""The plugin of the server, as ``twistd`` finds it."""

from __future__ import annotations

from typing import Any

from twisted.application.service import IServiceMaker
from twisted.plugin import getPlugins


def service_maker() -> Any:
    """What ``twistd cafeorch`` is made by: its ``options`` and its ``makeService``."""
    (maker,) = (each for each in getPlugins(IServiceMaker) if each.tapname == "cafeorch")
    return maker
