"""Messages between two processes of one run, which first authenticate each other.

Messages are pickled. A pickle can run any code, so nothing is unpickled before the peer has
proved that it knows the run's token. Later messages are neither encrypted nor signed: the network
between the hosts is trusted, as with JAX's own connections.
"""

import hmac
import pickle
import secrets
import socket
import struct
import threading
from typing import Any

NONCE_BYTES = PROOF_BYTES = 32
GREETING_TIMEOUT_S = 10.0
# A host that vanishes does not close its connection; it counts as gone after about this long.
SILENCE_S = 20

_ALIGNMENT = 64  # bytes; of arrays in a message, so that they can be used without a copy
_COUNT = struct.Struct("<I")
_PROCESS_ID = struct.Struct("<I")


class NotOfThisRunError(Exception):
    """The peer does not know the run's token."""


class Connection:
    """Sends and receives whole messages over a socket with an authenticated peer."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._sending = threading.Lock()
        _find_silence(sock)

    def send(self, packed: bytes) -> None:
        """Sends a message from `pack`. Thread-safe.

        Raises:
          OSError: the peer is gone.
        """
        with self._sending:
            self._socket.sendall(packed)

    def receive(self) -> Any:
        """Waits for the next message.

        Raises:
          EOFError: the peer closed the connection or ended.
          OSError: the connection broke.
        """
        [num_parts] = _COUNT.unpack(self._receive_bytes(_COUNT.size))
        lengths = struct.unpack(f"<{num_parts}Q", self._receive_bytes(8 * num_parts))
        body = memoryview(self._receive_bytes(sum(map(_padded, lengths))))
        parts, start = [], 0
        for length in lengths:
            parts.append(body[start : start + length])
            start += _padded(length)
        return pickle.loads(parts[0], buffers=parts[1:])

    def close(self) -> None:
        """Closes the connection; a thread that waits in `receive` gets an EOFError."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # the peer closed it first
        self._socket.close()

    def _receive_bytes(self, length: int) -> bytearray:
        received = bytearray(length)
        view = memoryview(received)
        while view:
            count = self._socket.recv_into(view)
            if not count:
                raise EOFError("the connection was closed")
            view = view[count:]
        return received


def pack(message: Any) -> bytes:
    """Pickles a message for `Connection.send`: once, for any number of peers."""
    buffers: list[pickle.PickleBuffer] = []
    pickled = pickle.dumps(message, protocol=5, buffer_callback=buffers.append)
    parts = [pickled, *(buffer.raw() for buffer in buffers)]
    packed = [_COUNT.pack(len(parts)), struct.pack(f"<{len(parts)}Q", *map(len, parts))]
    for part in parts:
        packed += [part, bytes(_padded(len(part)) - len(part))]
    return b"".join(packed)


def recognise(sock: socket.socket, token: bytes) -> int:
    """Authenticates a peer, and this process to the peer; returns the peer's process id.

    Raises:
      NotOfThisRunError: the peer does not know the token.
      OSError: the peer is gone, or silent for too long.
    """
    sock.settimeout(GREETING_TIMEOUT_S)
    asked = secrets.token_bytes(NONCE_BYTES)
    sock.sendall(asked)
    introduction = _receive_exactly(sock, _PROCESS_ID.size + NONCE_BYTES)
    if not hmac.compare_digest(
        _receive_exactly(sock, PROOF_BYTES), _proof(token, b"follower", asked, introduction)
    ):
        raise NotOfThisRunError("the peer does not know this run's token")
    sock.sendall(_proof(token, b"leader", asked, introduction))
    sock.settimeout(None)
    return _PROCESS_ID.unpack(introduction[: _PROCESS_ID.size])[0]


def introduce(sock: socket.socket, token: bytes, process_id: int) -> None:
    """The follower's side of `recognise`.

    Raises:
      NotOfThisRunError: the peer does not know the token.
      OSError: the peer is gone, or silent for too long.
    """
    sock.settimeout(GREETING_TIMEOUT_S)
    asked = _receive_exactly(sock, NONCE_BYTES)
    introduction = _PROCESS_ID.pack(process_id) + secrets.token_bytes(NONCE_BYTES)
    sock.sendall(introduction + _proof(token, b"follower", asked, introduction))
    if not hmac.compare_digest(
        _receive_exactly(sock, PROOF_BYTES), _proof(token, b"leader", asked, introduction)
    ):
        raise NotOfThisRunError("the peer does not know this run's token")
    sock.settimeout(None)


def _proof(token: bytes, role: bytes, asked: bytes, introduction: bytes) -> bytes:
    """Signs the role and both sides' random bytes, so that no proof can be reused."""
    return hmac.digest(token, b"jinfer " + role + asked + introduction, "sha256")


def _receive_exactly(sock: socket.socket, length: int) -> bytes:
    received = b""
    while len(received) < length:
        more = sock.recv(length - len(received))
        if not more:
            raise ConnectionResetError("the peer closed the connection before it was recognised")
        received += more
    return received


def _padded(length: int) -> int:
    return -(-length // _ALIGNMENT) * _ALIGNMENT


def _find_silence(sock: socket.socket) -> None:
    """Makes the system probe an idle connection, with the options that this platform has."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    interval_s = SILENCE_S // 4
    for name, value in (
        ("TCP_KEEPIDLE", interval_s),
        ("TCP_KEEPINTVL", interval_s),
        ("TCP_KEEPCNT", 3),
        ("TCP_USER_TIMEOUT", 1000 * SILENCE_S),  # ms that sent bytes may stay unacknowledged
    ):
        option = getattr(socket, name, None)
        if option is not None:
            sock.setsockopt(socket.IPPROTO_TCP, option, value)
