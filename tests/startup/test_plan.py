"""From what the user asked to what was decided."""

import dataclasses
from typing import Any

import jax
import pytest

from jinfer.compile.compiler_options import compiler_options
from jinfer.config import EngineConfig, ModelConfig
from jinfer.parallel.mesh import make_mesh
from jinfer.parallel.sharding import Placement
from jinfer.startup.checks import check_config
from jinfer.startup.defaults import platform_of, resolve_dtype, resolve_layer_loop
from jinfer.startup.memory import check_host_tier, free_device_bytes
from jinfer.startup.plan import resolve_plan
from jinfer.startup.programs import state_shapes

# A token of KV takes 2 * 2 layers * 2 heads * 16 wide = 128 numbers.
MODEL = ModelConfig(
    family="llama",
    vocab_size=128,
    hidden_size=64,
    intermediate_size=96,
    num_layers=2,
    num_q_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_position_embeddings=256,
    rms_norm_eps=1e-5,
    rope_theta=1e4,
)
GIB = 2**30


def plan_of(platform: str = "cpu", free_bytes: int = GIB, **asked: Any):
    config = EngineConfig(model="m", **asked)
    check_config(config)
    return resolve_plan(config, MODEL, platform=platform, free_bytes=free_bytes)


@pytest.mark.parametrize(
    ("platform", "dtype", "loop"),
    [("cpu", "float32", "unrolled"), ("gpu", "bfloat16", "unrolled"), ("tpu", "bfloat16", "scan")],
)
def test_nothing_asked_is_decided_by_platform(platform: str, dtype: str, loop: str) -> None:
    plan = plan_of(platform)
    assert (plan.platform, plan.dtype, plan.layer_loop) == (platform, dtype, loop)
    assert plan.max_model_len == 256
    assert plan.page_bytes == plan.page_size * 128 * (4 if dtype == "float32" else 2)
    assert plan.num_pages == 1 + plan.max_slots * plan.pages_per_slot  # more could not be filled
    assert plan.pages_per_slot * plan.page_size >= plan.max_model_len
    assert plan.token_buckets[-1] == plan.max_step_tokens >= plan.max_slots
    assert plan.max_chunk_tokens == plan.max_step_tokens
    assert plan.kv_capacity == (plan.num_pages - 1) * plan.page_size


def test_the_pool_may_be_given_in_bytes() -> None:
    plan = plan_of(kv_cache_memory_bytes=2**21, max_num_seqs=64, gpu_memory_utilization=0.01)
    assert plan.num_pages == 2**21 // plan.page_bytes


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"kv_cache_memory_bytes": GIB + 1}, "must fit into free memory; got kv_cache_memory_by"),
        ({"kv_cache_memory_bytes": 1000}, "or raise kv_cache_memory_bytes"),
        ({"kv_cache_memory_bytes": GIB // 2, "num_pages": 9}, "num_pages=9 and kv_cache_memory_"),
        ({"kv_cache_memory_bytes": 0}, "kv_cache_memory_bytes must be at least 1; got"),
    ],
)
def test_a_pool_in_bytes_that_cannot_be(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_of(**asked)


@pytest.mark.parametrize(
    ("asked", "kv_dtype"),
    [("int8", "int8"), ("fp8", "float8_e4m3fn"), ("fp8_e4m3", "float8_e4m3fn")],
)
def test_pages_of_8_bits_count_their_scales(asked: str, kv_dtype: str) -> None:
    plan = plan_of(kv_cache_dtype=asked)
    assert (plan.dtype, plan.kv_dtype) == ("float32", kv_dtype)
    # A key or value of 16 numbers takes 16 bytes and a float32.
    assert plan.page_bytes == plan.page_size * 128 * (16 + 4) // 16
    assert plan_of("tpu", kv_cache_dtype=asked).page_size == 128  # whole rows of scales
    assert plan_of("gpu", kv_cache_dtype=asked).page_size == 64  # copies of scales stay aligned
    assert plan_of("tpu", kv_cache_dtype=asked, page_size=32).page_size == 32


def test_heads_are_stored_as_wide_as_the_attention_needs() -> None:
    wide = dataclasses.replace(MODEL, head_dim=96)
    config = EngineConfig(model="m", page_size=8, dtype="bfloat16")
    plans = {
        platform: resolve_plan(config, wide, platform=platform, free_bytes=GIB)
        for platform in ("cpu", "tpu")
    }
    assert (plans["cpu"].attention, plans["cpu"].kv_head_dim) == ("xla", 96)
    assert (plans["tpu"].attention, plans["tpu"].kv_head_dim) == ("tpu", 128)
    hopper = dataclasses.replace(config, attention="gpu")
    assert resolve_plan(hopper, wide, platform="gpu", free_bytes=GIB).kv_head_dim == 128
    assert plans["cpu"].page_bytes == 8 * 2 * 2 * 2 * 96 * 2
    assert plans["tpu"].page_bytes == 8 * 2 * 2 * 2 * 128 * 2
    placement = Placement(make_mesh(jax.devices(), 1))
    assert state_shapes(plans["tpu"], wide, placement).pages.shape[4] == 2 * 128


def test_a_host_tier_smaller_than_a_page_is_refused() -> None:
    with pytest.raises(
        ValueError, match="kv_offloading_size must hold a page, .*; got kv_off.*1e-0"
    ):
        plan_of(kv_offloading_size=1e-9)


def test_a_host_tier_beyond_what_there_is_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jinfer.startup.memory.free_host_bytes", lambda: 100 * GIB)
    for name in ("LIMIT_GB", "PREALLOCATE"):
        monkeypatch.delenv(f"XLA_PJRT_GPU_HOST_MEMORY_{name}", raising=False)

    def check(platform: str, gib: float) -> None:
        check_host_tier(EngineConfig(model="m", kv_offloading_size=gib), platform)

    check("tpu", 99.5)
    check("gpu", 63.5)
    message = r"free memory, 100\.0 GiB; got kv_offloading_size=100\.5\. Lower it"
    for platform in ("cpu", "gpu", "tpu"):
        with pytest.raises(ValueError, match=message):
            check(platform, 100.5)
    with pytest.raises(ValueError, match=r"below the 64 GiB that XLA pins.*got .*=64\. .*LIMIT_GB"):
        check("gpu", 64)
    monkeypatch.setenv("XLA_PJRT_GPU_HOST_MEMORY_PREALLOCATE", "true")
    with pytest.raises(ValueError, match="below the 16 GiB"):
        check("gpu", 20)
    monkeypatch.setenv("XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", "90")
    check("gpu", 80)


def test_what_was_asked_is_kept() -> None:
    plan = plan_of(
        dtype="half", max_model_len=100, max_num_seqs=3, max_num_batched_tokens=24, page_size=8,
        num_pages=14, long_prefill_token_threshold=5, max_logprobs=7, layer_loop="scan",
        attention="xla",
    )  # fmt: skip
    assert (plan.dtype, plan.max_model_len, plan.max_slots, plan.max_step_tokens) == (
        "float16",
        100,
        3,
        24,
    )
    assert (plan.page_size, plan.num_pages, plan.pages_per_slot) == (8, 14, 13)
    assert (plan.max_chunk_tokens, plan.max_logprobs) == (5, 7)
    assert (plan.layer_loop, plan.attention) == ("scan", "xla")


@pytest.mark.parametrize(
    ("platform", "device_kind", "sizes", "rows"),
    [
        # The ridge is at 561 tokens, and 128 slots may decode beside them.
        ("tpu", "TPU v6 lite", (32, 128, 512, 1024), (1, 32, 128)),
        ("tpu", "TPU v5 lite", (32, 128, 256, 512), (1, 32, 128)),
        ("gpu", "NVIDIA H200", (32, 128, 256, 512), (1, 8, 32, 128, 256)),  # 207, and 256 slots
        ("gpu", "NVIDIA H100 80GB HBM3", (32, 128, 256, 512, 1024), (1, 8, 32, 128, 256)),  # 296
        ("gpu", "NVIDIA RTX 9999", (16, *(2**n for n in range(5, 12))), (1, 8, 32, 128, 256)),
        ("cpu", "cpu", (8, 32, 128, 512), (1, 8, 16, 32)),
    ],
)
def test_the_token_budget_is_the_smallest_that_fills_the_chip(
    platform: str, device_kind: str, sizes: tuple[int, ...], rows: tuple[int, ...]
) -> None:
    place = dict(platform=platform, free_bytes=GIB, device_kind=device_kind)
    plan = resolve_plan(EngineConfig(model="m"), MODEL, **place)
    assert plan.token_buckets == sizes
    assert plan.decode_buckets == rows
    assert plan.max_step_tokens == sizes[-1]
    one_step = resolve_plan(EngineConfig(model="m", max_decode_steps=1), MODEL, **place)
    assert {1, one_step.max_slots} <= {*one_step.token_buckets} and not one_step.decode_buckets
    asked = EngineConfig(model="m", max_num_batched_tokens=300)
    assert resolve_plan(asked, MODEL, **place).max_step_tokens == 300


def test_a_step_is_never_smaller_than_the_slots() -> None:
    assert plan_of(max_num_seqs=5000).max_step_tokens == 5000


def test_the_context_is_cut_to_what_fits_where_nothing_was_asked() -> None:
    scratch = dict(max_num_seqs=1, max_num_batched_tokens=8)
    tokens_that_fit = plan_of(free_bytes=200_000, **scratch).max_model_len
    assert 16 <= tokens_that_fit < 256
    with pytest.raises(ValueError, match=f"longest context that fits is {tokens_that_fit} tokens"):
        plan_of(free_bytes=200_000, max_model_len=256, **scratch)


def test_twice_the_share_is_twice_the_pages() -> None:
    sizes = dict(free_bytes=30_000_000, max_num_seqs=512, max_num_batched_tokens=512)
    half, whole = (
        plan_of("gpu", gpu_memory_utilization=shard, **sizes).num_pages for shard in (0.5, 1.0)
    )
    scratch_pages = (9 * 512 * 128 + 4 * 512 * (64 + 2 * 96)) * 4 // 4096
    assert whole + scratch_pages == pytest.approx(2 * (half + scratch_pages), rel=0.01)


def test_no_room_at_all_is_told_without_negative_numbers() -> None:
    with pytest.raises(
        ValueError, match=r"got 0.000 GiB free. The longest context that fits is 0 "
    ):
        plan_of(free_bytes=1000)


@pytest.mark.parametrize(
    ("spelled", "meant"),
    [("auto", "float32"), ("float", "float32"), ("half", "float16"), ("bfloat16", "bfloat16")],
)
def test_every_spelling_of_a_dtype(spelled: str, meant: str) -> None:
    assert resolve_dtype(EngineConfig(model="m", dtype=spelled), "cpu") == meant


def test_the_layer_loop_may_be_chosen() -> None:
    assert resolve_layer_loop(EngineConfig(model="m", layer_loop="scan"), "cpu") == "scan"


def test_max_logprobs_is_no_wider_than_the_vocabulary() -> None:
    assert plan_of(max_logprobs=100).max_logprobs == 100
    narrow = EngineConfig(model="m", max_logprobs=100)
    small = dataclasses.replace(MODEL, vocab_size=50)
    assert resolve_plan(narrow, small, platform="cpu", free_bytes=GIB).max_logprobs == 50


class Device:
    """As much of jax.Device as start-up asks."""

    def __init__(self, platform: str, stats: dict[str, int] | None = None) -> None:
        self.platform, self._stats = platform, stats

    def memory_stats(self) -> dict[str, int] | None:
        return self._stats


@pytest.mark.parametrize(("gib", "num_pages"), [(None, 0), (0, 0), (0.5, 2**29)])
def test_host_memory_is_counted_in_pages(gib: float | None, num_pages: int) -> None:
    plan = plan_of(kv_offloading_size=gib)
    assert plan.num_host_pages == num_pages // plan.page_bytes


def test_platforms_by_their_names() -> None:
    names: Any = [Device(name) for name in ("cpu", "cuda", "rocm", "gpu", "tpu")]
    assert [platform_of(device) for device in names] == ["cpu", "gpu", "gpu", "gpu", "tpu"]
    metal: Any = Device("metal")
    with pytest.raises(NotImplementedError, match="runs on cpu, gpu and tpu; got platform='metal'"):
        platform_of(metal)


def test_free_memory_is_what_nobody_holds() -> None:
    gpu: Any = Device("gpu", {"bytes_limit": 1000, "bytes_in_use": 300})
    assert free_device_bytes(gpu) == 700
    cpu: Any = Device("cpu")
    assert 2**20 < free_device_bytes(cpu) < 2**50


def test_small_models_on_cpus_compile_quickly_unless_told_otherwise() -> None:
    assert plan_of().quick_compile
    assert not plan_of(enforce_eager=False).quick_compile
    assert not plan_of("gpu").quick_compile
    assert plan_of("gpu", enforce_eager=True).quick_compile
    large = dataclasses.replace(MODEL, vocab_size=400_000)
    config = EngineConfig(model="m")
    assert not resolve_plan(config, large, platform="cpu", free_bytes=GIB).quick_compile


def test_quick_compiling_changes_options_on_cpus_and_gpus() -> None:
    assert ("xla_backend_optimization_level", "0") in compiler_options("cpu", quick=True)
    assert compiler_options("cpu") == ()
    assert set(compiler_options("gpu", quick=True)) - set(compiler_options("gpu")) == {
        ("xla_gpu_autotune_level", "0")
    }
