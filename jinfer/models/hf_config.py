"""Reads values from config.json; errors name the key that is missing or of the wrong type."""

import math
from collections.abc import Mapping
from typing import Any

from jinfer.config import RopeScaling
from jinfer.errors import CheckpointError

# The rope base of every Llama that was trained before transformers wrote this key.
OLD_ROPE_THETA = 10_000.0


def required(hf: Mapping[str, Any], key: str, kind: type = int) -> Any:
    """The value of a required key. Numbers must be above 0; an int is accepted as a float.

    Raises:
      CheckpointError: if the key is missing, or its value has another type.
    """
    if key not in hf:
        raise CheckpointError(
            f"config.json must have {key}; got only {_some_names(hf)}. "
            "Use a config.json written by transformers for this architecture."
        )
    value = hf[key]
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind or (kind in (int, float) and not 0 < value < math.inf):
        numbers = {int: "a positive int", float: "a positive, finite float"}
        wanted = numbers.get(kind, f"a {kind.__name__}")
        raise CheckpointError(
            f"config.json must give {key} as {wanted}; got {key}={value!r}. Correct the file."
        )
    return value


def optional(hf: Mapping[str, Any], key: str, absent: Any, kind: type = int) -> Any:
    """The value of a key that may be absent or null, as in old configurations."""
    return absent if hf.get(key) is None else required(hf, key, kind)


def rope_settings(hf: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Base and scaling of the rotary embedding, from the old or the new format.

    transformers 5 writes one mapping, `rope_parameters`. Earlier versions write `rope_theta` and
    `rope_scaling` at the top level; its kind is "type" or, later, "rope_type".
    The first Llamas have neither key; they were trained with a base of 10,000.
    """
    nested = optional(hf, "rope_parameters", None, dict)
    if nested is None:
        scaling = optional(hf, "rope_scaling", None, dict)
        theta = hf if hf.get("rope_theta") is not None else {"rope_theta": OLD_ROPE_THETA}
    else:
        scaling = {"rope_type": nested.get("type", "default"), **nested}
        theta = nested if "rope_theta" in nested else hf
    return required(theta, "rope_theta", float), _scaling(scaling)


def refuse_unsupported(hf: Mapping[str, Any]) -> None:
    """Raises NotImplementedError for settings that would change the arithmetic."""
    quantization = hf.get("quantization_config")
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise NotImplementedError(
            f"weights must be stored as floating point; got {method=} in quantization_config. "
            "Use the unquantized checkpoint."
        )


def _scaling(hf: Mapping[str, Any] | None) -> RopeScaling | None:
    if hf is None:
        return None
    kind = required({"rope_type": hf["type"], **hf} if "type" in hf else hf, "rope_type", str)
    partial = optional(hf, "partial_rotary_factor", 1.0, float)
    if kind not in ("default", "linear", "llama3") or partial != 1.0:
        raise NotImplementedError(
            "rope_type must be 'default', 'linear' or 'llama3' over the whole head; "
            f"got rope_type={kind!r}, partial_rotary_factor={partial}. Use another checkpoint."
        )
    if kind == "default":
        return None
    factor = required(hf, "factor", float)
    if kind == "linear":
        return RopeScaling(kind=kind, factor=factor)
    low, high = required(hf, "low_freq_factor", float), required(hf, "high_freq_factor", float)
    if low >= high:
        raise CheckpointError(
            "config.json must give low_freq_factor below high_freq_factor; "
            f"got {low} and {high}. Correct the file."
        )
    return RopeScaling(
        kind=kind,
        factor=factor,
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_position_embeddings=required(hf, "original_max_position_embeddings"),
    )


def _some_names(hf: Mapping[str, Any], limit: int = 6) -> str:
    names = sorted(hf)
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return (", ".join(names[:limit]) + rest) or "no keys"
