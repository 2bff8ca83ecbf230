"""vLLM's engine arguments that jinfer names differently or does not let you choose.

Renamed arguments are translated. Of the others, only the value that matches jinfer's behaviour is
accepted; any other value is an error that says why. None is ignored.
"""

from collections.abc import Mapping
from typing import Any

_RENAMED = {
    "block_size": "page_size",
    "num_gpu_blocks_override": "num_pages",
    "num_scheduler_steps": "max_decode_steps",
}

_NO_PIPELINE = "jinfer has tensor parallelism only; use tensor_parallel_size."
_NO_EXECUTOR = "One process runs all chips of its host; see README for several hosts."
_NO_OFFLOAD = "Weights stay on the device."
_NO_SWAP = "KV pages go to host memory with kv_offloading_size."
_NO_REVISION = "jinfer reads the hub's main revision; download another and pass its folder."
# Argument -> the values that match jinfer's behaviour, and what it does.
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
    "scheduling_policy": (("fcfs", "priority"), "Priorities always count; the default is 0."),
    "cpu_offload_gb": ((0,), _NO_OFFLOAD),
    "enable_lora": ((None, False), "LoRA adapters are not supported yet."),
    "speculative_config": ((None,), "There is no speculative decoding yet."),
    "revision": ((None, "main"), _NO_REVISION),
    "tokenizer_revision": ((None, "main"), _NO_REVISION),
    "disable_log_stats": ((True,), "Metrics come with every output and are not logged."),
}


def translated(engine_args: Mapping[str, Any]) -> dict[str, Any]:
    """The same arguments under jinfer's names; unknown names stay.

    Raises:
      NotImplementedError: jinfer supports no other value of this argument.
      TypeError: an argument is given under both names.
    """
    kept: dict[str, Any] = {}
    for name, value in engine_args.items():
        if name in _SETTLED:
            _check_settled(name, value)
            continue
        own = _RENAMED.get(name, name)
        if own != name and own in engine_args:
            raise TypeError(f"{name} is called {own} in jinfer; got both. Pass {own} only.")
        kept[own] = value
    return kept


def _check_settled(name: str, value: Any) -> None:
    accepted, reason = _SETTLED[name]
    if value not in accepted:
        listed = " or ".join(map(repr, accepted))
        raise NotImplementedError(
            f"{name} must be {listed}; got {name}={value!r}. {reason} Leave it out."
        )
