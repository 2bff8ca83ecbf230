"""Several processes over loopback give the tokens of one, and none outlives another's death."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_runs import make_engine, random_prompt, run_jobs, tokens_of
from random_checkpoint import write_llama_checkpoint

from jinfer.request.params import SamplingParams

PROGRAM = Path(__file__).with_name("one_process.py")
# The few programs of an engine that is ready soon.
ENGINE: dict[str, Any] = {
    "max_num_seqs": 4,
    "max_num_batched_tokens": 8,
    "max_decode_steps": 2,
    "max_model_len": 64,
    "num_pages": 33,
    "page_size": 8,
    "layer_loop": "scan",
}
MOST_S = 240.0  # to start and answer, on a machine with much else to do
BOUND_S = 30.0  # to notice a death

Running = list[subprocess.Popen[str]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that can be cut in two, three, four and eight."""
    folder = tmp_path_factory.mktemp("model")
    return write_llama_checkpoint(
        folder, seed=1, num_attention_heads=24, num_key_value_heads=12, head_dim=8
    )


def asked_jobs() -> list[tuple[list[int], dict[str, Any]]]:
    """Greedy and drawn; more of them than there are slots, one longer than a step."""
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
    return [(random_prompt(rng, 3, 30), common | params) for params in chosen]


@contextmanager
def run(
    model: Path, *, num_processes: int, devices_each: int, jobs: Any, forever: bool = False
) -> Iterator[Running]:
    """The processes of one run, by process id; whatever is left of them is killed in the end."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    asked = {
        "address": f"127.0.0.1:{port}",
        "num_processes": num_processes,
        "model": str(model),
        "engine": ENGINE | {"tensor_parallel_size": num_processes * devices_each},
        "jobs": jobs,
        "forever": forever,
    }
    flags = f"--xla_force_host_platform_device_count={devices_each}"
    started: Running = []
    try:
        for process_id in range(num_processes):
            arguments = [sys.executable, PROGRAM, json.dumps(asked | {"process_id": process_id})]
            started.append(
                subprocess.Popen(
                    arguments,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                    env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
                )
            )
        yield started
    finally:
        for process in started:
            process.kill()
            process.communicate()


def check_same_tokens(checkpoint: Path, *, num_processes: int, devices_each: int) -> None:
    jobs = asked_jobs()
    with run(
        checkpoint, num_processes=num_processes, devices_each=devices_each, jobs=jobs
    ) as processes:
        told = [process.communicate(timeout=MOST_S) for process in processes]
    assert [process.returncode for process in processes] == [0] * num_processes, told
    [line] = [line for line in told[0][0].splitlines() if line.startswith("[[")]
    assert all("[[" not in out for out, _ in told[1:])  # the script goes on in process 0 only
    alone = make_engine(checkpoint, **ENGINE)
    want = run_jobs(alone, [(prompt_ids, SamplingParams(**chosen)) for prompt_ids, chosen in jobs])
    alone.close()
    assert json.loads(line) == [tokens_of(output)[0] for output in want]


def test_two_processes_give_the_tokens_of_one(checkpoint: Path) -> None:
    check_same_tokens(checkpoint, num_processes=2, devices_each=2)


@pytest.mark.slow
def test_four_processes_give_the_tokens_of_one(checkpoint: Path) -> None:
    check_same_tokens(checkpoint, num_processes=4, devices_each=1)


@pytest.mark.parametrize(("num_processes", "killed"), [(2, 0), (3, 2)], ids=["leader", "follower"])
def test_a_death_ends_the_others(checkpoint: Path, num_processes: int, killed: int) -> None:
    with run(
        checkpoint, num_processes=num_processes, devices_each=1, jobs=asked_jobs(), forever=True
    ) as processes:
        wait_until_it_answers(processes)
        processes[killed].send_signal(signal.SIGKILL)
        start_s = time.monotonic()
        survivors = [process for i, process in enumerate(processes) if i != killed]
        told = [process.communicate(timeout=BOUND_S)[1] for process in survivors]
        assert time.monotonic() - start_s < BOUND_S
    for process, stderr in zip(survivors, told, strict=True):
        assert process.returncode != 0
        assert f"jinfer: process {killed} of {num_processes} is gone" in stderr
        assert "Traceback" not in stderr.split("jinfer: process")[0], stderr  # the cause is first


def wait_until_it_answers(processes: Sequence[subprocess.Popen[str]]) -> None:
    out = processes[0].stdout
    assert out is not None
    while not (line := out.readline()).startswith("[["):
        assert line, processes[0].communicate()
