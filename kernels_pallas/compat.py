"""The one place that reaches into JAX's private modules, for want of a public way."""

import math
from contextlib import AbstractContextManager
from typing import Any

import jax
from jax._src import compiler, config
from jax._src.mesh import AbstractDevice


def told_the_chip(device: Any) -> AbstractContextManager[Any]:
    """Inside it, Pallas kernels are traced for `device` even where no such chip is present.

    Args:
      device: of a topology description, from `jax.experimental.topologies`.
    """
    # A TPU says num_cores, a GPU core_count; and "gpu" names only GPUs that are present.
    num_cores = getattr(device, "num_cores", None) or getattr(device, "core_count", None)
    platform = "cuda" if device.platform == "gpu" else device.platform
    abstract = AbstractDevice(
        device_kind=device.device_kind, num_cores=num_cores, platform=platform
    )
    mesh = jax.sharding.AbstractMesh((1,), ("tensor",), abstract_device=abstract)
    return jax.sharding.use_abstract_mesh(mesh)


def not_kept_by_jax() -> AbstractContextManager[Any]:
    """Inside it, on this thread, what is compiled is not written to JAX's persistent cache."""
    return config.persistent_cache_min_compile_time_secs(math.inf)


def kept_arguments(lowered: jax.stages.Lowered) -> tuple[int, ...] | None:
    """Which of its arguments a lowered program has: unused ones are left out of it.

    None where this version of JAX keeps them elsewhere.
    """
    told = getattr(getattr(lowered, "_lowering", None), "compile_args", {})
    return tuple(sorted(told["kept_var_idx"])) if "kept_var_idx" in told else None


def compile_options() -> str:
    """What XLA is asked when JAX compiles, its flags from the environment included."""
    return compiler.get_compile_options(num_replicas=1, num_partitions=1).SerializeAsString().hex()


def cudnn_attention() -> Any:
    """The module with cuDNN's paged attention, which is timed beside ours and never used."""
    from jax._src.cudnn import fused_attention_stablehlo

    return fused_attention_stablehlo
