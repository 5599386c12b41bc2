"""``cafeorch-bench``: loads a server, and measures it.

It stands on ``wire``, ``common`` and ``sender``: a module here imports no room of the server's.
"""
