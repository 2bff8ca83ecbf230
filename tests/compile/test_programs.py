"""Programs compile ahead of time; whatever compiles later is noticed."""

import gc
import os
import re
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import CancelledError
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from aot_programs import LLAMA_3_8B, programs_for

from jinfer.compile.compiler_options import compiler_options
from jinfer.compile.programs import CompileGuard, Compiling, Program
from jinfer.config import EngineConfig
from jinfer.startup.plan import resolve_plan

TINY = replace(
    LLAMA_3_8B,
    vocab_size=128,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_q_heads=4,
    num_kv_heads=2,
    head_dim=8,
)
VECTOR_4 = jax.ShapeDtypeStruct((4,), jnp.float32)


@pytest.fixture(params=["warn", "error"])
def guard(request: pytest.FixtureRequest) -> Iterator[CompileGuard]:
    guard = CompileGuard(request.param)
    yield guard
    guard.close()


def compile_something() -> None:
    jax.jit(lambda a: a * 2.0 + 1.0).lower(VECTOR_4).compile()


def test_every_program_is_compiled_under_its_name() -> None:
    done: list[str] = []
    programs = [
        Program(name=f"add {i}", function=lambda a, i=i: a + i, shapes=(VECTOR_4,), donate=())
        for i in range(3)
    ]
    with Compiling(programs, on_done=done.append) as compiling:
        compiled, report = compiling.result()
    assert sorted(done) == sorted(compiled) == sorted(report.program_s)
    assert sorted(done) == ["add 0", "add 1", "add 2"]
    assert report.elapsed_s >= max(report.program_s.values()) > 0.0
    for i in range(3):
        np.testing.assert_array_equal(compiled[f"add {i}"](np.zeros(4, np.float32)), [i] * 4)


def test_a_donated_argument_is_consumed() -> None:
    program = Program(name="p", function=lambda a: a + 1, shapes=(VECTOR_4,), donate=(0,))
    given = jnp.zeros(4)
    given.block_until_ready()
    program.compile()(given)
    assert given.is_deleted()


@pytest.mark.parametrize(
    ("flags", "disabled", "autotuner"),
    [
        ("", "rematerialization", "False"),
        ("--xla_disable_hlo_passes=dce,cse --xla_a=1", "dce,cse,rematerialization", "False"),
        (
            "--xla_disable_hlo_passes=dce --xla_disable_hlo_passes=cse",
            "cse,rematerialization",
            "False",
        ),
        ("--xla_gpu_experimental_enable_fusion_autotuner=true", "rematerialization", None),
    ],
)
def test_what_the_user_asks_of_xla_stays_so(
    flags: str, disabled: str, autotuner: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XLA_FLAGS", flags)
    options = dict(compiler_options("gpu"))
    assert options.pop("xla_disable_hlo_passes") == disabled
    assert options.pop("xla_gpu_experimental_enable_fusion_autotuner", None) == autotuner
    assert not options
    assert compiler_options("cpu") == compiler_options("tpu") == ()


def test_several_passes_are_left_out_and_nothing_stays_behind() -> None:
    def turned(a):
        return a[::-1][::-1] + a[::-1][::-1]

    def num_reversed(*options: tuple[str, str]) -> int:
        program = Program(
            name="p", function=turned, shapes=(VECTOR_4,), donate=(), compiler_options=options
        )
        return (program.compile().as_text() or "").count(" reverse(")

    gc.collect()
    live = jax.devices()[0].client.live_executables
    num_live = len(live())
    assert num_reversed() == 0
    # A simplifier of any name would take them out; a list is read as several names.
    assert num_reversed(("xla_disable_hlo_passes", "algsimp,rematerialization")) > 0
    gc.collect()
    assert len(live()) <= num_live


def test_an_error_while_compiling_is_raised() -> None:
    def broken(a):
        raise ValueError("no such program")

    with Compiling([Program(name="p", function=broken, shapes=(VECTOR_4,), donate=())]) as all_:
        with pytest.raises(ValueError, match="no such program"):
            all_.result()


def test_leaving_early_begins_no_further_program() -> None:
    begun, may_end = threading.Event(), threading.Event()
    done: list[str] = []

    def slow(a):
        begun.set()
        assert may_end.wait(timeout=60)
        return a

    programs = [
        Program(name=f"{i}", function=lambda a: slow(a), shapes=(VECTOR_4,), donate=())
        for i in range(os.cpu_count() or 1)
    ]
    programs.append(Program(name="last", function=lambda a: a, shapes=(VECTOR_4,), donate=()))
    with Compiling(programs, on_done=done.append) as compiling:
        assert begun.wait(timeout=60)
    may_end.set()
    with pytest.raises(CancelledError):
        compiling.result()
    assert "last" not in done


def test_a_late_compilation_is_told(guard: CompileGuard) -> None:
    message = "nothing may compile after warm-up; got 1 compilations in one step"
    told = pytest.warns(UserWarning, match=message)
    if guard._action == "error":
        told = pytest.raises(RuntimeError, match=message)
    with told, guard.watch():
        compile_something()
    assert guard.num_late == 1


def test_compiling_outside_or_elsewhere_is_not_late(guard: CompileGuard) -> None:
    compile_something()
    with guard.watch():
        thread = threading.Thread(target=compile_something)
        thread.start()
        thread.join()
    assert guard.num_late == 0


def test_an_error_inside_comes_before_a_late_compilation(guard: CompileGuard) -> None:
    with pytest.raises(ZeroDivisionError), guard.watch():
        compile_something()
        _ = 1 / 0


def test_a_closed_guard_hears_nothing() -> None:
    guard = CompileGuard("error")
    guard.close()
    with warnings.catch_warnings(), guard.watch():
        compile_something()
    assert guard.num_late == 0


def test_an_unknown_action_is_refused() -> None:
    with pytest.raises(ValueError, match="late_compile must be 'warn' or 'error'; got 'ignore'"):
        CompileGuard("ignore")


def test_programs_and_the_parts_of_a_step_have_names_in_profiles() -> None:
    plan = resolve_plan(
        EngineConfig(model="-", max_num_seqs=4, max_num_batched_tokens=16),
        TINY,
        platform="cpu",
        free_bytes=1 << 24,
    )
    programs = {program.name: program for program in programs_for(jax.devices()[:1], TINY, plan)}
    step = programs["step of 16 tokens"].lower().as_text(debug_info=True)
    decode = programs["decode of 4 rows"].lower().as_text(debug_info=True)
    assert "@jit_step_of_16_tokens" in step and "@jit_decode_of_4_rows" in decode
    parts = "embed", "attention", "paged_attention", "mlp", "logits", "sample", "logprobs"
    for part in parts:
        assert re.search(f'["/]{part}/', step) and re.search(f'["/]{part}/', decode), part
