"""Paged-attention implementations by name. Chosen once at start-up; the kernels join here."""

from collections.abc import Callable
from typing import Any

from kernels_pallas.paged_attention.reference import paged_attention_reference
from kernels_pallas.paged_attention.xla import paged_attention_xla

# The contract is in kernels_pallas/paged_attention/reference.py.
ATTENTION: dict[str, Callable[..., Any]] = {
    "xla": paged_attention_xla,  # portable: CPU, and GPUs before Hopper
    "reference": paged_attention_reference,  # slow, for debugging
}
