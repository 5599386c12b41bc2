"""TLS for senders, by the name that programs have imported it by; it goes with version 0.3."""

from __future__ import annotations

from .sender.tls import ClientTLS, TLSError

__all__ = ["ClientTLS", "TLSError"]
