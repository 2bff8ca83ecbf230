"""Engine arguments of vLLM's that jinfer spells otherwise or has no choice about.

A script that moves over keeps them: a new spelling is translated, a value that says what jinfer
does anyway is accepted, and any other is refused with the reason. None is ignored.
"""

from collections.abc import Mapping
from typing import Any

_RENAMED = {
    "block_size": "page_size",
    "num_gpu_blocks_override": "num_pages",
    "num_scheduler_steps": "max_decode_steps",
}

_NO_PIPELINE = "jinfer cuts layers, not their sequence: use tensor_parallel_size."
_NO_EXECUTOR = "A process drives its own chips; see README for several hosts."
_NO_OFFLOAD = "Weights stay on the device."
_NO_SWAP = "KV pages go to host memory with kv_offloading_size."
_NO_REVISION = "The hub's main revision is read; download another to a folder and name that."
# Argument -> the values that say what jinfer does, and what that is.
_SETTLED: dict[str, tuple[tuple[Any, ...], str]] = {
    "pipeline_parallel_size": ((1,), _NO_PIPELINE),
    "distributed_executor_backend": ((None, "uni"), _NO_EXECUTOR),
    "enable_chunked_prefill": ((None, True), "Long prompts always come in chunks."),
    "enforce_eager": ((None, False), "Every step is compiled at start-up."),
    "trust_remote_code": ((False, True), "No code of a checkpoint is ever run."),
    "tokenizer_mode": (("auto", "hf"), "The folder's files decide."),
    "quantization": ((None,), "Weights are floating point."),
    "swap_space": ((0,), _NO_SWAP),
    "kv_offloading_backend": (("native",), _NO_SWAP),
    "scheduling_policy": (("fcfs", "priority"), "Priorities count, and are 0 where none is given."),
    "cpu_offload_gb": ((0,), _NO_OFFLOAD),
    "enable_lora": ((None, False), "Adapters are not served yet."),
    "speculative_config": ((None,), "There is no speculative decoding yet."),
    "revision": ((None, "main"), _NO_REVISION),
    "tokenizer_revision": ((None, "main"), _NO_REVISION),
    "disable_log_stats": ((True,), "Metrics come with every output and are not logged."),
}


def translated(engine_args: Mapping[str, Any]) -> dict[str, Any]:
    """The same arguments in jinfer's spelling; names that neither knows are left in.

    Raises:
      NotImplementedError: the value of an argument that jinfer has no choice about is another.
      TypeError: an argument is given in both spellings.
    """
    kept: dict[str, Any] = {}
    for name, value in engine_args.items():
        if name in _SETTLED:
            _check_settled(name, value)
            continue
        own = _RENAMED.get(name, name)
        if own != name and own in engine_args:
            raise TypeError(
                f"{name} is {own} here; got both spellings in one call. Pass {own} only."
            )
        kept[own] = value
    return kept


def _check_settled(name: str, value: Any) -> None:
    accepted, reason = _SETTLED[name]
    if value not in accepted:
        listed = " or ".join(map(repr, accepted))
        raise NotImplementedError(
            f"{name} must be {listed}; got {name}={value!r}. {reason} Leave it out."
        )
