"""The only file that uses JAX's private modules, where no public API exists."""

import math
from contextlib import AbstractContextManager
from typing import Any

import jax
from jax._src import compiler, config
from jax._src.mesh import AbstractDevice


def told_the_chip(device: Any) -> AbstractContextManager[Any]:
    """Traces Pallas kernels for `device` within the context, even if no such chip is present.

    Args:
      device: from a topology description of `jax.experimental.topologies`.
    """
    # A TPU has num_cores, a GPU core_count. The platform "gpu" means present GPUs only.
    num_cores = getattr(device, "num_cores", None) or getattr(device, "core_count", None)
    platform = "cuda" if device.platform == "gpu" else device.platform
    abstract = AbstractDevice(
        device_kind=device.device_kind, num_cores=num_cores, platform=platform
    )
    mesh = jax.sharding.AbstractMesh((1,), ("tensor",), abstract_device=abstract)
    return jax.sharding.use_abstract_mesh(mesh)


def not_kept_by_jax() -> AbstractContextManager[Any]:
    """Keeps this thread's compilations out of JAX's persistent cache within the context."""
    return config.persistent_cache_min_compile_time_secs(math.inf)


def kept_arguments(lowered: jax.stages.Lowered) -> tuple[int, ...] | None:
    """Indices of the arguments that a lowered program uses; lowering drops the others.

    None if this version of JAX keeps them elsewhere.
    """
    told = getattr(getattr(lowered, "_lowering", None), "compile_args", {})
    return tuple(sorted(told["kept_var_idx"])) if "kept_var_idx" in told else None


def compile_options() -> str:
    """The options that JAX passes to XLA, including flags from the environment."""
    return compiler.get_compile_options(num_replicas=1, num_partitions=1).SerializeAsString().hex()


def cudnn_attention() -> Any:
    """The module with cuDNN's paged attention; benchmarks time it, the engine never uses it."""
    from jax._src.cudnn import fused_attention_stablehlo

    return fused_attention_stablehlo
