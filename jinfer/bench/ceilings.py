"""What this device can do at best, measured beside whatever is held against it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jinfer.bench.table import figure
from jinfer.bench.timing import time_loop

# Large enough that no cache holds the arrays and that a matrix product fills the device.
_COPY_BYTES = {"cpu": 256 << 20, "gpu": 2 << 30, "tpu": 1 << 30}
_MATRIX_WIDTH = {"cpu": 1536, "gpu": 8192, "tpu": 8192}


@dataclass(frozen=True, kw_only=True, slots=True)
class Ceilings:
    """Rates that nothing on this device exceeds for long.

    Args:
      copy_bytes_per_s: bytes read and written, copying a large array.
      read_bytes_per_s: bytes read, summing it up.
      flops_per_s: of a large square matrix product.
      dtype: of that product.
    """

    copy_bytes_per_s: float
    read_bytes_per_s: float
    flops_per_s: float
    dtype: str

    @property
    def bytes_per_s(self) -> float:
        """The faster of the two.

        On CPUs a write first reads what it overwrites; but where reading and writing have wires of
        their own, a copy takes both, and nothing that only reads is as fast.
        """
        return max(self.copy_bytes_per_s, self.read_bytes_per_s)

    def bound_s(self, num_bytes: float, num_flops: float) -> float:
        """The least time for so much traffic and arithmetic, each hidden behind the other."""
        return max(num_bytes / self.bytes_per_s, num_flops / self.flops_per_s)

    def read_bound_s(self, num_bytes: float, num_flops: float) -> float:
        """The same where bytes are only read, as nearly all of a step's are."""
        return max(num_bytes / self.read_bytes_per_s, num_flops / self.flops_per_s)

    def faster(self, other: "Ceilings") -> "Ceilings":
        """Of two measurements of one device the better in each: the other one was disturbed."""
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
    """How the engine multiplies: float32 in full precision, which accelerators would cut short."""
    return "highest" if dtype == "float32" else "default"


def measure_ceilings(platform: str, dtype: str) -> Ceilings:
    """Measures this process's first device.

    Args:
      platform: "cpu", "gpu" or "tpu".
      dtype: of the matrix product; float32 is computed in full precision, as the engine does.
    """
    num_bytes, width = _COPY_BYTES[platform], _MATRIX_WIDTH[platform]
    words = jnp.ones(num_bytes // 4, jnp.float32)
    copy_s = time_loop(_looped(lambda x, _: x + 1, words, None)).median_s
    del words
    words = jnp.ones((num_bytes // 4 // width, width), jnp.float32)
    read_s = time_loop(_looped(_read, jnp.zeros(width), words)).median_s
    read_bytes = words.nbytes
    del words
    # Random, for chips draw less power, and clock higher, on numbers that repeat; and of a spectral
    # radius of about one, so that the numbers neither grow nor vanish.
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
    """A matrix times a vector that depends on the one before: every element is read once."""
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
