"""Methods and names of vLLM that jinfer does not have, and what to use in their place."""

from collections.abc import Mapping
from typing import Any

from jinfer.errors import shown, unknown_keyword

_NO_POOLING = "jinfer generates text; it has no pooling models."
_NO_SLEEP = "close() frees the device; a new LLM starts from stored programs."
_NO_WORKERS = "The model and its arrays are in this process, in `.engine`."
_NO_LORA = "LoRA adapters are not supported yet."
_NO_UPDATES = "Weights cannot be replaced in a running engine; make a new one."
_NO_QUEUE = "as_completed() yields each output when it is done; AsyncLLM takes prompts at any time."
_TRACES = "Use jax.profiler.start_trace(FOLDER) and stop_trace()."

# Method of vLLM's LLM or AsyncLLM -> what to do.
METHODS: Mapping[str, str] = {
    "beam_search": "Beam search is not supported yet; use n above 1, or best-of by logprobs.",
    "embed": _NO_POOLING,
    "encode": _NO_POOLING,
    "classify": _NO_POOLING,
    "score": _NO_POOLING,
    "reward": _NO_POOLING,
    "sleep": _NO_SLEEP,
    "wake_up": _NO_SLEEP,
    "is_sleeping": _NO_SLEEP,
    "release_kv_cache_memory": _NO_SLEEP,
    "collective_rpc": _NO_WORKERS,
    "apply_model": _NO_WORKERS,
    "llm_engine": "The engine is `.engine`: `.engine.plan` holds sizes, `.engine.model` the model.",
    "model_config": "See `.engine.model` and `.engine.plan`.",
    "vllm_config": "See `.engine.config` and `.engine.plan`.",
    "get_metrics": "metrics() returns all counts and times, prometheus() their text.",
    "set_tokenizer": "Pass tokenizer=... to LLM.",
    "enqueue": _NO_QUEUE,
    "enqueue_chat": _NO_QUEUE,
    "wait_for_completion": _NO_QUEUE,
    "add_request": _NO_QUEUE,
    "start_profile": _TRACES,
    "stop_profile": _TRACES,
    "preprocess_chat": "render() returns the prompt of a conversation.",
    "reset_mm_cache": "Prompts are text and token ids; there is no such cache.",
    "reset_encoder_cache": "Prompts are text and token ids; there is no such cache.",
    "add_lora": _NO_LORA,
    "remove_lora": _NO_LORA,
    "list_loras": _NO_LORA,
    "pin_lora": _NO_LORA,
    "init_weight_transfer_engine": _NO_UPDATES,
    "start_weight_update": _NO_UPDATES,
    "update_weights": _NO_UPDATES,
    "finish_weight_update": _NO_UPDATES,
    "pause_generation": "Steps cannot be paused.",
    "resume_generation": "Steps cannot be paused.",
    "do_log_stats": "Read metrics() or prometheus().",
    "scale_elastic_ep": "Replicas are fixed at start-up: data_parallel_size.",
}

# Name of the package `vllm` -> what to do.
NAMES: Mapping[str, str] = {
    "LLMEngine": "Use LLM with as_completed(), or AsyncLLM.",
    "ModelRegistry": "jinfer has its own implementation of each model, in jinfer/models.",
    "initialize_ray_cluster": "Start one process per host; see README.",
    "PoolingParams": _NO_POOLING,
    "PoolingOutput": _NO_POOLING,
    "PoolingRequestOutput": _NO_POOLING,
    "EmbeddingOutput": _NO_POOLING,
    "EmbeddingRequestOutput": _NO_POOLING,
    "ClassificationOutput": _NO_POOLING,
    "ClassificationRequestOutput": _NO_POOLING,
    "ScoringOutput": _NO_POOLING,
    "ScoringRequestOutput": _NO_POOLING,
    "BeamSearchParams": "Beam search is not supported yet.",
    "GuidedDecodingParams": "Guided generation is not supported yet.",
    "StructuredOutputsParams": "Guided generation is not supported yet.",
    "EmbedsPrompt": "Prompts are text and token ids.",
    "DataPrompt": "Prompts are text and token ids.",
    "ExplicitEncoderDecoderPrompt": "jinfer runs decoders only.",
}


# Keyword of vLLM's generate() and chat() -> what to do.
_KEYWORDS: Mapping[str, str] = {
    "lora_request": _NO_LORA,
    "tokenization_kwargs": "Tokenize the prompt yourself and pass its prompt_token_ids.",
    "mm_processor_kwargs": "Prompts are text and token ids.",
    "prompt_text": "Pass the text in the prompt's dict.",
    "trace_headers": "Requests are not traced.",
    "data_parallel_rank": "Replicas take the next request when they have room.",
    "reasoning_ended": "Reasoning stays in the text of an output.",
}


class NotServedError(NotImplementedError, AttributeError):
    """vLLM has this attribute and jinfer does not; `hasattr` is False, as for any other."""


def missing_attribute(owner: str, name: str) -> AttributeError:
    """The error for an attribute that `owner` lacks, with the way around it if vLLM has it."""
    if name in METHODS:
        return NotServedError(f"{owner} has no {name} as in vLLM; got .{name}. {METHODS[name]}")
    return AttributeError(f"{owner!r} object has no attribute {name!r}")


def require_absent(**given: Any) -> None:
    """Refuses the values of vLLM's keywords that ask for something jinfer does not have.

    Raises:
      NotImplementedError: a value is set.
      TypeError: vLLM has no such keyword.
    """
    for name, value in given.items():
        if name not in _KEYWORDS:
            raise unknown_keyword("generate", name, _KEYWORDS)
        listed = value if isinstance(value, list | tuple) else [value]
        if not all(one is None or one == {} for one in listed):
            raise NotImplementedError(
                f"{name} must be None; got {name}={shown(value)}. {_KEYWORDS[name]}"
            )


def missing_name(module: str, name: str) -> AttributeError | ImportError:
    """The error for a name that a module of jinfer lacks.

    For a name of vLLM it is an ImportError: of an AttributeError, `from jinfer import` would not
    show the message.
    """
    if name in NAMES:
        return ImportError(f"{module} has no {name} as in vLLM. {NAMES[name]}", name=module)
    return AttributeError(f"module {module!r} has no attribute {name!r}")
