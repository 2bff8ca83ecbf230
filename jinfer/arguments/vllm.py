"""vLLM's engine arguments as jinfer's: translated, accepted where they agree, or refused.

The tables are in `vllm_table.py` (vLLM 0.33) and `vllm_older.py`. Where jinfer has no choice, it
accepts only the values that describe what it does; any other value is an error that says why. Some
arguments make no difference in jinfer: it accepts any value of these.
"""

import difflib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from jinfer.arguments.vllm_older import OLDER
from jinfer.arguments.vllm_rows import Row, equal
from jinfer.arguments.vllm_table import TABLE
from jinfer.config import EngineConfig

_ROWS = {**TABLE, **OLDER}
_OWN = [field.name for field in fields(EngineConfig)]
# vLLM's spellings of a value, by jinfer's argument.
_SPELLINGS: Mapping[str, tuple[tuple[Any, Any], ...]] = {
    "max_model_len": ((-1, None), ("auto", None)),
    "long_prefill_token_threshold": ((0, None),),
    "enable_prefix_caching": ((None, True),),
    "seed": ((None, 0),),
    "generation_config": ((None, "auto"),),
}


def engine_config(
    model: str | Path, engine_args: Mapping[str, Any], *, of_requests: Collection[str] = ()
) -> EngineConfig:
    """An EngineConfig from keywords under jinfer's names or vLLM's; raises as `translated`."""
    return EngineConfig(model=model, **translated(engine_args, of_requests=of_requests))


def translated(
    engine_args: Mapping[str, Any], *, of_requests: Collection[str] = ()
) -> dict[str, Any]:
    """The arguments that jinfer has, under its names; accepted ones without effect are dropped.

    Args:
      engine_args: keywords under jinfer's names or vLLM's.
      of_requests: names that belong to SamplingParams, for a hint.

    Raises:
      TypeError: a name is unknown, or given twice. The message names all problems, also
        unsupported values.
      NotImplementedError: an argument has a value that jinfer does not support.
    """
    kept: dict[str, Any] = {}
    wrong: list[str] = []
    refused: list[str] = []
    for name, value in engine_args.items():
        row = _ROWS.get(name)
        own = name if name in _OWN else row.own if row else None
        if own is not None and own != name and own in engine_args:
            wrong.append(f"{name} is called {own} in jinfer; got both. Pass {own} only.")
        elif own is not None:
            kept[own] = _spelled(own, value)
        elif row is None:
            wrong.append(_unknown(name, of_requests))
        elif not _accepted(row, value):
            refused.append(_refusal(name, row, value))
    if wrong or refused:
        kind = TypeError if wrong else NotImplementedError
        raise kind(_told([*wrong, *refused]))
    return kept


def _accepted(row: Row, value: Any) -> bool:
    return row.any_value or any(equal(value, accepted) for accepted in row.accepts)


def _spelled(own: str, value: Any) -> Any:
    if own == "dtype" and not isinstance(value, str):
        return _dtype_name(value)
    for theirs, ours in _SPELLINGS.get(own, ()):
        if type(value) is type(theirs) and value == theirs:
            return ours
    return value


def _dtype_name(value: Any) -> Any:
    """The name of a dtype of torch, numpy or JAX; any other value as it is, to be refused later."""
    name = str(getattr(value, "name", getattr(value, "__name__", value)))
    name = name.removeprefix("torch.")
    return name if name in ("float32", "bfloat16", "float16") else value


def _refusal(name: str, row: Row, value: Any) -> str:
    listed = " or ".join(map(repr, (one for one in row.accepts if one is not None))) or "None"
    return f"{name} must be {listed}; got {name}={value!r:.60}. {row.note} Leave it out."


def _unknown(name: str, of_requests: Iterable[str]) -> str:
    if name in of_requests:
        hint = f"It is a parameter of a request: pass SamplingParams({name}=...) to generate()."
    else:
        taken = {*_OWN, *(one for one, row in _ROWS.items() if row.own)}
        near = difflib.get_close_matches(name, sorted(taken), n=1, cutoff=0.8)
        hint = f"Did you mean {near[0]}?" if near else "See help(jinfer.LLM)."
    return f"LLM has no argument of this name; got {name!r}. {hint}"


def _told(problems: list[str]) -> str:
    if len(problems) == 1:
        return problems[0]
    listed = "\n".join(f"  - {problem}" for problem in problems)
    return f"{len(problems)} arguments of LLM must be changed:\n{listed}"
