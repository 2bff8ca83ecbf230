"""The device mesh: replicas of the model along one axis, shards along the other."""

import math
from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh

DATA, TENSOR = "data", "tensor"  # the mesh's axes


def make_mesh(devices: Sequence[jax.Device], tensor_parallel_size: int) -> Mesh:
    """Makes one replica's mesh `("data", "tensor")` over the first devices.

    Raises:
      ValueError: there are fewer devices than tensor_parallel_size.
    """
    if tensor_parallel_size > len(devices):
        raise ValueError(
            "tensor_parallel_size must not exceed the devices; got "
            f"{tensor_parallel_size=} with {len(devices)} devices. Lower it, or add hosts."
        )
    return _mesh(devices, (1, tensor_parallel_size))


def split_devices(
    devices: Sequence[jax.Device], *, data_parallel_size: int, tensor_parallel_size: int
) -> list[list[jax.Device]]:
    """Splits the devices into one list per replica.

    Raises:
      ValueError: there are fewer devices than data_parallel_size * tensor_parallel_size.
    """
    if data_parallel_size * tensor_parallel_size > len(devices):
        raise ValueError(
            "data_parallel_size * tensor_parallel_size must not exceed the devices; got "
            f"{data_parallel_size=}, {tensor_parallel_size=} with {len(devices)} devices. "
            "Lower them, or add hosts."
        )
    return _mesh(devices, (data_parallel_size, tensor_parallel_size)).devices.tolist()


def _mesh(devices: Sequence[jax.Device], shape: tuple[int, int]) -> Mesh:
    types = (AxisType.Explicit,) * 2
    return jax.make_mesh(shape, (DATA, TENSOR), types, devices=devices[: math.prod(shape)])
