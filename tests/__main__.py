"""All checks of the project, as one command: ``python -m tests``."""

from __future__ import annotations

import subprocess
import sys

CHECKS = (
    ("ruff", "check", "."),
    ("ruff", "format", "--check", "."),
    ("mypy",),
    # One worker more than two processors have work for: many tests wait for processes.
    ("pytest", "-n", "3", "--dist", "loadscope", "--no-loadscope-reorder", "--cov"),
)


def main() -> int:
    """Run the checks in turn; the first that fails ends it with its status."""
    for check in CHECKS:
        print("$ python -m", *check, flush=True)
        status = subprocess.run([sys.executable, "-m", *check], check=False).returncode
        if status:
            return status
    return 0


sys.exit(main())
