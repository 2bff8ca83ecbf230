"""Connects the processes of one run. A single process needs none of this.

JAX's distributed runtime shows all devices to every process. In addition, each process has one
connection to process 0, which sends it the calls to make; see `jinfer.hosts.processes`.
"""

import atexit
import itertools
import secrets
import socket
import time
import warnings
from typing import Any

import jax
from jax._src import distributed as jax_distributed  # its key-value store has no public name

from jinfer.hosts.channel import Connection, NotOfThisRunError, introduce, recognise
from jinfer.hosts.processes import Ending, Follower, Leader

CONNECT_TIMEOUT_S = 300
SHUTDOWN_TIMEOUT_S = 60  # all processes leave together
# Long, since other processes may still be loading; the death of a process ends the wait.
_GATHER_TIMEOUT_S = 24 * 3600
_TOKEN_BYTES = 32

# One per process, for its whole life, like the JAX runtime that it belongs to.
_processes: Leader | Follower | None = None
_gatherings = itertools.count()


def initialize(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    initialization_timeout: int = CONNECT_TIMEOUT_S,
    heartbeat_timeout_seconds: int = 100,
) -> None:
    """Connects the processes of one run. Call it in every process, before anything uses JAX.

    Args:
      coordinator_address: "host:port" of process 0, with a port that is free there.
      num_processes: in the run. On a TPU pod, under Slurm and under Open MPI, the first three
        arguments are known and may be None.
      process_id: of this process, counted from 0.
      initialization_timeout: seconds to wait for the other processes.
      heartbeat_timeout_seconds: a process without a heartbeat for this long counts as dead. A
        process that ends, or whose host vanishes, is noticed sooner.

    Raises:
      ValueError: an argument is out of range, or is missing and cannot be detected.
      RuntimeError: JAX was used before, or not all processes connected in time.
    """
    _check(coordinator_address, num_processes, process_id)
    # Otherwise JAX treats SIGTERM as a preemption notice, and continues.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            coordinator_address,
            num_processes,
            process_id,
            initialization_timeout=initialization_timeout,
            heartbeat_timeout_seconds=heartbeat_timeout_seconds,
            shutdown_timeout_seconds=SHUTDOWN_TIMEOUT_S,
        )
    except ValueError as error:  # an argument that JAX could not detect
        if None not in (coordinator_address, num_processes, process_id):
            raise
        raise ValueError(
            "coordinator_address, num_processes and process_id must be given outside TPU pods, "
            f"Slurm and Open MPI; got coordinator_address={coordinator_address or 'auto'!r}, "
            f"{num_processes=}, {process_id=}. Pass all three."
        ) from error
    _join(initialization_timeout)


def processes() -> Leader | Follower | None:
    """This process's Leader or Follower; None if the run has one process.

    Connects first, if the script called `jax.distributed.initialize` instead of `initialize`.
    """
    if _processes is None and jax.distributed.is_initialized():
        _join(CONNECT_TIMEOUT_S)
    return _processes


def gather(name: str, value: str) -> list[str]:
    """The values of all processes, by process id; waits for all of them.

    Every process must make the same calls in the same order.
    """
    if processes() is None:
        return [value]
    store: Any = jax_distributed.global_state.client
    folder = f"jinfer/{next(_gatherings)} {name}"
    store.key_value_set(f"{folder}/{jax_distributed.global_state.process_id}", value)
    return [
        store.blocking_key_value_get(f"{folder}/{process_id}", 1000 * _GATHER_TIMEOUT_S)
        for process_id in range(jax_distributed.global_state.num_processes)
    ]


def _check(address: str | None, num_processes: int | None, process_id: int | None) -> None:
    if address is not None and not address.rpartition(":")[2].isdecimal():
        raise ValueError(
            f"coordinator_address must be host:port; got {address!r}. "
            "Name the host of process 0 and a port that is free there."
        )
    if num_processes is not None and num_processes < 1:
        raise ValueError(f"num_processes must be 1 or more; got {num_processes}.")
    if process_id is not None and not 0 <= process_id < (num_processes or process_id + 1):
        raise ValueError(
            f"process_id must be in [0, num_processes); got {process_id=} with {num_processes=}. "
            "Number the processes from 0."
        )


def _join(timeout_s: float) -> None:
    global _processes
    state = jax_distributed.global_state
    if state.num_processes == 1:
        return
    assert state.coordinator_address is not None, "initialized without a coordinator"
    host = state.coordinator_address.rpartition(":")[0].strip("[]")
    if state.process_id == 0:
        _processes = _lead(host, state.num_processes, state.client, timeout_s)
    else:
        _processes = _follow(host, state, timeout_s)
    # Exit handlers run last in, first out: this one before JAX's, which waits for all processes.
    atexit.register(_processes.leave)


def _lead(host: str, num_processes: int, store: Any, timeout_s: float) -> Leader:
    token = secrets.token_bytes(_TOKEN_BYTES)
    followers: dict[int, Connection] = {}
    deadline_s = time.monotonic() + timeout_s
    with _listen(host) as server:
        store.key_value_set("jinfer/channel", f"{server.getsockname()[1]} {token.hex()}")
        while missing := set(range(1, num_processes)) - followers.keys():
            server.settimeout(max(0.001, deadline_s - time.monotonic()))
            try:
                sock, address = server.accept()
            except TimeoutError:
                raise RuntimeError(
                    f"every process must connect to process 0 within {timeout_s} s; got none of "
                    f"{sorted(missing)}. Check their output, and the firewalls between the hosts."
                ) from None
            try:
                process_id = recognise(sock, token)
                if process_id not in missing:
                    raise NotOfThisRunError(f"process_id={process_id} is not expected")
            except (NotOfThisRunError, OSError) as error:
                sock.close()
                warnings.warn(f"refused a connection from {address[0]}: {error}", stacklevel=2)
                continue
            followers[process_id] = Connection(sock)
    return Leader(followers, Ending())


def _listen(host: str) -> socket.socket:
    """Listens on loopback if the host is written as loopback, else on all interfaces, like JAX.

    A machine may resolve its own name to a loopback address, which other machines cannot reach.
    """
    if host in ("localhost", "::1") or host.startswith("127."):
        family, _, _, _, address = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0]
        return socket.create_server((address[0], 0), family=family)
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def _follow(host: str, state: Any, timeout_s: float) -> Follower:
    said = state.client.blocking_key_value_get("jinfer/channel", int(1000 * timeout_s))
    port, token = said.split()
    sock = socket.create_connection((host, int(port)), timeout=timeout_s)
    introduce(sock, bytes.fromhex(token), state.process_id)
    return Follower(
        Connection(sock),
        Ending(),
        process_id=state.process_id,
        num_processes=state.num_processes,
    )
