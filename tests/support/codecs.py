"""The row codecs, which the same tests are run on."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import ClassVar
from unittest import TestCase, skipUnless

from cafeteria_orch.wire import rows

COMPILED = "cafeteria_orch.wire._rows"
IS_BUILT = find_spec(COMPILED) is not None

compiled_only = skipUnless(IS_BUILT, "the compiled row codec is not built")


class CodecTestCase(TestCase):
    """Tests of the pure codec, which a subclass runs on the compiled one.

    :cvar codec: a module with ``decode_rows``, ``encode_row`` and ``encode_rows``.
    """

    codec: ClassVar[ModuleType] = rows


@compiled_only
class Compiled(CodecTestCase):
    """The mixin of such a subclass."""

    codec = import_module(COMPILED) if IS_BUILT else rows
