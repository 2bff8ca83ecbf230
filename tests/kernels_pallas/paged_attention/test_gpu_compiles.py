"""paged_attention_gpu compiled ahead of time for H200 and B200, which are not needed.

The compiler comes with the CUDA plugin (`pip install jax-cuda13-plugin jax-cuda13-pjrt`);
without it these are skipped. What is read off a program: the pool is aliased whole, nothing of
its size is temporary; and off the assembler: the architecture, and that no register spills.
"""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from jinfer.bench.chips import describe, no_compilation_cache
from kernels_pallas.paged_attention.gpu import paged_attention_gpu
from kernels_pallas.paged_attention.pages import QuantizedPages

pytestmark = pytest.mark.slow
pytest.importorskip(
    "jax_plugins.xla_cuda13", reason="the GPU compiler is not here; pip install jax-cuda13-plugin"
)
if jax.__version_info__ < (0, 11):
    pytest.skip("paged attention on GPU needs jax >= 0.11", allow_module_level=True)

NUM_LAYERS, NUM_PAGES = 4, 4096
INT8, FP8 = {"pages_dtype": "int8"}, {"pages_dtype": "float8_e4m3fn"}


@dataclass(frozen=True)
class ToldDevice(jax.sharding.AbstractDevice):
    compute_capability: str  # Mosaic compiles for sm_90 where it is not told


def compiled(  # noqa: PLR0913 - what a shape may change
    *,
    num_tokens=32,
    num_rows=32,
    table_width=64,
    num_kv_heads=8,
    group=4,
    head_dim=128,
    page_size=16,
    dtype="bfloat16",
    pages_dtype=None,
    stored_width=None,
    sinks=False,
    scanned=False,
    target="h200",
    **options,
):
    """Compiles one call, or one per layer in a scan; returns it and the pool's bytes."""
    chip, _ = describe(target)
    sharding = jax.sharding.SingleDeviceSharding(chip)

    def shaped(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def one(pages, q_TNH, k_TKH, v_TKH, sinks_N, layer, rows):
        return paged_attention_gpu(
            *(q_TNH, k_TKH, v_TKH, pages, layer, *rows),
            scale=head_dim**-0.5,
            sinks_N=sinks_N if sinks else None,
            **options,
        )

    def all_layers(pages, q_TNH, k_TKH, v_TKH, sinks_N, layer, rows):
        def body(carry, layer):
            q_TNH, pages = carry
            # As in a decoder, a layer's keys depend on the output of the one before.
            k_new_TKH = k_TKH + q_TNH[:, :num_kv_heads]
            out_TNH, pages = one(pages, q_TNH, k_new_TKH, v_TKH, sinks_N, layer, rows)
            return (q_TNH + out_TNH, pages), None

        return lax.scan(body, (q_TNH, pages), jnp.arange(NUM_LAYERS, dtype=jnp.int32))[0]

    per_row = shaped((num_rows,), jnp.int32)
    shape = (NUM_LAYERS, NUM_PAGES, num_kv_heads, page_size, 2 * (stored_width or head_dim))
    pages = shaped(shape, pages_dtype or dtype)
    if pages_dtype:
        scales = shaped((*shape[:3], 2, page_size), jnp.float32)
        pages = QuantizedPages(pages, scales)
    kv_TKH = shaped((num_tokens, num_kv_heads, head_dim), dtype)
    args = (
        pages,
        shaped((num_tokens, num_kv_heads * group, head_dim), dtype),
        *(kv_TKH, kv_TKH),
        shaped((num_kv_heads * group,), jnp.float32),
        shaped((), jnp.int32),
        (shaped((num_rows, table_width), jnp.int32), per_row, per_row, per_row),
    )
    abstract = ToldDevice(
        device_kind=chip.device_kind,
        num_cores=chip.core_count,
        platform="cuda",
        compute_capability=chip.compute_capability,
    )
    mesh = jax.sharding.AbstractMesh((1,), ("tensor",), abstract_device=abstract)
    # What the assembler says is not told of a program that is read.
    with jax.sharding.use_abstract_mesh(mesh), no_compilation_cache():
        program = jax.jit(all_layers if scanned else one, donate_argnums=0).lower(*args).compile()
    return program, sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(pages))


SHAPES = {
    "decode_8b": {},
    "prefill_8b": {"num_tokens": 256, "num_rows": 8},
    "few_rows_long_context": {"num_tokens": 2, "num_rows": 2, "table_width": 512},
    "one_token": {"num_tokens": 1, "num_rows": 1, "table_width": 4},
    "width_64": {"head_dim": 64},
    "width_64_pages_of_64": {"head_dim": 64, "page_size": 64},
    "pages_of_8": {"page_size": 8},
    "pages_of_32": {"page_size": 32},
    "pages_of_64": {"page_size": 64},
    "pages_of_256": {"page_size": 256},
    "group_1": {"group": 1, "num_tokens": 128},
    "group_3": {"group": 3, "num_tokens": 128},
    "group_16_of_1_head": {"group": 16, "num_kv_heads": 1},
    "all_options": {"window": 100, "soft_cap": 30.0, "sinks": True},
    "float16": {"dtype": "float16"},
    "width_96_stored_as_128": {"head_dim": 96, "stored_width": 128},
    "scanned": {"scanned": True},
    "int8": {**INT8, "page_size": 64},
    "int8_prefill": {**INT8, "page_size": 64, "num_tokens": 256, "num_rows": 8},
    "int8_pages_of_32": {**INT8, "page_size": 32},
    "int8_pages_of_256": {**INT8, "page_size": 256},
    "int8_width_64": {**INT8, "page_size": 64, "head_dim": 64},
    "int8_width_96_stored_as_128": {
        **INT8,
        "page_size": 64,
        "head_dim": 96,
        "stored_width": 128,
    },
    "int8_scanned": {**INT8, "page_size": 64, "scanned": True},
    "fp8": {**FP8, "page_size": 64},
    "fp8_width_64": {**FP8, "page_size": 64, "head_dim": 64},
    "fp8_all_options": {**FP8, "page_size": 32, "window": 100, "soft_cap": 30.0, "sinks": True},
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_compiles_without_spills_or_copies(shape, monkeypatch, capfd):
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    program, pool_bytes = compiled(**shape)
    report = "".join(capfd.readouterr())
    assert "'sm_90a'" in report, report
    assert "bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in report, report
    assert "Registers are spilled" not in report, report
    check_memory(program, pool_bytes)


@pytest.mark.parametrize(
    ("shape", "most_spilled"), [({"page_size": 16}, 512), ({**INT8, "page_size": 32}, 208)]
)
def test_width_256_compiles_with_few_spills(shape, most_spilled, monkeypatch, capfd):
    # They cost time and no more; 192 and, since jax 0.12, 204 bytes with int8. One stage instead of
    # two spills as much; products of 32 lanes instead of 64 spill 76 bytes, and read the weights
    # twice as often.
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    program, pool_bytes = compiled(head_dim=256, **shape)
    report = "".join(capfd.readouterr())
    spilled = [int(number) for number in re.findall(r"(\d+) bytes spill stores", report)]
    assert spilled and max(spilled) <= most_spilled, report
    check_memory(program, pool_bytes)


@pytest.mark.parametrize(
    ("shape", "most_spilled"),
    [({"head_dim": 64}, 0), ({}, 320), ({"num_tokens": 256, "num_rows": 8}, 320)]
    + [({**INT8, "page_size": 64}, 640), ({**FP8, "page_size": 32}, 640)],
)
def test_compiles_for_b200(shape, most_spilled):
    # In a process of its own: the first architecture that one compiles for stays.
    code = f"import test_gpu_compiles as t; t.check_memory(*t.compiled(target='b200', **{shape}))"
    finished = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent,
        env={**os.environ, "MOSAIC_GPU_DUMP_PTXAS": "1"},
        capture_output=True,
        text=True,
    )
    report = finished.stdout + finished.stderr
    assert finished.returncode == 0, report
    assert "'sm_100a'" in report, report
    spilled = [int(number) for number in re.findall(r"(\d+) bytes spill stores", report)]
    assert spilled and max(spilled) <= most_spilled, report


def check_memory(program, pool_bytes):
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes >= pool_bytes
    # Queries and outputs laid out in tiles; not a layer of the pool.
    assert memory.temp_size_in_bytes < pool_bytes // NUM_LAYERS // 2
