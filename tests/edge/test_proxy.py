"""The PROXY protocol's header: bytes to a value, whatever the bytes."""

from __future__ import annotations

import socket
import struct

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from cafeteria_orch.edge.proxy import (
    V1_MOST_BYTES,
    V2_MOST_BYTES,
    V2_START,
    ProxyError,
    ProxyHeader,
    is_within,
    parse_header,
    parse_networks,
)

V1 = b"PROXY TCP4 192.0.2.7 198.51.100.1 56324 443\r\n"


def version_2(
    family: int = 0x11, addresses: bytes | None = None, *, command: int = 0x21, more: bytes = b""
) -> bytes:
    """A header of version 2, of a client at 192.0.2.7, unless it is told otherwise."""
    if addresses is None:
        here, there = map(socket.inet_aton, ("192.0.2.7", "198.51.100.1"))
        addresses = here + there + struct.pack("!2H", 56324, 443)
    body = addresses + more
    return V2_START + struct.pack("!BBH", command, family, len(body)) + body


def version_2_ipv6(host: str) -> bytes:
    """The same of a client at an IPv6 address."""
    addresses = socket.inet_pton(socket.AF_INET6, host) * 2 + struct.pack("!2H", 1, 2)
    return version_2(0x21, addresses)


V2 = version_2()

VALID = (
    (V1, "192.0.2.7", 56324),
    (b"PROXY TCP4 0.0.0.0 255.255.255.255 0 65535\r\n", "0.0.0.0", 0),
    (b"PROXY TCP6 2001:DB8:0::1 ::1 4 5\r\n", "2001:db8::1", 4),
    (b"PROXY TCP6 ::ffff:192.0.2.7 ::1 4 5\r\n", "192.0.2.7", 4),
    (b"PROXY UNKNOWN\r\n", None, 0),
    (b"PROXY UNKNOWN ffff::1 whatever \x00\xff\r\n", None, 0),
    (V2, "192.0.2.7", 56324),
    (version_2(more=b"\x04\x00\x03abc"), "192.0.2.7", 56324),
    (version_2_ipv6("2001:db8::1"), "2001:db8::1", 1),
    (version_2_ipv6("::ffff:192.0.2.7"), "192.0.2.7", 1),
    (version_2(command=0x20), None, 0),
    (version_2(0x99, b"", command=0x20), None, 0),
    (version_2(0x00, b""), None, 0),
    (version_2(0x31, bytes(216)), None, 0),
    (version_2(more=bytes(V2_MOST_BYTES - len(V2))), "192.0.2.7", 56324),
)
"""Headers, with the client's address and port in them."""

INVALID = (
    b"\x00\x00\x00\x11\x1e",
    b"GET / HTTP/1.1\r\n",
    b"PROXY\r\n",
    b"proxy TCP4 192.0.2.7 198.51.100.1 1 2\r\n",
    b"PROXY \r\n",
    b"PROXY TCP5 192.0.2.7 198.51.100.1 1 2\r\n",
    b"PROXY TCP4 192.0.2.7 198.51.100.1 1\r\n",
    b"PROXY TCP4 192.0.2.7 198.51.100.1 1 2 3\r\n",
    b"PROXY TCP4  192.0.2.7 198.51.100.1 1 2\r\n",
    b"PROXY TCP4 192.0.2.256 198.51.100.1 1 2\r\n",
    b"PROXY TCP4 192.0.2.7 198.51.100 1 2\r\n",
    b"PROXY TCP4 ::1 ::1 1 2\r\n",
    b"PROXY TCP6 192.0.2.7 198.51.100.1 1 2\r\n",
    b"PROXY TCP6 fe80::1%eth0 ::1 1 2\r\n",
    b"PROXY TCP4 192.0.2.7 198.51.100.1 65536 2\r\n",
    b"PROXY TCP4 192.0.2.7 198.51.100.1 1 65536\r\n",
    b"PROXY TCP4 192.0.2.7 198.51.100.1 -1 2\r\n",
    b"PROXY TCP4 192.0.2.7\n 198.51.100.1 1 2\r\n",
    b"PROXY UNKNOWN " + b"x" * (V1_MOST_BYTES - len(b"PROXY UNKNOWN \r")) + b"\r\n",
    V2_START[:-1] + b"\r" + V2[len(V2_START) :],
    version_2(command=0x22),
    version_2(command=0x11),
    version_2(0x12),
    version_2(0x22, bytes(36)),
    version_2(0x11, bytes(11)),
    version_2(0x21, bytes(35)),
    version_2(0x31, bytes(215)),
    version_2(more=bytes(V2_MOST_BYTES - len(V2) + 1)),
)


def outcome(data: bytes) -> ProxyHeader | str | None:
    """What becomes of some bytes: a header, a refusal, or nothing yet."""
    try:
        return parse_header(data)
    except ProxyError:
        return "refused"


def byte_by_byte(data: bytes) -> ProxyHeader | str | None:
    """The first thing that becomes of bytes that come one at a time."""
    for end in range(len(data) + 1):
        found = outcome(data[:end])
        if found is not None:
            return found
    return None


class HeaderTests(SynchronousTestCase):
    """What a header says."""

    def test_valid(self) -> None:
        """Of both versions: who the client is, and where the header ends."""
        for data, host, port in VALID:
            expected = ProxyHeader(len(data), host, port)
            self.assertEqual(parse_header(data + b"\x00rest"), expected, data)

    def test_incomplete(self) -> None:
        """Every beginning of a header is one, and nothing else."""
        for data, *_ in VALID:
            for end in range(len(data)):
                self.assertIsNone(parse_header(data[:end]), data[:end])

    def test_invalid(self) -> None:
        """What is none is refused, however it comes."""
        for data in INVALID:
            self.assertRaises(ProxyError, parse_header, data)
            self.assertEqual(byte_by_byte(data), "refused", data)

    def test_refused_early(self) -> None:
        """It is not waited for what cannot become a header any more."""
        for data in (b"\x16", b"PROXx", b"PROXY UNKNOWN".ljust(V1_MOST_BYTES, b"x")):
            self.assertRaises(ProxyError, parse_header, data)
        self.assertRaises(ProxyError, parse_header, V2_START + b"\x33")
        self.assertRaises(ProxyError, parse_header, V2_START + b"\x21\x11\xff\xff")

    def test_texts_hold_nothing_of_it(self) -> None:
        """What the log gets is one of a few texts, without anything of the bytes."""
        texts = set()
        for data in INVALID:
            error = self.assertRaises(ProxyError, parse_header, data)
            texts.add(str(error))
            self.assertNotRegex(str(error), r"192\.0|TCP5|GET")
        self.assertLess(len(texts), 10)

    @given(
        st.one_of(
            st.binary(max_size=300),
            st.binary(max_size=300).map(b"PROXY ".__add__),
            st.binary(max_size=300).map(b"PROXY TCP4 1.2.3.4 ".__add__),
            st.binary(max_size=300).map(V2_START.__add__),
            st.sampled_from([data for data, *_ in VALID[:-1]]),
        ),
        st.binary(max_size=20),
    )
    def test_any_bytes(self, data: bytes, more: bytes) -> None:
        """Whatever comes is a header, refused, or not whole: the same in one chunk or in many."""
        data += more
        self.assertEqual(byte_by_byte(data), outcome(data))


class NetworkTests(SynchronousTestCase):
    """Where headers are believed."""

    def test_within(self) -> None:
        """Networks and single addresses, of both kinds, and an IPv4 address that is written as IPv6."""
        networks = parse_networks("10.0.0.0/8, 192.0.2.7,2001:db8::/32,::1")
        for host in ("10.255.0.1", "192.0.2.7", "2001:db8::9", "::1", "::ffff:10.1.2.3"):
            self.assertTrue(is_within(host, networks), host)
        for host in ("11.0.0.1", "192.0.2.8", "2001:db9::9", "::2", "::ffff:11.1.2.3"):
            self.assertFalse(is_within(host, networks), host)

    def test_scope(self) -> None:
        """The interface that a link-local address is of does not matter."""
        self.assertTrue(is_within("fe80::1%eth0", parse_networks("fe80::/10")))

    def test_no_networks(self) -> None:
        """What is none is named."""
        for text in ("10.0.0.0/33", "10.0.0.1/8", "lb.example", "10.0.0.1,,::1", ""):
            self.assertRaises(ValueError, parse_networks, text)
