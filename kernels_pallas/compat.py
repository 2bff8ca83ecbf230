"""The one place that reaches into JAX's private modules, for want of a public way."""

from contextlib import AbstractContextManager
from typing import Any

import jax
from jax._src.mesh import AbstractDevice
from jax._src.pallas.mosaic.interpret import interpret_pallas_call


def told_the_chip(device: Any) -> AbstractContextManager[Any]:
    """Inside it, Pallas kernels are traced for `device` even where no such chip is present.

    Args:
      device: of a topology description, from `jax.experimental.topologies`.
    """
    abstract = AbstractDevice(
        device_kind=device.device_kind, num_cores=device.num_cores, platform=device.platform
    )
    mesh = jax.sharding.AbstractMesh((1,), ("tensor",), abstract_device=abstract)
    return jax.sharding.use_abstract_mesh(mesh)


def races_found() -> bool:
    """Whether the last TPU kernel interpreted with `detect_races=True` had any.

    Raises:
      RuntimeError: if none has been interpreted that way.
    """
    races = interpret_pallas_call.races
    if races is None:
        raise RuntimeError(
            "no kernel has been interpreted with race detection. "
            "Run one with InterpretParams(detect_races=True), and wait for its result, first."
        )
    return races.races_found
