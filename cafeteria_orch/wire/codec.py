"""Which row codec runs: the compiled one where it was built, otherwise the pure one.

``CAFEORCH_PURE=1`` in the environment forces the pure one, :mod:`cafeteria_orch.wire.rows`, which
is the specification of both.
"""

from __future__ import annotations

import os
from importlib.util import find_spec

if os.environ.get("CAFEORCH_PURE", "0") in {"", "0"} and find_spec("cafeteria_orch.wire._rows"):
    from ._rows import decode_rows, encode_row, encode_rows

    CODEC = "compiled"
else:
    from .rows import decode_rows, encode_row, encode_rows

    CODEC = "pure"

__all__ = ["CODEC", "decode_rows", "encode_row", "encode_rows"]
