"""A quick way to log what is logged for each message."""

from __future__ import annotations

from twisted.logger import Logger, LogLevel

from .clock import wall_time

_INFO = LogLevel.info


def log_info(logger: Logger, message: str, **fields: object) -> None:
    """Log at info as ``logger.info`` does, in a fraction of the time.

    The event and its observers are the same. Twisted's own method first lists all levels there
    are, to see whether the one that it is given is one of them.

    :param logger: of the module that logs.
    :param message: the format of the line.
    """
    fields.update(
        log_logger=logger,
        log_level=_INFO,
        log_namespace=logger.namespace,
        log_source=logger.source,
        log_format=message,
        log_time=wall_time(),
    )
    logger.observer(fields)
