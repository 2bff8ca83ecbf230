"""jinfer: LLM inference in JAX for TPUs and GPUs."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinfer.arguments.config_file import read_config
    from jinfer.arguments.engine_args import AsyncEngineArgs, EngineArgs
    from jinfer.async_llm import AsyncLLM
    from jinfer.async_llm import AsyncLLM as AsyncLLMEngine
    from jinfer.errors import CheckpointError, RequestError
    from jinfer.inputs import PromptType, TextPrompt, TokensPrompt
    from jinfer.llm import LLM
    from jinfer.request.output import CompletionOutput, Logprob, RequestMetrics, RequestOutput
    from jinfer.request.params import RequestOutputKind, SamplingParams

__version__ = "0.1.0"
__version_tuple__ = tuple(int(part) for part in __version__.split("."))
__all__ = [
    "LLM",
    "AsyncEngineArgs",
    "AsyncLLM",
    "AsyncLLMEngine",
    "CheckpointError",
    "CompletionOutput",
    "EngineArgs",
    "Logprob",
    "PromptType",
    "RequestError",
    "RequestMetrics",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
    "TextPrompt",
    "TokensPrompt",
    "read_config",
]

_HOMES = {
    "LLM": "jinfer.llm",
    "AsyncEngineArgs": "jinfer.arguments.engine_args",
    "AsyncLLM": "jinfer.async_llm",
    "CheckpointError": "jinfer.errors",
    "CompletionOutput": "jinfer.request.output",
    "EngineArgs": "jinfer.arguments.engine_args",
    "Logprob": "jinfer.request.output",
    "PromptType": "jinfer.inputs",
    "RequestError": "jinfer.errors",
    "RequestMetrics": "jinfer.request.output",
    "RequestOutput": "jinfer.request.output",
    "RequestOutputKind": "jinfer.request.params",
    "SamplingParams": "jinfer.request.params",
    "TextPrompt": "jinfer.inputs",
    "TokensPrompt": "jinfer.inputs",
    "read_config": "jinfer.arguments.config_file",
}


def __getattr__(name: str) -> Any:
    # JAX takes a second or two to import; `jinfer --help` and the host-only parts go without.
    if name == "AsyncLLMEngine":  # vLLM's name
        name = "AsyncLLM"
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name.startswith("_"):
        raise AttributeError(f"module 'jinfer' has no attribute {name!r}")
    from jinfer.arguments.vllm_methods import missing_name

    raise missing_name("jinfer", name)
