"""All targets, by their names."""

from __future__ import annotations

from collections.abc import Mapping

from . import sender_targets, server_targets, wire_targets
from .target import Target

TARGETS: Mapping[str, Target] = {
    **wire_targets.TARGETS,
    **server_targets.TARGETS,
    **sender_targets.TARGETS,
}
