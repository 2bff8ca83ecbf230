"""Merges `hf_overrides`, the user's keys, over those of config.json."""

import difflib
from collections.abc import Mapping
from typing import Any

from jinfer.errors import shown
from jinfer.models.registry import family_of

# Two names of one setting: before transformers 5, and since.
_ROPE = ("rope_scaling", "rope_parameters")
# These may be inside that mapping, or beside it.
_INSIDE_OR_BESIDE = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
_ELSEWHERE = {
    "dtype": "Pass dtype to the engine.",
    "torch_dtype": "Pass dtype to the engine.",
    "eos_token_id": "Pass it in override_generation_config.",
}


def with_overrides(hf: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of config.json with those of `overrides` in place of them.

    Each value is replaced as a whole, also a dict, as in vLLM. Rope is one setting with several
    spellings: a new `rope_scaling` or `rope_parameters` replaces both, and a new `rope_theta` also
    the one inside them. Without a new base, that of the file stays.

    Raises:
      ValueError: jinfer does not read a key, so that its new value would do nothing.
      CheckpointError, NotImplementedError: as from `family_of`.
    """
    merged = {**_without_replaced(hf, overrides), **overrides}
    known = {"architectures", *family_of(merged).config_keys}
    for key, value in overrides.items():
        if key not in known and not (key in hf and hf[key] == value):
            raise _unread(key, known)
    return merged


def _without_replaced(hf: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of config.json that keep their values."""
    kept = {key: value for key, value in hf.items() if key not in overrides}
    stored = {name: hf[name] for name in _ROPE if isinstance(hf.get(name), dict)}
    if not any(name in overrides for name in _ROPE):
        beside = {key for key in _INSIDE_OR_BESIDE if key in overrides}
        for name, rope in stored.items():
            kept[name] = {key: value for key, value in rope.items() if key not in beside}
        return kept
    bases = [rope["rope_theta"] for rope in stored.values() if rope.get("rope_theta") is not None]
    if bases and "rope_theta" not in overrides:
        kept["rope_theta"] = bases[0]
    new = [overrides[name] for name in _ROPE if isinstance(overrides.get(name), Mapping)]
    inside = {key for rope in new for key in _INSIDE_OR_BESIDE if rope.get(key) is not None}
    return {key: value for key, value in kept.items() if key not in inside and key not in _ROPE}


def _unread(key: Any, known: set[str]) -> ValueError:
    near = difflib.get_close_matches(str(key), sorted(known), n=1)
    hint = f"Did you mean {near[0]}?" if near else f"It reads {', '.join(sorted(known))}."
    return ValueError(
        "hf_overrides takes the keys of config.json that jinfer reads; "
        f"got {shown(key)}. {_ELSEWHERE.get(key, hint)}"
    )
