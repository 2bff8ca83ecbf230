"""Programs are found by what they are made from, and a store that fails costs compilations only."""

import errno
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engine_runs import random_prompt, run_jobs, tokens_of
from jax.experimental.compilation_cache import compilation_cache
from random_checkpoint import write_llama_checkpoint

from jinfer.bench.compile_log import CompileLog
from jinfer.compile import program_key, program_store
from jinfer.compile.program_key import Surroundings, surroundings
from jinfer.compile.program_store import ProgramStore, open_store
from jinfer.compile.programs import CompileReport, Compiling, Program
from jinfer.config import EngineConfig
from jinfer.engine.engine import Engine
from jinfer.engine.replicas import Replicas
from jinfer.request.params import SamplingParams
from jinfer.runner.model_runner import ModelRunner

VECTOR_4 = jax.ShapeDtypeStruct((4,), jnp.float32)
SIZES: dict[str, Any] = {"max_num_seqs": 2, "max_num_batched_tokens": 4, "max_decode_steps": 1}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache of its own for each test, and engines with the store that conftest.py takes away."""
    monkeypatch.setattr("jinfer.startup.load.open_store", open_store)
    before = jax.config.values["jax_compilation_cache_dir"]
    use_folder(str(tmp_path / "xla"))
    yield tmp_path / "xla" / "programs"
    use_folder(before)


def use_folder(folder: str | None) -> None:
    jax.config.update("jax_compilation_cache_dir", folder)
    compilation_cache.reset_cache()


@contextmanager
def flag_set(name: str, value: Any) -> Iterator[None]:
    before = jax.config.values[name]
    jax.config.update(name, value)
    try:
        yield
    finally:
        jax.config.update(name, before)


def tan_3(a):
    return jnp.tan(a) * 3.0


def start(function: Any = tan_3, *, has_store: bool = True, **changed: Any) -> CompileReport:
    """Compiles or loads one program, whose answer is checked."""
    described = {"name": "p", "shapes": (VECTOR_4,), "donate": (0,), "made_from": "a plan"}
    program = Program(function=function, **{**described, **changed})
    store = open_store(jax.devices()[:1]) if has_store else None
    with Compiling([program], store=store) as compiling:
        compiled, report = compiling.result()
    given = jnp.arange(4.0)
    want = np.asarray(jax.jit(function)(given))
    np.testing.assert_array_equal(compiled[program.name](given), want)
    assert given.is_deleted() == (program.donate == (0,))
    return report


def refuse_to_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Program, "lower", lambda self: pytest.fail(f"{self.name} was traced"))


def engine_for(model: Path, folder: Path, **settings: Any) -> Engine | Replicas:
    config = EngineConfig(
        model=model,
        skip_tokenizer_init=True,
        progress=False,
        late_compile="error",
        compilation_cache=folder.parent,
        **{**SIZES, **settings},
    )
    return Replicas(config) if config.data_parallel_size > 1 else Engine(config)


@pytest.mark.parametrize(
    "settings",
    [
        {"kv_offloading_size": 0.001, "max_decode_steps": 4},
        {"tensor_parallel_size": 4, "kv_cache_dtype": "int8"},
        {"data_parallel_size": 2, "tensor_parallel_size": 2},
    ],
    ids=["one device", "mesh", "replicas"],
)
def test_an_engine_from_the_store_answers_like_one_that_compiled(
    settings: dict[str, Any], tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_llama_checkpoint(tmp_path / "model", seed=4, num_hidden_layers=1)
    rng = np.random.default_rng(2)
    jobs = [
        (random_prompt(rng, 1, 30), SamplingParams(max_tokens=9, seed=number, top_p=0.9))
        for number in range(6)
    ]
    tokens = []
    for is_warm in (False, True):
        if is_warm:
            refuse_to_compile(monkeypatch)
            jax.clear_caches()
        engine = engine_for(model, folder, **settings)
        runners = [one.runner for one in getattr(engine, "engines", [engine])]
        pages = [runner.pages for runner in runners if isinstance(runner, ModelRunner)]
        tokens.append([tokens_of(output) for output in run_jobs(engine, jobs)])
        assert len(pages) == len(runners)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(pages))  # donated, not copied
        engine.close()
    assert tokens[0] == tokens[1]


def test_another_program_is_not_found() -> None:
    assert start().num_cache_hits == 0
    assert start().num_untraced == 1
    held = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    for changed in (
        {"name": "q"},
        {"donate": ()},
        {"compiler_options": (("xla_disable_hlo_passes", "rematerialization"),)},
        {"shapes": (jax.ShapeDtypeStruct((4,), jnp.float32, sharding=held),)},
    ):
        assert start(**changed).num_untraced == 0
    assert start(lambda a: a * 2.0, made_from=None).num_cache_hits == 0
    assert start(lambda a: a * 4.0, made_from=None).num_cache_hits == 0  # never stored


def test_an_edit_that_changes_no_program_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    start()
    monkeypatch.setattr(program_key, "_SOURCES", "edited")
    monkeypatch.setattr(program_key, "sources_digest", lambda: "edited")
    for num_untraced in (0, 1):
        report = start()
        assert (report.num_cache_hits, report.num_untraced) == (1, num_untraced)
    report = start(lambda a: jnp.tan(a) * 4.0, made_from="what it changed")
    assert report.num_cache_hits == 0


def test_programs_that_use_other_arguments_are_told_apart() -> None:
    # What is lowered has one argument, whichever it is.
    shapes = ({"a": VECTOR_4, "b": VECTOR_4},)
    given = ({"a": np.zeros(4, np.float32), "b": np.ones(4, np.float32)},)
    for used in "ab":
        program = Program(
            name="p",
            function=lambda t, used=used: t[used] + 1,
            shapes=shapes,
            donate=(),
            made_from=used,
        )
        with Compiling([program], store=open_store(jax.devices()[:1])) as compiling:
            compiled, report = compiling.result()
        assert report.num_cache_hits == 0
        np.testing.assert_array_equal(compiled["p"](*given), given[0][used] + 1)


def test_a_program_whose_arguments_are_not_known_is_not_kept(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program_key, "kept_arguments", lambda lowered: None)
    assert start().num_cache_hits == 0
    assert not list(folder.glob("*.program"))


def test_surroundings_name_what_a_program_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = jax.devices()
    told = [surroundings(devices[:1]), surroundings(devices[1:2]), surroundings(devices[:2])]
    with flag_set("jax_explain_cache_misses", True):
        assert surroundings(devices[:1]) == told[0]
    with monkeypatch.context() as patch:
        patch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"] + " --xla_cpu_use_thunk_runtime=true")
        told.append(surroundings(devices[:1]))
    with flag_set("jax_default_matmul_precision", "highest"):
        told.append(surroundings(devices[:1]))
    with monkeypatch.context() as patch:
        patch.setattr(program_key, "_SOURCES", "1" * 64)
        patch.setattr(program_key, "sources_digest", lambda: "1" * 64)
        told.append(surroundings(devices[:1]))
    assert None not in told and len(set(told)) == len(told)
    assert surroundings(devices[:1]) == told[0]


TELL_OPTIONS = """
import os, sys, jax
jax.numpy.ones(2).block_until_ready()
os.environ["XLA_FLAGS"] = sys.argv[1]
from kernels_pallas.compat import compile_options
print(compile_options())
"""


def test_flags_are_told_as_xla_understood_them() -> None:
    """XLA reads its flags once: those that are set too late are in no program."""
    fast = "--xla_cpu_enable_fast_math=true"

    def options(early: str, late: str) -> str:
        command = [sys.executable, "-c", TELL_OPTIONS, late]
        environment = {**os.environ, "XLA_FLAGS": early}
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, check=True
        ).stdout

    assert options("", fast) == options("", "") != options(fast, fast)


def test_the_digest_is_of_every_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "kernels"
    (package / "op").mkdir(parents=True)
    monkeypatch.setattr(program_key.kernels_pallas, "__path__", [str(package)])
    assert program_key.sources_digest() is None  # without sources
    digests = set()
    for name, text in (("a.py", "x = 1"), ("op/b.py", "x = 1"), ("op/b.py", "x = 2")):
        (package / name).write_text(text)
        digests.add(program_key.sources_digest())
    assert None not in digests and len(digests) == 3


def test_without_a_place_or_certainty_there_is_no_store(monkeypatch: pytest.MonkeyPatch) -> None:
    assert open_store(jax.devices()) is not None
    with monkeypatch.context() as patch:
        patch.setattr(jax, "process_count", lambda: 2)
        assert open_store(jax.devices()) is None
    with monkeypatch.context() as patch:  # edited while this process runs
        patch.setattr(program_key, "sources_digest", lambda: "another")
        assert open_store(jax.devices()) is None
    for flag, value in (
        ("jax_enable_compilation_cache", False),
        ("jax_compilation_cache_dir", None),
        ("jax_compilation_cache_dir", "gs://bucket/xla"),
    ):
        with flag_set(flag, value):
            assert open_store(jax.devices()) is None


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "refused"])
def test_a_damaged_program_is_told_compiled_and_replaced(
    damage: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start()
    (path,) = folder.glob("*.program")
    whole = path.read_bytes()
    half = len(whole) // 2
    flipped = whole[:half] + bytes([whole[half] ^ 1]) + whole[half + 1 :]
    path.write_bytes({"cut": whole[:half], "flipped": flipped, "empty": b""}.get(damage, whole))
    reason = "it is damaged"

    def refused(*_: Any) -> None:
        raise jax.errors.JaxRuntimeError("made for another chip.\nat some line")

    with monkeypatch.context() as patch:
        if damage == "refused":
            reason = "made for another chip"
            patch.setattr(program_store, "deserialize_and_load", refused)
        with pytest.warns(UserWarning, match=rf"compiled again; got '.*{path.name}': {reason}\.$"):
            assert start().num_untraced == 0
    assert start().num_untraced == 1


def test_a_full_disk_is_told_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, content: bytes) -> None:
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    programs = [
        Program(name=name, function=lambda a: a + 1, shapes=(VECTOR_4,), donate=(), made_from="")
        for name in "abc"
    ]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with Compiling(programs, store=open_store(jax.devices())) as compiling:
            compiling.result()
    assert len(told) == 1
    assert "a compiled program is not kept; got" in str(told[0].message)
    assert "No space left on device. The next start compiles it again." in str(told[0].message)
    assert list(folder.iterdir()) == []


def test_a_program_that_calls_python_is_not_kept(folder: Path) -> None:
    def calls(a):
        return jax.pure_callback(np.tan, VECTOR_4, a)

    with pytest.warns(UserWarning, match="a compiled program is not kept; got"):
        assert start(calls, donate=()).num_untraced == 0
    assert not folder.exists()


def test_what_was_not_used_for_long_is_removed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start()
    ours = set(folder.iterdir())
    assert {path.suffix for path in ours} == {".name", ".program"}
    for name, age_days in (("a.program", 29), ("b.program", 31), ("c.unfinished", 0.1), ("d", 31)):
        (folder / name).write_bytes(bytes(1000))
        then = time.time() - 24 * 3600 * age_days
        os.utime(folder / name, (then, then))
    then = time.time() - 24 * 3600 * 29
    for path in ours:
        os.utime(path, (then, then))
    assert start().num_untraced == 1  # which counts as use
    assert all(path.stat().st_mtime > then + 24 * 3600 for path in ours)
    start(lambda a: a - 1.0, made_from="another plan")
    found = set(folder.iterdir())
    assert {*ours, folder / "a.program", folder / "d"} < found and len(found) == 6
    num_bytes = sum(path.stat().st_size for path in found - {folder / "a.program", folder / "d"})
    monkeypatch.setattr(program_store, "_KEPT_BYTES", num_bytes + 500)
    program_store.remove_unused(folder)
    assert set(folder.iterdir()) == found - {folder / "a.program"}


def test_a_program_that_jax_read_is_not_stored(folder: Path) -> None:
    # Taken apart again, it would load and then miss a function when it runs.
    start(has_store=False)
    for _ in range(2):
        report = start()
        assert (report.num_cache_hits, report.num_untraced) == (1, 0)
        assert not folder.exists()


def test_what_the_store_keeps_jax_does_not(folder: Path) -> None:
    start()
    assert not [path for path in folder.parent.glob("*tan_3*") if "-cache" in path.name]


def test_programs_from_the_store_are_counted() -> None:
    log = CompileLog()
    start()
    before = log.figures()
    report = start()
    assert (report.num_cache_hits, report.num_untraced) == (1, 1)
    assert "0 programs compiled and 1 from the cache" in str(report) and report.slowest == "p"
    assert log.figures()["num_read"] >= before["num_read"] + 1


def test_a_folder_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    store = ProgramStore(tmp_path, jax.devices(), Surroundings("here", "now"))
    store._name("p").mkdir()
    with pytest.warns(UserWarning, match="a stored program is compiled again; got .*directory"):
        assert store.load("p") is None
