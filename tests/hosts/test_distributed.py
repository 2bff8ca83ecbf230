"""Several processes over loopback give the tokens of one, and none outlives another's death."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_runs import make_engine, random_prompt, run_jobs, tokens_of
from fast_compiles import FAST_COMPILES
from random_checkpoint import write_llama_checkpoint

from jinfer.hosts import distributed
from jinfer.hosts.channel import Connection, introduce
from jinfer.request.params import SamplingParams

PROGRAM = Path(__file__).with_name("one_process.py")
SMALL: dict[str, Any] = {"max_model_len": 64, "page_size": 8, "layer_loop": "scan"}
# Two programs that step, for more sequences than there are slots.
TWO_SLOTS = SMALL | {"max_num_seqs": 2, "max_num_batched_tokens": 2, "num_pages": 17}
TWO_SLOTS |= {"max_decode_steps": 1}
# One program.
ONE_SLOT = TWO_SLOTS | {"max_num_seqs": 1, "max_num_batched_tokens": 1}
# Several decode steps in a dispatch, and so few pages that they go to host memory and back.
CRAMPED = SMALL | {"max_num_seqs": 4, "max_num_batched_tokens": 8, "num_pages": 10}
CRAMPED |= {"max_decode_steps": 2, "kv_offloading_size": 1 / 1024}
MOST_S = 300.0  # to start and answer, on a machine with much else to do
BOUND_S = 30.0  # to notice a death

Running = list[subprocess.Popen[str]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that can be cut in two, three and four."""
    folder = tmp_path_factory.mktemp("model")
    return write_llama_checkpoint(
        folder, seed=1, num_attention_heads=24, num_key_value_heads=12, head_dim=8
    )


def asked_jobs() -> list[tuple[list[int], dict[str, Any]]]:
    """Greedy and drawn; more of them than there are slots, with prompts longer than a step."""
    rng = np.random.default_rng(0)
    common = {"max_tokens": 12, "ignore_eos": True}
    chosen = [
        {"temperature": 0},
        {"temperature": 0.8, "seed": 1, "top_p": 0.9},
        {"temperature": 1.5, "seed": 2},
        {"temperature": 0, "repetition_penalty": 1.2},
        {"temperature": 1, "seed": 3, "top_k": 20},
        {"temperature": 0},
    ]
    return [(random_prompt(rng, 20, 40), common | params) for params in chosen]


@contextmanager
def run(
    model: Path, engine: dict[str, Any], *, num_processes: int, devices_each: int, **asked: Any
) -> Iterator[Running]:
    """The processes of one run, by process id; whatever is left of them is killed in the end."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    asked |= {
        "address": f"127.0.0.1:{port}",
        "num_processes": num_processes,
        "model": str(model),
        "engine": engine | {"tensor_parallel_size": num_processes * devices_each},
        "jobs": asked_jobs(),
    }
    flags = f"{FAST_COMPILES} --xla_force_host_platform_device_count={devices_each}"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # ready in half the time
    started: Running = []
    try:
        for process_id in range(num_processes):
            arguments = [sys.executable, PROGRAM, json.dumps(asked | {"process_id": process_id})]
            pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            started.append(subprocess.Popen(arguments, env=environment, **pipes))
        yield started
    finally:
        for process in started:
            process.kill()
            process.communicate()


def check_same_tokens(
    model: Path, engine: dict[str, Any], *, num_processes: int, devices_each: int, num_engines: int
) -> list[int]:
    """Returns how many pages each engine brought back from host memory."""
    sizes = {"num_processes": num_processes, "devices_each": devices_each}
    with run(model, engine, **sizes, num_engines=num_engines, num_rounds=2) as processes:
        told = [process.communicate(timeout=MOST_S) for process in processes]
    assert [process.returncode for process in processes] == [0] * num_processes, told
    assert all("[[" not in out for out, _ in told[1:])  # the script goes on in process 0 only
    got = [json.loads(line) for line in told[0][0].splitlines() if line.startswith("[[")]
    alone = make_engine(model, **engine)
    jobs = [(prompt_ids, SamplingParams(**chosen)) for prompt_ids, chosen in asked_jobs()]
    want = [tokens_of(output)[0] for output in run_jobs(alone, jobs)]
    alone.close()
    assert got == [want] * 2 * num_engines
    lines = told[0][0].splitlines()
    return [int(line.split()[1]) for line in lines if line.startswith("fetched")]


def test_two_processes_give_the_tokens_of_one(checkpoint: Path) -> None:
    sizes = {"num_processes": 2, "devices_each": 2, "num_engines": 1}
    check_same_tokens(checkpoint, TWO_SLOTS, **sizes)


@pytest.mark.slow
def test_four_processes_give_the_tokens_of_one_twice(checkpoint: Path) -> None:
    sizes = {"num_processes": 4, "devices_each": 1, "num_engines": 2}
    num_fetched = check_same_tokens(checkpoint, CRAMPED, **sizes)
    assert len(num_fetched) == 2 and min(num_fetched) > 0


@pytest.mark.parametrize(("num_processes", "killed"), [(2, 0), (3, 2)], ids=["leader", "follower"])
def test_a_death_ends_the_others(checkpoint: Path, num_processes: int, killed: int) -> None:
    sizes = {"num_processes": num_processes, "devices_each": 1, "num_engines": 1}
    with run(checkpoint, ONE_SLOT, **sizes, num_rounds=1_000_000) as processes:
        wait_until_it_answers(processes)
        processes[killed].send_signal(signal.SIGKILL)
        start_s = time.monotonic()
        survivors = [process for i, process in enumerate(processes) if i != killed]
        told = [process.communicate(timeout=BOUND_S)[1] for process in survivors]
        assert time.monotonic() - start_s < BOUND_S
    for process, stderr in zip(survivors, told, strict=True):
        assert process.returncode != 0
        assert f"jinfer: process {killed} of {num_processes} is gone" in stderr, stderr


def wait_until_it_answers(processes: Sequence[subprocess.Popen[str]]) -> None:
    out = processes[0].stdout
    assert out is not None
    # A start that hangs ends here: a killed process closes its output.
    bound = threading.Timer(MOST_S, lambda: [process.kill() for process in processes])
    bound.start()
    try:
        while not (line := out.readline()).startswith("[["):
            assert line, processes[0].communicate()
    finally:
        bound.cancel()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("host", 2, 0), r"coordinator_address must be host:port; got 'host'\."),
        (("host:1", 0, 0), r"num_processes must be 1 or more; got 0\."),
        (("host:1", 2, 2), r"process_id must be in \[0, num_processes\); got process_id=2 with"),
        (("host:1", 2, -1), r"process_id must be in .* got process_id=-1"),
    ],
)
def test_what_no_run_can_be_is_refused(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        distributed.initialize(*given)


def test_what_nothing_tells_must_be_given(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ValueError("coordinator_address should be defined.")

    # JAX itself would first refuse a process in which it was used.
    monkeypatch.setattr("jax.distributed.initialize", refuse)
    with pytest.raises(
        ValueError, match=r"must be given outside .* got coordinator_address='auto'"
    ):
        distributed.initialize(num_processes=2)


class Store(dict[str, str]):
    """The key-value store of JAX's distributed runtime, as far as process 0 uses it."""

    key_value_set = dict.__setitem__


def test_the_leader_waits_for_all_and_refuses_strangers() -> None:
    store = Store()
    with (
        ThreadPoolExecutor(1) as pool,
        pytest.warns(UserWarning, match="refused a connection from 127.0.0.1: the peer"),
        pytest.warns(UserWarning, match="127.0.0.1: process_id=2 is not expected"),
    ):
        leading = pool.submit(distributed._lead, "localhost", 2, store, 30.0)
        while "jinfer/channel" not in store:
            time.sleep(0.01)
        port, token = store["jinfer/channel"].split()
        with socket.create_connection(("localhost", int(port))) as stranger:
            stranger.sendall(bytes(68))
            while stranger.recv(100):
                pass  # until it is sent away
        with socket.create_connection(("localhost", int(port))) as misnumbered:
            introduce(misnumbered, bytes.fromhex(token), 2)
            assert not misnumbered.recv(1)
        with socket.create_connection(("localhost", int(port))) as sock:
            introduce(sock, bytes.fromhex(token), 1)
            leader = leading.result()
            leader.send("what to do")
            assert Connection(sock).receive() == ("call", "what to do")
            leader.ending.release()
            leader._followers[1].close()


def test_a_follower_that_never_comes_is_named() -> None:
    with pytest.raises(RuntimeError, match=r"within 0.05 s; got none of \[1, 2\]"):
        distributed._lead("127.0.0.1", 3, Store(), 0.05)
