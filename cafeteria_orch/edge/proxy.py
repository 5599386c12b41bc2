"""The header of the PROXY protocol, in which a load balancer says who its client is.

Versions 1 and 2. Pure: bytes to a value. Twisted's own wrapper (``twisted.protocols.haproxy``)
does not serve: it stays between the connection and its protocol, which costs a call for each
chunk and the half-close, believes whoever connects, wants a version 2 header to begin with at
least 16 bytes in one chunk, and keeps an address that is none.
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
V1_MOST_BYTES = 107
"""The longest header that version 1 knows, with its line's end."""

V2_START = b"\r\n\r\n\0\r\nQUIT\n"
V2_MOST_BYTES = 4096
"""The longest version 2 header that is taken. A balancer keeps it within a packet, 536 bytes;
this leaves room for one that hands on a client certificate."""

_V2_HEAD = struct.Struct("!BBH")
_V2_LOCAL, _V2_PROXY = 0x20, 0x21
_V2_ADDRESSES = {0x11: struct.Struct("!4s4s2H"), 0x21: struct.Struct("!16s16s2H")}
# Clients of whom there is nothing to be said: of an unknown kind, or on the balancer's own
# machine, by a local socket.
_V2_UNKNOWN, _V2_UNIX = 0x00, 0x31
_V2_UNIX_BYTES = 216

_V1_LINE = re.compile(rb"(TCP4|TCP6) ([0-9A-Fa-f:.]+) ([0-9A-Fa-f:.]+) (\d{1,5}) (\d{1,5})")
_MOST_PORT = 65535

Network = IPv4Network | IPv6Network


class ProxyError(ValueError):
    """Bytes that are no PROXY header. Its text is one of a few, and holds nothing of them."""


@dataclass(frozen=True)
class ProxyHeader:
    """A header that is whole.

    :ivar size: how many bytes it has.
    :ivar host: the client's address; ``None`` if the balancer speaks for itself, as in a check
        of the server's health, or does not know.
    :ivar port: the client's port; 0 without an address.
    """

    size: int
    host: str | None = None
    port: int = 0


def parse_header(data: bytes) -> ProxyHeader | None:
    """Read the header that a connection begins with.

    :param data: what came so far; more than the header may have come.
    :return: ``None`` if more has to come.
    :raises ProxyError: if it cannot become one, whatever comes.
    """
    if data[: len(V1_START)] == V1_START[: len(data)]:
        return _parse_v1(data) if len(data) > len(V1_START) else None
    if data[: len(V2_START)] == V2_START[: len(data)]:
        return _parse_v2(data) if len(data) > len(V2_START) else None
    raise ProxyError("there is no PROXY header")


def _parse_v1(data: bytes) -> ProxyHeader | None:
    end = data.find(b"\r\n", 0, V1_MOST_BYTES)
    if end < 0:
        if len(data) >= V1_MOST_BYTES:
            raise ProxyError("the line does not end")
        return None
    size = end + len(b"\r\n")
    line = data[len(V1_START) : end]
    if line.partition(b" ")[0] == b"UNKNOWN":
        return ProxyHeader(size)
    match = _V1_LINE.fullmatch(line)
    if match is None:
        raise ProxyError("the line is not as it has to be")
    family, *addresses = (part.decode("ascii") for part in match.groups())
    kind = IPv4Address if family == "TCP4" else IPv6Address
    try:
        source, _ = (kind(address) for address in addresses[:2])
    except ValueError as error:
        raise ProxyError("an address is none") from error
    port, other_port = map(int, addresses[2:])
    if max(port, other_port) > _MOST_PORT:
        raise ProxyError("a port is none")
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
    if size > V2_MOST_BYTES:
        raise ProxyError(f"it has more than {V2_MOST_BYTES} bytes")
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
    # One client, one text: limits are counted by it.
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return str(mapped or address)


def parse_networks(text: str) -> tuple[Network, ...]:
    """Read networks and single addresses, separated by commas.

    :raises ValueError: naming the one that is none.
    """
    try:
        return tuple(ip_network(part.strip()) for part in text.split(","))
    except ValueError as error:
        raise ValueError(f"{text!r} is no list of networks: {error}") from error


def is_within(host: str, networks: tuple[Network, ...]) -> bool:
    """Whether an address is in one of some networks."""
    address = ip_address(host)
    if isinstance(address, IPv6Address) and address.ipv4_mapped:
        address = address.ipv4_mapped
    return any(address in network for network in networks)
