"""Chips by name, with the figures their makers publish."""

import math
import re
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Chip:
    """Public figures of one chip: memory, its bandwidth, and dense 16-bit matrix arithmetic.

    No program reaches these figures, so times computed from them are lower bounds, not estimates.
    """

    platform: str  # "tpu" | "gpu"
    topology: str  # TPU: a slice of `num_chips` chips; GPU: the architecture
    memory_gb: float
    bandwidth_gb_s: float
    tflops: float
    num_chips: int = 1

    @property
    def ridge_tokens(self) -> int:
        """The smallest step whose arithmetic takes as long as reading the weights.

        A 16-bit parameter takes 2 bytes to read, and 2 operations (multiply, add) per token:
        2 * P * T / flops_per_s = 2 * P / bytes_per_s, so T = flops_per_s / bytes_per_s. Below T,
        another token costs next to nothing; above T, it costs its arithmetic.

        Source: Williams et al., Roofline, doi:10.1145/1498765.1498785.
        """
        return math.ceil(self.tflops * 1e3 / self.bandwidth_gb_s)

    def bound_s(self, num_bytes: float, num_flops: float, share: float = 1.0) -> float:
        """The least time on a fraction `share` of a chip: JAX shows some chips as two devices."""
        bytes_per_s, flops_per_s = self.bandwidth_gb_s * 1e9, self.tflops * 1e12
        return max(num_bytes / bytes_per_s, num_flops / flops_per_s) / share


def _tpu(topology: str, memory_gb: float, bandwidth_gb_s: float, tflops: float) -> Chip:
    return Chip(
        platform="tpu",
        topology=topology,
        memory_gb=memory_gb,
        bandwidth_gb_s=bandwidth_gb_s,
        tflops=tflops,
        num_chips=4,
    )


def _gpu(architecture: str, memory_gb: float, bandwidth_gb_s: float, tflops: float) -> Chip:
    return Chip(
        platform="gpu",
        topology=architecture,
        memory_gb=memory_gb,
        bandwidth_gb_s=bandwidth_gb_s,
        tflops=tflops,
    )


# Sources: Google Cloud's "System architecture" page of each TPU; NVIDIA's data sheets (the SXM
# version if there is one, without sparsity).
CHIPS = {
    "v4": _tpu("v4:2x2x1", 32, 1228, 275),
    "v5e": _tpu("v5e:2x2", 16, 819, 197),
    "v5p": _tpu("v5p:2x2x1", 95, 2765, 459),
    "v6e": _tpu("v6e:2x2", 32, 1638, 918),
    "tpu7x": _tpu("tpu7x:2x2x1", 192, 7380, 2307),
    "t4": _gpu("7.5", 16, 320, 65),
    "a100": _gpu("8.0", 80, 2039, 312),
    "l4": _gpu("8.9", 24, 300, 121),
    "h100": _gpu("9.0", 80, 3350, 989),
    "h200": _gpu("9.0", 141, 4800, 989),
    "b200": _gpu("10.0", 180, 8000, 2250),
}

# Patterns of `jax.Device.device_kind` in lower case; the first match counts.
_KINDS = (
    (r"tpu v4$", "v4"),
    (r"tpu v5 ?(lite|e)", "v5e"),
    (r"tpu v5p?$", "v5p"),
    (r"tpu v6 ?(lite|e)", "v6e"),
    (r"tpu ?7x|tpu v7x", "tpu7x"),
    *((rf"\b{name}\b", name) for name in ("t4", "a100", "l4", "h100", "h200", "b200")),
)


def chip_of(device_kind: str) -> Chip | None:
    """The chip with this name in JAX; None if it is not in the table.

    Args:
      device_kind: a `jax.Device.device_kind`, e.g. "TPU v6 lite", "NVIDIA H200".
    """
    for pattern, name in _KINDS:
        if re.search(pattern, device_kind.lower()):
            return CHIPS[name]
    return None
