"""The header of the PROXY protocol, in which a load balancer says who its client is.

A parser of versions 1 and 2, from bytes to a value, without I/O. Twisted's own wrapper
(``twisted.protocols.haproxy``) trusts every peer, needs the first 16 bytes of a version 2 header
in one chunk, accepts addresses that are invalid, and stays between the transport and the
protocol: it adds a call to each chunk and hides the half-close.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from ipaddress import (
    IPv4Address,
    IPv4Network,
    IPv6Address,
    IPv6Network,
    ip_address,
    ip_network,
)

V1_START = b"PROXY "
V1_MAX_BYTES = 107
"""The size of the longest version 1 header, with the end of its line."""

V2_START = b"\r\n\r\n\0\r\nQUIT\n"
V2_MAX_BYTES = 4096
"""The size of the longest version 2 header that is accepted. Most have less than 536 bytes; one
that passes a client certificate on has more."""

_V2_HEAD = struct.Struct("!BBH")
_V2_LOCAL, _V2_PROXY = 0x20, 0x21
_V2_ADDRESSES = {0x11: struct.Struct("!4s4s2H"), 0x21: struct.Struct("!16s16s2H")}
# Clients without a TCP address: of an unknown kind, or at a local socket of the balancer.
_V2_UNKNOWN, _V2_UNIX = 0x00, 0x31
_V2_UNIX_BYTES = 216

_V1_LINE = re.compile(rb"(TCP4|TCP6) ([0-9A-Fa-f:.]+) ([0-9A-Fa-f:.]+) (\d{1,5}) (\d{1,5})")
_MAX_PORT = 65535

Network = IPv4Network | IPv6Network


class ProxyError(ValueError):
    """The bytes are not a PROXY header. Its text is one of a few, and quotes no byte of them."""


@dataclass(frozen=True)
class ProxyHeader:
    """A complete header.

    :ivar size: the number of its bytes.
    :ivar host: the client's address; ``None`` if the balancer does not know it, or connects on
        its own behalf, as for a health check.
    :ivar port: the client's port; 0 without an address.
    """

    size: int
    host: str | None = None
    port: int = 0


def parse_header(data: bytes) -> ProxyHeader | None:
    """Parse the header at the beginning of a connection.

    :param data: the bytes received so far, the header's and any that follow it.
    :return: ``None`` if the header is incomplete.
    :raises ProxyError: if no further bytes can make it a header.
    """
    if data[: len(V1_START)] == V1_START[: len(data)]:
        return _parse_v1(data) if len(data) > len(V1_START) else None
    if data[: len(V2_START)] == V2_START[: len(data)]:
        return _parse_v2(data) if len(data) > len(V2_START) else None
    raise ProxyError("there is no PROXY header")


def _parse_v1(data: bytes) -> ProxyHeader | None:
    end = data.find(b"\r\n", 0, V1_MAX_BYTES)
    if end < 0:
        if len(data) >= V1_MAX_BYTES:
            raise ProxyError("the line does not end")
        return None
    size = end + len(b"\r\n")
    line = data[len(V1_START) : end]
    if line.partition(b" ")[0] == b"UNKNOWN":
        return ProxyHeader(size)
    match = _V1_LINE.fullmatch(line)
    if match is None:
        raise ProxyError("the line is malformed")
    family, *addresses = (part.decode("ascii") for part in match.groups())
    kind = IPv4Address if family == "TCP4" else IPv6Address
    try:
        source, _ = (kind(address) for address in addresses[:2])
    except ValueError as error:
        raise ProxyError("an address is invalid") from error
    port, other_port = map(int, addresses[2:])
    if max(port, other_port) > _MAX_PORT:
        raise ProxyError("a port is invalid")
    return ProxyHeader(size, _text_of(source), port)


def _parse_v2(data: bytes) -> ProxyHeader | None:
    start = len(V2_START)
    command = data[start]
    if command not in {_V2_LOCAL, _V2_PROXY}:
        raise ProxyError("the version is not 2, or the command neither LOCAL nor PROXY")
    begin = start + _V2_HEAD.size
    if len(data) < begin:
        return None
    _, family, length = _V2_HEAD.unpack_from(data, start)
    size = begin + length
    if size > V2_MAX_BYTES:
        raise ProxyError(f"it is longer than {V2_MAX_BYTES} bytes")
    addresses = _V2_ADDRESSES.get(family)
    if command == _V2_LOCAL or family == _V2_UNKNOWN:
        addresses, needed = None, 0
    elif family == _V2_UNIX:
        needed = _V2_UNIX_BYTES
    elif addresses is None:
        raise ProxyError("the client is not connected by TCP")
    else:
        needed = addresses.size
    if length < needed:
        raise ProxyError("it is too short for its addresses")
    if len(data) < size:
        return None
    if addresses is None:
        return ProxyHeader(size)
    source, _, port, _ = addresses.unpack_from(data, begin)
    return ProxyHeader(size, _text_of(ip_address(source)), port)


def _text_of(address: IPv4Address | IPv6Address) -> str:
    # The limits count by this text: a client has one, however its address is written.
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return str(mapped or address)


def parse_networks(text: str) -> tuple[Network, ...]:
    """Parse networks and single addresses, separated by commas.

    :raises ValueError: with a text that names the invalid one.
    """
    try:
        return tuple(ip_network(part.strip()) for part in text.split(","))
    except ValueError as error:
        raise ValueError(f"{text!r} is not a list of networks: {error}") from error


def is_within(host: str, networks: tuple[Network, ...]) -> bool:
    """Return whether one of the networks contains an address."""
    address = ip_address(host)
    if isinstance(address, IPv6Address) and address.ipv4_mapped:
        address = address.ipv4_mapped
    return any(address in network for network in networks)
