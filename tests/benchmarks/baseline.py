"""The design that this project replaces, which benchmarks compare with: a thread per client.

``python -m tests.benchmarks.baseline`` runs it as a process. It follows its description in the
usual way of such programs, neither tuned nor hampered:

- Each field is read from the blocking socket when it is needed, by a loop around ``recv_into``
  that waits for exactly that many bytes, without a buffer: the programs in the field do so, and
  reach the same speeds. (A loop around ``recv`` would be half as fast again, and
  ``makefile("rb")`` would save most of the system calls as well.)
- A row becomes a dict, a batch an object; missing and unknown columns are refused. (Programs in
  the field make an object of each row too.)
- ``logging`` writes two INFO lines for each batch, as the description shows them.
- An acknowledgement is two writes, the opcode and the length, so that Nagle's algorithm delays
  the second one by 40 ms; ``--one-write`` mends that, since it would hide everything else.
- Nothing is stored.

Unlike its description, it does not wait for its clients after SIGTERM: that would never end.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import socket
import struct
import threading
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any, Protocol, Union

from cafeteria_orch.wire.tables import END_OF_TABLE, TABLES, Table

BATCH_RECV_SUCCESS = 1
BATCH_RECV_FAIL = 2
FINISHED = 3

TABLE_OF_OPCODE = {int(table.opcode): table for table in (*TABLES, END_OF_TABLE)}
STATUS_TEXTS = {0: "Continue", 1: "EOF", 2: "Cancel"}

_log = logging.getLogger(__name__)


class Source(Protocol):
    """A socket, as far as fields are read from it."""

    def recv_into(self, buffer: memoryview, size: int, /) -> int:
        """Put up to ``size`` bytes into a buffer, and return their number; 0 at the end."""


class ProtocolError(Exception):
    """A message that is malformed."""


def recv_exactly(sock: Source, size: int) -> bytes:
    """Read this many bytes, however long it takes.

    :raises EOFError: if the peer closes first.
    """
    data = bytearray(size)
    view = memoryview(data)
    received = 0
    while received < size:
        part = sock.recv_into(view[received:], size - received)
        if not part:
            raise EOFError("the client has closed the connection")
        received += part
    return bytes(data)


class BodyReader:
    """Reads the fields of one message's body from a socket.

    :param length: of the body, in bytes.
    """

    def __init__(self, sock: Source, length: int) -> None:
        self._sock = sock
        self.remaining = length

    def read_bytes(self, size: int) -> bytes:
        """Read some bytes of the body.

        :raises ProtocolError: if it does not have them.
        """
        if not 0 <= size <= self.remaining:
            raise ProtocolError("a length does not match the body's")
        self.remaining -= size
        return recv_exactly(self._sock, size)

    def read_u8(self) -> int:
        """An ``u8``."""
        return self.read_bytes(1)[0]

    def read_i32(self) -> int:
        """An ``i32``."""
        value: int = struct.unpack("<i", self.read_bytes(4))[0]
        return value

    def read_i64(self) -> int:
        """An ``i64``."""
        value: int = struct.unpack("<q", self.read_bytes(8))[0]
        return value

    def read_string(self) -> str:
        """A ``str``: its length and that much UTF-8."""
        return self.read_bytes(self.read_i32()).decode("utf-8")


class TableMessage:
    """A batch of rows.

    :ivar rows: a dict each.
    """

    def __init__(self, table: Table) -> None:
        self.opcode = int(table.opcode)
        self.batch_number = 0
        self.batch_status = 0
        self.rows: list[dict[str, str]] = []
        self._required = frozenset(table.columns) - table.optional
        self._known = frozenset(table.columns)

    @property
    def amount(self) -> int:
        """How many rows there are."""
        return len(self.rows)

    def read_from(self, sock: Source, length: int) -> None:
        """Read the body.

        :raises ProtocolError: if it is malformed.
        """
        reader = BodyReader(sock, length)
        rows = reader.read_i32()
        self.batch_number = reader.read_i64()
        self.batch_status = reader.read_u8()
        for _ in range(rows):
            self.rows.append(self._read_row(reader))
        if reader.remaining:
            raise ProtocolError("there are bytes left over")

    def _read_row(self, reader: BodyReader) -> dict[str, str]:
        row: dict[str, str] = {}
        for _ in range(reader.read_i32()):
            key = reader.read_string()
            row[key] = reader.read_string()
        if not self._required <= row.keys() <= self._known:
            raise ProtocolError("the columns are not the table's")
        return row


class Finished:
    """The client has sent everything."""

    opcode = FINISHED
    agency_id: int | None = None

    def read_from(self, sock: Source, length: int) -> None:
        """Read the body.

        :raises ProtocolError: if it is malformed.
        """
        if length:
            self.agency_id = BodyReader(sock, length).read_i32()


Message = Union[TableMessage, Finished]


def recv_msg(sock: Source) -> Message:
    """Read one message.

    :raises ProtocolError: if it is malformed.
    :raises EOFError: if the peer has closed.
    """
    opcode = recv_exactly(sock, 1)[0]
    length = struct.unpack("<i", recv_exactly(sock, 4))[0]
    message: Message
    if opcode == FINISHED:
        message = Finished()
    elif opcode in TABLE_OF_OPCODE:
        message = TableMessage(TABLE_OF_OPCODE[opcode])
    else:
        raise ProtocolError(f"invalid opcode: {opcode}")
    message.read_from(sock, length)
    return message


class MessageHandler:
    """Answers messages. It has no processors, which are not what is measured.

    :param one_write: whether an answer is one write.
    """

    def __init__(self, *, one_write: bool) -> None:
        self._one_write = one_write

    def handle_message(self, message: Message, sock: socket.socket) -> bool:
        """Log a message and answer it; return whether the connection stays."""
        if isinstance(message, Finished):
            return False
        status = STATUS_TEXTS.get(message.batch_status, f"Unknown({message.batch_status})")
        _log.info(
            "action: data_message_received | opcode: %d | amount: %d | status: %s",
            message.opcode,
            message.amount,
            status,
        )
        self._answer(sock, BATCH_RECV_SUCCESS)
        return True

    def _answer(self, sock: socket.socket, opcode: int) -> None:
        if self._one_write:
            sock.sendall(struct.pack("<Bi", opcode, 0))
        else:
            sock.sendall(struct.pack("<B", opcode))
            sock.sendall(struct.pack("<i", 0))


class ConnectionManager:
    """The listening socket, and a thread for each client."""

    def __init__(self, port: int, listen_backlog: int) -> None:
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind(("127.0.0.1", port))
        self._socket.listen(listen_backlog)
        self.port: int = self._socket.getsockname()[1]
        self.is_stopped = False

    def stop(self) -> None:
        """Accept no more connections."""
        self.is_stopped = True
        self._socket.close()

    def accept_connection(self) -> tuple[socket.socket, str]:
        """Wait for a client; return its socket and address."""
        client, (ip, *_) = self._socket.accept()
        _log.info("action: accept_connections | result: success | ip: %s", ip)
        return client, ip

    def create_client_thread(
        self, client: socket.socket, ip: str, handle_message: Callable[..., bool]
    ) -> None:
        """Serve a client in its own thread."""
        threading.Thread(
            target=self._handle_client_connection,
            args=(client, ip, handle_message),
            daemon=True,
        ).start()

    def _handle_client_connection(
        self, client: socket.socket, ip: str, handle_message: Callable[..., bool]
    ) -> None:
        with client:
            try:
                while not self.is_stopped:
                    message = recv_msg(client)
                    _log.info(
                        "action: receive_message | result: success | ip: %s | opcode: %d",
                        ip,
                        message.opcode,
                    )
                    if not handle_message(message, client):
                        break
            except EOFError:
                pass
            except (ProtocolError, OSError) as error:
                _log.error(
                    "action: receive_message | result: fail | ip: %s | error: %s", ip, error
                )


class ServerManager:
    """The accept loop."""

    def __init__(
        self, port: int, listen_backlog: int, handler: MessageHandler, *, no_delay: bool
    ) -> None:
        self.connections = ConnectionManager(port, listen_backlog)
        self._handler = handler
        self._no_delay = no_delay

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle_signal)
        while not self.connections.is_stopped:
            try:
                client, ip = self.connections.accept_connection()
            except OSError:
                if not self.connections.is_stopped:
                    raise
                break
            if self._no_delay:
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.connections.create_client_thread(client, ip, self._handler.handle_message)
        logging.shutdown()

    def _handle_signal(self, _: int, __: FrameType | None) -> None:
        self.connections.stop()


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the server; its first line of output names the port."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.baseline")
    parser.add_argument("--port", type=int, default=8080, help="0 picks one (default: 8080)")
    parser.add_argument("--log", metavar="FILE", help="log at INFO, to a file; else WARNING")
    parser.add_argument("--one-write", action="store_true", help="send an answer in one piece")
    parser.add_argument("--cpu", type=int, metavar="N", help="run on this core alone")
    options = parser.parse_args(arguments)
    if options.cpu is not None:
        try:
            os.sched_setaffinity(0, {options.cpu})
        except OSError as error:
            parser.error(f"--cpu {options.cpu}: {error.strerror}: name a core of this machine")
    logging_options: dict[str, Any] = {"level": logging.WARNING}
    if options.log:
        logging_options = {"level": logging.INFO, "filename": options.log}
    logging.basicConfig(format="%(asctime)s %(levelname)-8s %(message)s", **logging_options)
    handler = MessageHandler(one_write=options.one_write)
    server = ServerManager(options.port, 128, handler, no_delay=options.one_write)
    print(f"listening on port {server.connections.port}", flush=True)
    server.run()


if __name__ == "__main__":
    main()
