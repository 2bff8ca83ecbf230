"""The mesh of devices: replicas of the model along one axis, its shards along the other."""

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

DATA, TENSOR = "data", "tensor"  # the mesh's axes


def make_meshes(
    devices: Sequence[jax.Device], *, data_parallel_size: int, tensor_parallel_size: int
) -> list[Mesh]:
    """One mesh `("data", "tensor")` per replica, cut out of one over all devices that are needed.

    Devices of one replica are neighbours where the platform says who is whose neighbour.

    Raises:
      ValueError: there are fewer devices than data_parallel_size * tensor_parallel_size.
    """
    num_needed = data_parallel_size * tensor_parallel_size
    if num_needed > len(devices):
        raise ValueError(
            "data_parallel_size * tensor_parallel_size must not exceed the devices; got "
            f"{data_parallel_size=}, {tensor_parallel_size=} with {len(devices)} devices. "
            "Lower them, or add hosts."
        )
    types = (AxisType.Explicit,) * 2
    shape = (data_parallel_size, tensor_parallel_size)
    whole = jax.make_mesh(shape, (DATA, TENSOR), types, devices=devices[:num_needed])
    rows: list[np.ndarray] = np.split(whole.devices, data_parallel_size)
    return [Mesh(row, (DATA, TENSOR), axis_types=types) for row in rows]
