"""What operators see: the log, the metrics, the health checks, the status page.

It reads what others count, and decides nothing. A module here may import ``wire``, ``common``,
``server`` and ``store``.
"""
