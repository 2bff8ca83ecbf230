"""Reads values from config.json; errors name the key that is missing or of the wrong type."""

import math
from collections.abc import Mapping
from typing import Any

from jinfer.config import RopeScaling
from jinfer.errors import CheckpointError

# The rope base of every Llama that was trained before transformers wrote this key.
OLD_ROPE_THETA = 10_000.0
# The keys that each kind of rotary embedding reads, beside its base and its name.
_ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
}
_NEUTRAL_AT_ONE = ("factor", "attention_factor", "partial_rotary_factor")


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

    As in transformers 5: `rope_scaling`, the older name, replaces `rope_parameters`. `rope_theta`
    in either overrides the one at the top level. The kind is "rope_type" or, in old files, "type".
    Null counts as absent. Without any base it is 10,000, that of the first Llamas.

    Raises:
      CheckpointError: values are missing, contradict each other, or are not used by this kind.
      NotImplementedError: the kind is not supported, or layers differ.
    """
    name, rope = _rope_mapping(hf)
    kind = _rope_kind(name, rope)
    outer = ["rope_theta", "partial_rotary_factor"]
    if kind == "llama3":
        outer.append("original_max_position_embeddings")
    rope = {key: hf[key] for key in outer if hf.get(key) is not None} | rope
    theta = required({"rope_theta": OLD_ROPE_THETA, **rope}, "rope_theta", float)
    scaling = _scaling(kind, rope)
    _refuse_unused(name, kind, rope)
    _refuse_two_values(hf, name, rope, "original_max_position_embeddings")
    return theta, scaling


def refuse_unsupported(hf: Mapping[str, Any]) -> None:
    """Raises NotImplementedError for settings that would change the arithmetic."""
    quantization = hf.get("quantization_config")
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise NotImplementedError(
            f"weights must be stored as floating point; got {method=} in quantization_config. "
            "Use the unquantized checkpoint."
        )


def _rope_mapping(hf: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The mapping that config.json uses, by name; nulls are dropped."""
    found = {}
    for name in ("rope_scaling", "rope_parameters"):
        content = optional(hf, name, {}, dict)
        given = {key: value for key, value in content.items() if value is not None}
        if given:
            found[name] = given
    if len(found) == 2 and found["rope_scaling"] != found["rope_parameters"]:
        raise CheckpointError(
            "config.json must give one of rope_scaling and rope_parameters, or both alike; got "
            f"rope_scaling={found['rope_scaling']}, rope_parameters={found['rope_parameters']}. "
            "Remove one."
        )
    return next(iter(found.items()), ("rope_parameters", {}))


def _rope_kind(name: str, rope: Mapping[str, Any]) -> str:
    for key, value in rope.items():
        if isinstance(value, dict):
            raise NotImplementedError(
                f"{name} must hold for all layers; got {key}={value}. Use another checkpoint."
            )
    kinds = {key: required(rope, key, str) for key in ("rope_type", "type") if key in rope}
    if len(set(kinds.values())) == 2:
        raise CheckpointError(
            f"{name} must name one type; got rope_type={kinds['rope_type']!r}, "
            f"type={kinds['type']!r}. Correct config.json."
        )
    return next(iter(kinds.values()), "default")


def _scaling(kind: str, rope: Mapping[str, Any]) -> RopeScaling | None:
    partial = optional(rope, "partial_rotary_factor", 1.0, float)
    if kind not in _ROPE_KEYS or partial != 1.0:
        raise NotImplementedError(
            "rope_type must be 'default', 'linear' or 'llama3' over the whole head; "
            f"got rope_type={kind!r}, partial_rotary_factor={partial}. Use another checkpoint."
        )
    if kind == "default":
        return None
    factor = required(rope, "factor", float)
    if kind == "linear":
        return RopeScaling(kind=kind, factor=factor)
    low, high = required(rope, "low_freq_factor", float), required(rope, "high_freq_factor", float)
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
        original_max_position_embeddings=required(rope, "original_max_position_embeddings"),
    )


def _refuse_unused(name: str, kind: str, rope: Mapping[str, Any]) -> None:
    """Raises CheckpointError for a key that this kind does not read and that is not neutral."""
    known = {"rope_theta", "rope_type", "type", *_ROPE_KEYS[kind]}
    for key, value in rope.items():
        if key not in known and not (key in _NEUTRAL_AT_ONE and value == 1):
            raise CheckpointError(
                f"{name} must hold only what rope_type={kind!r} uses; got {key}={value!r}. "
                "Correct rope_type in config.json, or remove the key."
            )


def _refuse_two_values(hf: Mapping[str, Any], name: str, rope: Mapping[str, Any], key: str) -> None:
    if key in rope and hf.get(key) not in (None, rope[key]):
        raise CheckpointError(
            f"config.json must give {key} once; got {hf[key]!r} at the top level and "
            f"{rope[key]!r} in {name}. Remove the wrong one."
        )


def _some_names(hf: Mapping[str, Any], limit: int = 6) -> str:
    names = sorted(hf)
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return (", ".join(names[:limit]) + rest) or "no keys"
