"""``cafeorch-bench``: load for a server, and what comes of it.

It stands on ``wire``, ``common`` and ``sender``: a module here imports no room of the server's.
"""
