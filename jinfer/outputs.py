"""What requests return, under vLLM's name: `from jinfer.outputs import RequestOutput`."""

from typing import Any

from jinfer.arguments.vllm_methods import missing_name
from jinfer.request.output import CompletionOutput, Logprob, RequestMetrics, RequestOutput

__all__ = ["CompletionOutput", "Logprob", "RequestMetrics", "RequestOutput"]


def __getattr__(name: str) -> Any:
    raise missing_name(__name__, name)
