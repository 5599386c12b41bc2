"""Look for inputs that a target does not handle: ``python -m tests.fuzzing [TARGET...]``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from . import corpus, native
from .campaign import MISSING, Campaign, is_installed
from .targets import TARGETS


def main(arguments: list[str] | None = None) -> int:
    """Run targets one after the other; the status is 1 if one had a finding."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzzing", description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(TARGETS)}")
    parser.add_argument("--minutes", type=float, default=1, help="of each target (%(default)s)")
    parser.add_argument(
        "--keep", type=int, default=0, metavar="N", help="add up to N inputs to the corpus"
    )
    parser.add_argument(
        "--make-corpus", action="store_true", help="write the inputs to begin with, and stop"
    )
    parser.add_argument(
        "--native",
        action="store_true",
        help=f"with the compiled modules built by clang for the fuzzer: {', '.join(native.TARGETS)}",
    )
    options = parser.parse_args(arguments)
    names = options.targets or list(native.TARGETS if options.native else TARGETS)
    unknown = set(names) - set(TARGETS)
    if unknown:
        parser.error(f"there is no target {', '.join(sorted(unknown))}")
    if options.make_corpus:
        for name in names:
            corpus.save(name, {**corpus.load(name), **TARGETS[name].seeds()})
        return 0
    if not is_installed():
        sys.exit(MISSING)
    findings = 0
    for name in names:
        with TemporaryDirectory() as folder:
            try:
                campaign = Campaign(name, Path(folder), native=options.native)
            except native.NotBuilt as error:
                sys.exit(f"the compiled modules: {error}")
            result = campaign.run(options.minutes * 60)
            print(result, flush=True)
            findings += result.finding is not None
            if options.keep and result.finding is None:
                print(f"{name}: {campaign.keep(options.keep)} inputs are new in the corpus")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
