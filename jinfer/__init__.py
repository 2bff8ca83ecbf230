"""jinfer: LLM inference in JAX for TPUs and GPUs."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinfer.arguments.config_file import read_config
    from jinfer.async_llm import AsyncLLM
    from jinfer.errors import CheckpointError, RequestError
    from jinfer.llm import LLM
    from jinfer.request.output import CompletionOutput, Logprob, RequestMetrics, RequestOutput
    from jinfer.request.params import RequestOutputKind, SamplingParams

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "AsyncLLM",
    "CheckpointError",
    "CompletionOutput",
    "Logprob",
    "RequestError",
    "RequestMetrics",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
    "read_config",
]

_HOMES = {
    "LLM": "jinfer.llm",
    "AsyncLLM": "jinfer.async_llm",
    "CheckpointError": "jinfer.errors",
    "RequestError": "jinfer.errors",
    "CompletionOutput": "jinfer.request.output",
    "Logprob": "jinfer.request.output",
    "RequestMetrics": "jinfer.request.output",
    "RequestOutput": "jinfer.request.output",
    "RequestOutputKind": "jinfer.request.params",
    "SamplingParams": "jinfer.request.params",
    "read_config": "jinfer.arguments.config_file",
}


def __getattr__(name: str) -> Any:
    # JAX takes a second or two to import; `jinfer --help` and the host-only parts go without.
    if name not in _HOMES:
        raise AttributeError(f"module 'jinfer' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
