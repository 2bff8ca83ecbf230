"""Parameters of a request, under vLLM's name: `from jinfer.sampling_params import ...`."""

from typing import Any

from jinfer.arguments.vllm_methods import missing_name
from jinfer.request.params import RequestOutputKind, SamplingParams

__all__ = ["RequestOutputKind", "SamplingParams"]


def __getattr__(name: str) -> Any:
    raise missing_name(__name__, name)
