"""The process that runs a target.

``python -m tests.fuzzing.worker fuzz TARGET OPTION...`` gives it inputs by its coverage, with
libFuzzer's options; ``python -m tests.fuzzing.worker replay TARGET FOLDER`` those in a folder.
"""

from __future__ import annotations

import sys
from pathlib import Path
from zlib import crc32

MEASURED = 64
"""One of so many inputs is measured, by its checksum: that takes several times as long."""


def fuzz(name: str, options: list[str]) -> None:
    """Run a target until its time is over, or it has a finding."""
    import atheris  # noqa: PLC0415

    # What is imported before is not instrumented: of Twisted, all but what parses requests.
    import twisted.internet.testing  # noqa: PLC0415
    import twisted.protocols.tls  # noqa: PLC0415
    import twisted.trial.unittest  # noqa: F401, PLC0415

    with atheris.instrument_imports(include=["cafeteria_orch", "twisted"]):
        from .targets import TARGETS  # noqa: PLC0415

    target = TARGETS[name]

    def one(data: bytes) -> None:
        (target.run if crc32(data) % MEASURED else target.check)(data)

    _silence()
    atheris.Setup([sys.argv[0], f"-max_len={target.max_length}", *options], one)
    atheris.Fuzz()


def replay(name: str, folder: str) -> None:
    """Run a target on all inputs in a folder."""
    from .targets import TARGETS  # noqa: PLC0415

    _silence()
    for path in Path(folder).iterdir():
        TARGETS[name].run(path.read_bytes())


def _silence() -> None:
    from twisted.logger import globalLogBeginner  # noqa: PLC0415

    globalLogBeginner.beginLoggingTo([], redirectStandardIO=False)


if __name__ == "__main__":
    if sys.argv[1] == "fuzz":
        fuzz(sys.argv[2], sys.argv[3:])
    else:
        replay(*sys.argv[2:])
