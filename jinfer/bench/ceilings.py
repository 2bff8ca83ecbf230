"""The best rates of this device, measured in the same run as the figures compared to them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jinfer.bench.table import figure
from jinfer.bench.timing import time_loop

# Large enough that the arrays exceed every cache and a matrix product fills the device.
_COPY_BYTES = {"cpu": 256 << 20, "gpu": 2 << 30, "tpu": 1 << 30}
_MATRIX_WIDTH = {"cpu": 1536, "gpu": 8192, "tpu": 8192}


@dataclass(frozen=True, kw_only=True, slots=True)
class Ceilings:
    """Rates that nothing on this device exceeds for long.

    Args:
      copy_bytes_per_s: bytes read and written while copying a large array.
      read_bytes_per_s: bytes read while summing a large array.
      flops_per_s: rate of a large square matrix product.
      dtype: dtype of that product.
    """

    copy_bytes_per_s: float
    read_bytes_per_s: float
    flops_per_s: float
    dtype: str

    @property
    def bytes_per_s(self) -> float:
        """The faster of the two.

        On CPUs a write first reads the old content, so reads are faster. On a device with separate
        wires for reads and writes, a copy uses both and is faster than any read.
        """
        return max(self.copy_bytes_per_s, self.read_bytes_per_s)

    def bound_s(self, num_bytes: float, num_flops: float) -> float:
        """The least time for this traffic and arithmetic, if they overlap fully."""
        return max(num_bytes / self.bytes_per_s, num_flops / self.flops_per_s)

    def read_bound_s(self, num_bytes: float, num_flops: float) -> float:
        """The same if all bytes are reads, as nearly all of a step's are."""
        return max(num_bytes / self.read_bytes_per_s, num_flops / self.flops_per_s)

    def faster(self, other: "Ceilings") -> "Ceilings":
        """The better of two measurements of one device, per rate: the other was disturbed."""
        return Ceilings(
            copy_bytes_per_s=max(self.copy_bytes_per_s, other.copy_bytes_per_s),
            read_bytes_per_s=max(self.read_bytes_per_s, other.read_bytes_per_s),
            flops_per_s=max(self.flops_per_s, other.flops_per_s),
            dtype=self.dtype,
        )

    def __str__(self) -> str:
        return (
            f"copy {figure(self.copy_bytes_per_s / 1e9)} GB/s, "
            f"read {figure(self.read_bytes_per_s / 1e9)} GB/s, "
            f"matrix product {figure(self.flops_per_s / 1e12)} TFLOP/s in {self.dtype}"
        )


def precision_of(dtype: str) -> str:
    """The engine's matmul precision: full for float32, which accelerators would truncate."""
    return "highest" if dtype == "float32" else "default"


def measure_ceilings(platform: str, dtype: str) -> Ceilings:
    """Measures this process's first device.

    Args:
      platform: "cpu", "gpu" or "tpu".
      dtype: of the matrix product; float32 has full precision, as in the engine.
    """
    num_bytes, width = _COPY_BYTES[platform], _MATRIX_WIDTH[platform]
    words = jnp.ones(num_bytes // 4, jnp.float32)
    copy_s = time_loop(_looped(lambda x, _: x + 1, words, None)).median_s
    del words
    words = jnp.ones((num_bytes // 4 // width, width), jnp.float32)
    read_s = time_loop(_looped(_read, jnp.zeros(width), words)).median_s
    read_bytes = words.nbytes
    del words
    # Random, because repeated numbers need less power and let chips clock higher. The spectral
    # radius is about one, so that the numbers neither grow nor vanish.
    draw = jax.jit(partial(jax.random.normal, shape=(width, width), dtype=dtype))
    start, matrix = draw(jax.random.key(0)), draw(jax.random.key(1)) / width**0.5
    product = partial(jnp.matmul, precision=precision_of(dtype))
    product_s = time_loop(_looped(product, start, matrix.astype(dtype))).median_s
    return Ceilings(
        copy_bytes_per_s=2 * num_bytes / copy_s,
        read_bytes_per_s=read_bytes / read_s,
        flops_per_s=2 * width**3 / product_s,
        dtype=dtype,
    )


def _read(sum_D: jax.Array, words_ED: jax.Array) -> jax.Array:
    """A matrix times a vector that depends on the last product: reads every element once."""
    return jnp.tanh(words_ED @ sum_D).sum() * jnp.full_like(sum_D, 1e-9)


def _looped(step: Callable[[Any, Any], Any], start: Any, constant: Any) -> Callable[[int], None]:
    def loop(state: Any, constant: Any, num_calls: Any) -> Any:
        return lax.fori_loop(0, num_calls, lambda _, state: step(state, constant), state)

    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (start, constant))
    count = jax.ShapeDtypeStruct((), jnp.int32)
    compiled = jax.jit(loop, donate_argnums=0).lower(*shapes, count).compile()
    state = [start]

    def run(num_calls: int) -> None:
        state[0] = jax.block_until_ready(compiled(state[0], constant, jnp.int32(num_calls)))

    return run
