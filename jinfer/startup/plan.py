"""From an EngineConfig to an EnginePlan: decides everything that the user left open."""

from jinfer.config import EngineConfig, EnginePlan, ModelConfig
from jinfer.parallel.model_shards import chip_shard, padded_model
from jinfer.schedule.capacity import plan_pages, row_buckets, token_buckets
from jinfer.startup.chips import chip_of
from jinfer.startup.defaults import (
    DEFAULTS,
    KV_DTYPES,
    default_page_size,
    default_step_tokens,
    resolve_dtype,
    resolve_layer_loop,
)
from jinfer.startup.memory import scratch_bytes
from jinfer.step.attention import default_attention, stored_head_dim
from jinfer.step.kv_cache import page_bytes
from jinfer.step.page_moves import GROUPS_AT_ONCE, PAGES_PER_MOVE

# Below this number of parameters, a CPU compiles longer than most users then generate.
SMALL_MODEL = 20_000_000


def resolve_plan(
    config: EngineConfig,
    model: ModelConfig,
    *,
    platform: str,
    free_bytes: int,
    device_kind: str = "",
) -> EnginePlan:
    """Decides everything that the user left open.

    Args:
      config: the user's arguments.
      model: the checkpoint's configuration.
      platform: "cpu", "gpu" or "tpu".
      free_bytes: memory of each device that is free once the weights are in place.
      device_kind: the chip, as `jax.Device.device_kind` names it.

    Raises:
      ValueError: an argument is out of range, the model cannot be sharded evenly, or the KV cache
        does not fit.
    """
    defaults = DEFAULTS[platform]
    dtype = resolve_dtype(config, platform)
    padded = padded_model(model, config.tensor_parallel_size)
    shard = chip_shard(padded, config.tensor_parallel_size)
    max_slots = config.max_num_seqs or defaults.max_slots
    max_step_tokens = config.max_num_batched_tokens or default_step_tokens(
        platform, device_kind, max_slots
    )
    chip = chip_of(device_kind)
    max_decode_steps = config.max_decode_steps or defaults.max_decode_steps
    kv_dtype = KV_DTYPES[config.kv_cache_dtype] or dtype
    attention = config.attention or default_attention(model, platform=platform, dtype=dtype)
    kv_head_dim = stored_head_dim(attention, model.head_dim)
    page_size = config.page_size or default_page_size(platform, kv_dtype)
    one_page_bytes = page_bytes(shard, page_size=page_size, dtype=kv_dtype, head_dim=kv_head_dim)
    reserved_bytes = scratch_bytes(shard, max_slots, max_step_tokens)
    if config.kv_offloading_size:  # buffers of two plans' moves, in both directions
        reserved_bytes += 4 * GROUPS_AT_ONCE * PAGES_PER_MOVE * one_page_bytes
    room_bytes = _room_bytes(config, free_bytes, defaults.memory_share, reserved_bytes)
    room_tokens = (room_bytes // one_page_bytes - 1) * page_size
    max_model_len = _context(config, model, room_tokens)
    num_pages = plan_pages(
        free_bytes=room_bytes,
        page_bytes=one_page_bytes,
        max_slots=max_slots,
        max_model_len=max_model_len,
        page_size=page_size,
        requested_num_pages=config.num_pages,
        knob="kv_cache_memory_bytes" if config.kv_cache_memory_bytes else "gpu_memory_utilization",
    )
    return EnginePlan(
        platform=platform,
        dtype=dtype,
        kv_dtype=kv_dtype,
        kv_head_dim=kv_head_dim,
        tensor_parallel_size=config.tensor_parallel_size,
        vocab_size=padded.vocab_size,
        max_model_len=max_model_len,
        max_slots=max_slots,
        max_step_tokens=max_step_tokens,
        max_chunk_tokens=config.long_prefill_token_threshold or max_step_tokens,
        page_size=page_size,
        num_pages=num_pages,
        page_bytes=one_page_bytes,
        num_host_pages=_num_host_pages(config, one_page_bytes * config.tensor_parallel_size),
        pages_per_slot=-(-max_model_len // page_size),
        token_buckets=token_buckets(
            max_step_tokens,
            max_slots,
            defaults.bucket_growth,
            chip.ridge_tokens if chip else 0,
            decodes=max_decode_steps == 1,
        ),
        step_cost_tokens=chip.ridge_tokens if chip else defaults.step_cost_tokens,
        decode_buckets=()
        if max_decode_steps == 1
        else row_buckets(max_slots, defaults.row_growth, defaults.few_rows),
        max_decode_steps=max_decode_steps,
        max_logprobs=min(max(config.max_logprobs, 1), model.vocab_size),
        layer_loop=resolve_layer_loop(config, platform),
        weight_layout=_weight_layout(device_kind, dtype),
        attention=attention,
        quick_compile=_quick_compile(config, model, platform),
    )


def _room_bytes(
    config: EngineConfig, free_bytes: int, memory_share: float, reserved_bytes: int
) -> int:
    """Bytes for the KV pool on each chip."""
    asked = config.kv_cache_memory_bytes
    if asked is None:
        share = config.gpu_memory_utilization * memory_share
        return max(0, int(free_bytes * share) - reserved_bytes)
    if config.num_pages is not None:
        raise ValueError(
            "num_pages and kv_cache_memory_bytes both set the size of the KV pool; got "
            f"num_pages={config.num_pages} and kv_cache_memory_bytes={asked}. Pass one of them."
        )
    if asked > free_bytes - reserved_bytes:
        raise ValueError(
            f"the KV pool must fit into free memory; got kv_cache_memory_bytes={asked}, with "
            f"{max(0, free_bytes - reserved_bytes)} bytes free. Lower it."
        )
    return asked


def _quick_compile(config: EngineConfig, model: ModelConfig, platform: str) -> bool:
    if config.enforce_eager is None:
        return platform == "cpu" and model.num_parameters < SMALL_MODEL
    return config.enforce_eager


def _weight_layout(device_kind: str, dtype: str) -> str:
    """See jinfer/weights/layout.py; other dtypes and chips use the default layout."""
    return "16x128" if device_kind == "TPU7x" and dtype == "bfloat16" else "default"


def _context(config: EngineConfig, model: ModelConfig, room_tokens: int) -> int:
    asked = config.max_model_len
    if asked is not None and asked > model.max_position_embeddings:
        raise ValueError(
            "max_model_len must not exceed the context the checkpoint was trained for; got "
            f"max_model_len={asked}, max_position_embeddings={model.max_position_embeddings}. "
            "Lower it."
        )
    if asked is None and config.num_pages is None and room_tokens >= 2:
        return min(model.max_position_embeddings, room_tokens)  # as much as fits
    return asked or model.max_position_embeddings


def _num_host_pages(config: EngineConfig, one_page_bytes: int) -> int:
    if config.kv_offloading_size and not config.enable_prefix_caching:
        raise ValueError(
            "kv_offloading_size keeps pages of the prefix cache; got kv_offloading_size="
            f"{config.kv_offloading_size} with enable_prefix_caching=False. Enable it."
        )
    num_pages = int((config.kv_offloading_size or 0) * 2**30) // one_page_bytes
    if config.kv_offloading_size and not num_pages:
        raise ValueError(
            f"kv_offloading_size must hold a page, {one_page_bytes / 2**30:.3g} GiB; got "
            f"kv_offloading_size={config.kv_offloading_size}. Raise it, or leave it out."
        )
    return num_pages
