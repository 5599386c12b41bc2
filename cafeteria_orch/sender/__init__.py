"""The sending side: the client for programs, and ``cafeorch-send``.

It stands on ``wire`` and ``common``: a module here imports no room of the server's.
"""
