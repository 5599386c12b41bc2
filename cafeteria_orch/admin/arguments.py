"""Values on the command line of ``cafeorch``."""

from __future__ import annotations

from datetime import datetime, timezone

from cafeteria_orch.common.arguments import BadArgument
from cafeteria_orch.store.database import timestamp
from cafeteria_orch.store.location import absolute


def location(text: str) -> str:
    """Check the place of a store."""
    try:
        return absolute(text)
    except ValueError as error:
        # A text of argparse's own would show the password of a URL.
        raise BadArgument(str(error)) from None


def moment(text: str) -> str:
    """Check a date, or a date and a time, of UTC unless it says another zone.

    :return: it in the form in which a store has its times.
    """
    try:
        read = datetime.fromisoformat(text)
    except ValueError:
        raise BadArgument(
            f"{text!r} is no date: write it as 2024-01-31 or '2024-01-31 18:00:00'"
        ) from None
    return timestamp((read if read.tzinfo else read.replace(tzinfo=timezone.utc)).timestamp())
