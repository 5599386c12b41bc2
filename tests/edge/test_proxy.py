"""The parser of PROXY headers, for any bytes."""

from __future__ import annotations

import socket
import struct

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from cafeteria_orch.edge.proxy import (
    V1_MAX_BYTES,
    V2_MAX_BYTES,
    V2_START,
    ProxyError,
    ProxyHeader,
    is_within,
    parse_header,
    parse_networks,
)
from tests.support.admission import V1, V2, version_2


def version_2_ipv6(host: str) -> bytes:
    """A header of version 2 that names a client at an IPv6 address."""
    addresses = socket.inet_pton(socket.AF_INET6, host) * 2 + struct.pack("!2H", 1, 2)
    return version_2(0x21, addresses)


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
    (version_2(more=bytes(V2_MAX_BYTES - len(V2))), "192.0.2.7", 56324),
)
"""Headers, each with the client's address and port."""

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
    b"PROXY UNKNOWN " + b"x" * (V1_MAX_BYTES - len(b"PROXY UNKNOWN \r")) + b"\r\n",
    V2_START[:-1] + b"\r" + V2[len(V2_START) :],
    version_2(command=0x22),
    version_2(command=0x11),
    version_2(0x12),
    version_2(0x22, bytes(36)),
    version_2(0x11, bytes(11)),
    version_2(0x21, bytes(35)),
    version_2(0x31, bytes(215)),
    version_2(more=bytes(V2_MAX_BYTES - len(V2) + 1)),
)


def outcome(data: bytes) -> ProxyHeader | str | None:
    """The header in some bytes, ``"refused"``, or ``None`` while they are incomplete."""
    try:
        return parse_header(data)
    except ProxyError:
        return "refused"


def byte_by_byte(data: bytes) -> ProxyHeader | str | None:
    """The first outcome other than ``None`` of bytes that come one at a time."""
    for end in range(len(data) + 1):
        found = outcome(data[:end])
        if found is not None:
            return found
    return None


class HeaderTests(SynchronousTestCase):
    """The parser finds a header, refuses the bytes, or waits for more."""

    def test_a_header_has_an_address_and_an_end(self) -> None:
        """In both versions the parser finds the client's address and the header's size."""
        for data, host, port in VALID:
            expected = ProxyHeader(len(data), host, port)
            self.assertEqual(parse_header(data + b"\x00rest"), expected, data)

    def test_each_prefix_of_a_header_is_incomplete(self) -> None:
        """The parser neither refuses nor accepts a part of a header."""
        for data, *_ in VALID:
            for end in range(len(data)):
                self.assertIsNone(parse_header(data[:end]), data[:end])

    def test_invalid_bytes_are_refused(self) -> None:
        """Bytes that are not a header are refused, in one chunk or in many."""
        for data in INVALID:
            self.assertRaises(ProxyError, parse_header, data)
            self.assertEqual(byte_by_byte(data), "refused", data)

    def test_refusal_comes_with_the_first_wrong_byte(self) -> None:
        """The parser does not wait for more bytes that could not help."""
        for data in (b"\x16", b"PROXx", b"PROXY UNKNOWN".ljust(V1_MAX_BYTES, b"x")):
            self.assertRaises(ProxyError, parse_header, data)
        self.assertRaises(ProxyError, parse_header, V2_START + b"\x33")
        self.assertRaises(ProxyError, parse_header, V2_START + b"\x21\x11\xff\xff")

    def test_error_texts_quote_nothing(self) -> None:
        """The log gets one of a few texts, without any of the peer's bytes."""
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
    def test_splits_do_not_matter(self, data: bytes, more: bytes) -> None:
        """Any bytes have the same outcome in one chunk and byte by byte."""
        data += more
        self.assertEqual(byte_by_byte(data), outcome(data))


class NetworkTests(SynchronousTestCase):
    """The networks of load balancers."""

    def test_networks_contain_addresses(self) -> None:
        """Of both versions of IP, single addresses too, and IPv4 addresses written as IPv6."""
        networks = parse_networks("10.0.0.0/8, 192.0.2.7,2001:db8::/32,::1")
        for host in ("10.255.0.1", "192.0.2.7", "2001:db8::9", "::1", "::ffff:10.1.2.3"):
            self.assertTrue(is_within(host, networks), host)
        for host in ("11.0.0.1", "192.0.2.8", "2001:db9::9", "::2", "::ffff:11.1.2.3"):
            self.assertFalse(is_within(host, networks), host)

    def test_the_zone_of_an_address_does_not_matter(self) -> None:
        """A link-local address matches whatever interface it names."""
        self.assertTrue(is_within("fe80::1%eth0", parse_networks("fe80::/10")))

    def test_an_invalid_network_is_refused(self) -> None:
        """Each part of the list must be a network or an address."""
        for text in ("10.0.0.0/33", "10.0.0.1/8", "lb.example", "10.0.0.1,,::1", ""):
            self.assertRaises(ValueError, parse_networks, text)
