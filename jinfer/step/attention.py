"""Paged-attention implementations by name. Chosen once at start-up; the kernels join here."""

from collections.abc import Callable
from typing import Any

from kernels_pallas.paged_attention.xla import paged_attention_xla

# The contract: kernels_pallas/paged_attention/contract.py.
ATTENTION: dict[str, Callable[..., Any]] = {
    "xla": paged_attention_xla,  # portable: runs everywhere
}
