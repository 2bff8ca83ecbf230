import pickle
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from loopback import socket_pair

from jinfer.hosts.channel import Connection, NotOfThisRunError, introduce, pack, recognise

TOKEN = bytes(range(32))


def connected() -> tuple[Connection, Connection]:
    one, other = socket_pair()
    return Connection(one), Connection(other)


def greet(leaders_token: bytes, followers_token: bytes) -> tuple[Any, Any]:
    """What becomes of each side: a value, or the exception that it raised."""
    one, other = socket_pair()
    with ThreadPoolExecutor(2) as pool:
        leading = pool.submit(recognise, one, leaders_token)
        following = pool.submit(introduce, other, followers_token, 7)
        leading.add_done_callback(lambda done: done.exception() and one.close())
        ends = [future.exception() or future.result() for future in (leading, following)]
    one.close()
    other.close()
    return ends[0], ends[1]


def test_messages_arrive_whole_and_in_order() -> None:
    one, other = connected()
    rng = np.random.default_rng(0)
    sent = [
        ("run", 3, None),
        {"i": rng.integers(0, 9, 5, dtype=np.int32), "f": rng.random((3, 4)), "e": np.zeros(0)},
        rng.integers(0, 255, 3_000_000, dtype=np.uint8),  # more than a socket holds
        np.asfortranarray(rng.random((3, 5))),
        np.arange(20)[::2],
        np.int32(7),
    ]
    sending = threading.Thread(target=lambda: [one.send(pack(message)) for message in sent])
    sending.start()
    received = [other.receive() for _ in sent]
    sending.join()
    for want, got in zip(sent, received, strict=True):
        assert pickle.dumps(got) == pickle.dumps(want)
    received[2][:] = 1  # writable, as an array of its own
    one.close()
    other.close()


def test_an_end_is_told_from_a_message() -> None:
    one, other = connected()
    one.send(pack("last"))
    one.close()
    assert other.receive() == "last"
    with pytest.raises(EOFError):
        other.receive()
    other.close()


def test_a_broken_message_is_an_end() -> None:
    one, other = socket_pair()
    one.sendall(pack("half")[:-3])
    one.close()
    connection = Connection(other)
    with pytest.raises(EOFError):
        connection.receive()
    connection.close()


def test_both_sides_recognise_each_other() -> None:
    assert greet(TOKEN, TOKEN) == (7, None)


def test_a_follower_without_the_token_is_refused() -> None:
    leading, following = greet(TOKEN, b"x" * 32)
    assert isinstance(leading, NotOfThisRunError)
    assert isinstance(following, OSError)  # it is sent away


def test_a_leader_without_the_token_is_refused() -> None:
    one, other = socket_pair()
    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(introduce, other, TOKEN, 7)
        one.sendall(bytes(32))
        _, proof = one.recv(36), one.recv(32)
        one.sendall(proof)  # the follower's own, as a mirror would
        assert isinstance(following.exception(), NotOfThisRunError)
    one.close()
    other.close()


def test_nothing_of_a_stranger_is_unpickled(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("unpickled")

    monkeypatch.setattr(pickle, "loads", refuse)
    one, other = socket_pair()
    other.sendall(pack("anything") * 9)
    with pytest.raises(NotOfThisRunError, match="does not know this run's token"):
        recognise(one, TOKEN)
    one.close()
    other.close()


def test_a_silent_stranger_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jinfer.hosts.channel.GREETING_TIMEOUT_S", 0.05)
    one, other = socket_pair()
    with pytest.raises(socket.timeout):
        recognise(one, TOKEN)
    one.close()
    other.close()
