"""Who may become a client: the PROXY header, the TLS handshake, and admission by both.

A connection that is not admitted never reaches the server. A module here may import ``wire``,
``common`` and ``server``.
"""
