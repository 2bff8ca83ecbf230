"""Keys of the user over those of config.json, in both generations of its format."""

from typing import Any

import pytest
from random_checkpoint import SMALL_LLAMA

from jinfer.config import ModelConfig, RopeScaling
from jinfer.models import llama
from jinfer.models.hf_overrides import with_overrides

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "factor": 2.0}
OLD = {**SMALL_LLAMA, "rope_theta": 7.0, "rope_scaling": LLAMA3}
NEW = {key: value for key, value in SMALL_LLAMA.items() if not key.startswith("rope_")}
NEW["rope_parameters"] = {"rope_theta": 7.0, **LLAMA3}
DOUBLED = RopeScaling(kind="linear", factor=2.0)


def parsed(hf: dict[str, Any], overrides: dict[str, Any]) -> ModelConfig:
    return llama.config_from_hf(with_overrides(hf, overrides))


def test_the_users_keys_win() -> None:
    stored = dict(OLD)
    got = parsed(OLD, {"max_position_embeddings": 512, "num_hidden_layers": 1, "head_dim": None})
    assert (got.max_position_embeddings, got.num_layers, got.head_dim) == (512, 1, 16)
    assert (got.rope_theta, got.hidden_size) == (7.0, 64)
    assert stored == OLD  # the file's content is not changed
    assert with_overrides(OLD, {}) == OLD


@pytest.mark.parametrize("hf", [OLD, NEW], ids=["old", "new"])
@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
def test_rope_is_replaced_as_a_whole_but_keeps_its_base(hf: dict[str, Any], name: str) -> None:
    got = parsed(hf, {name: LINEAR})
    assert (got.rope_theta, got.rope_scaling) == (7.0, DOUBLED)
    got = parsed(hf, {name: {**LINEAR, "rope_theta": 9.0}})
    assert (got.rope_theta, got.rope_scaling) == (9.0, DOUBLED)
    got = parsed(hf, {name: LINEAR, "rope_theta": 9.0})
    assert (got.rope_theta, got.rope_scaling) == (9.0, DOUBLED)
    got = parsed(hf, {name: None})
    assert (got.rope_theta, got.rope_scaling) == (7.0, None)


@pytest.mark.parametrize("hf", [OLD, NEW], ids=["old", "new"])
def test_keys_beside_rope_win_over_those_inside(hf: dict[str, Any]) -> None:
    got = parsed(hf, {"rope_theta": 9, "original_max_position_embeddings": 32})
    assert got.rope_theta == 9.0 and got.rope_scaling is not None
    assert got.rope_scaling.original_max_position_embeddings == 32
    assert got.rope_scaling.factor == 8.0


def test_keys_inside_rope_win_over_those_beside() -> None:
    beside = {**OLD, "original_max_position_embeddings": 64}
    got = parsed(beside, {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 32}})
    assert got.rope_scaling and got.rope_scaling.original_max_position_embeddings == 32


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"rope_thetta": 1.0}, r"got 'rope_thetta'. Did you mean rope_theta\?"),
        ({"zzzzzz": 1}, r"got 'zzzzzz'. It reads architectures, attention_bias, .*, vocab_size\.$"),
        ({"torch_dtype": "float16"}, "got 'torch_dtype'. Pass dtype to the engine"),
        ({"eos_token_id": 5}, "got 'eos_token_id'. Pass it in override_generation_config"),
        ({"model_type": "mistral"}, "got 'model_type'"),  # in the file, but never read
        ({"text_config": {"rope_theta": 1.0}}, "got 'text_config'"),
    ],
)
def test_a_key_that_would_do_nothing_is_refused(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^hf_overrides takes the keys of config.json.*{message}"):
        with_overrides(SMALL_LLAMA, overrides)


def test_a_key_that_repeats_the_file_may_be_there() -> None:
    same = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    assert with_overrides(SMALL_LLAMA, same) == SMALL_LLAMA
    with pytest.raises(NotImplementedError, match="the architecture must be a supported one"):
        with_overrides(SMALL_LLAMA, {"architectures": ["Other"]})


class _Watched(dict[str, Any]):
    """A dict that notes the keys that are asked for."""

    def __init__(self, content: dict[str, Any]) -> None:
        super().__init__(content)
        self.asked: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)


def test_the_known_keys_are_those_that_are_read() -> None:
    outer = {key: value for key, value in LLAMA3.items() if key.startswith("original")}
    inner = {key: value for key, value in LLAMA3.items() if key not in outer}
    read = _Watched({**OLD, **outer, "rope_scaling": inner})
    llama.config_from_hf(read)
    assert read.asked == llama.CONFIG_KEYS
