"""Who may become a client: the PROXY header, the TLS handshake, admission.

The server never sees a connection that does not pass. A module here may import ``wire``,
``common`` and ``server``.
"""
