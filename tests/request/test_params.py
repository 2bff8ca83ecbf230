"""Sampling parameters: one normal form, and a sentence for each thing that cannot be."""

import copy
import dataclasses
import pickle
from enum import Enum

import numpy as np
import pytest

from jinfer.errors import RequestError
from jinfer.request.params import RequestOutputKind, SamplingParams
from jinfer.request.vllm_params import _SETTLED

_ENGINE = dict(vocab_size=100, max_logprobs=5, max_model_len=64)


def test_defaults_change_nothing() -> None:
    params = SamplingParams()
    assert (params.n, params.temperature, params.top_p, params.top_k) == (1, 1.0, 1.0, 0)
    assert (params.presence_penalty, params.frequency_penalty) == (0.0, 0.0)
    assert (params.repetition_penalty, params.min_p) == (1.0, 0.0)
    assert params.max_tokens is None and params.seed is None and params.logit_bias is None
    assert params.stop == params.stop_token_ids == params.bad_words == ()
    assert params.detokenize and params.skip_special_tokens and not params.ignore_eos
    params.check_against(**_ENGINE)


def test_normal_form() -> None:
    params = SamplingParams(
        temperature=0,
        top_k=-1,
        stop="END",
        stop_token_ids=np.array([3, 4, 3]),
        bad_words=["a", "b", "a"],
        logit_bias={"7": 1, np.int64(8): -2.5},
        allowed_token_ids=range(3),
        seed=np.uint64(2**64 - 1),
        top_p=np.float32(0.5),
    )
    assert params.greedy and isinstance(params.temperature, float)
    assert params.top_k == 0
    assert params.stop == ("END",)
    assert params.stop_token_ids == (3, 4) and type(params.stop_token_ids[0]) is int
    assert params.bad_words == ("a", "b")
    assert params.logit_bias == {7: 1.0, 8: -2.5}
    assert params.allowed_token_ids == (0, 1, 2)
    assert params.seed == 2**64 - 1 and type(params.seed) is int
    assert SamplingParams(stop=None, stop_token_ids=None, logit_bias={}) == SamplingParams()


def test_is_a_value() -> None:
    params = SamplingParams(stop=["x"], logit_bias={1: 2.0}, temperature=0.5)
    assert copy.deepcopy(params) == params == pickle.loads(pickle.dumps(params))
    assert dataclasses.replace(params, top_k=5).stop == ("x",)
    assert len({params, copy.deepcopy(params)}) == 1
    message = r"cannot be changed; got an assignment to n. Write params = params.replace\(n="
    with pytest.raises(dataclasses.FrozenInstanceError, match=message):
        params.n = 2
    assert params.n == 1
    assert not SamplingParams(temperature=1e-5).greedy


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"n": 0}, r"n must be in \[1, 1024\]; got n=0"),
        ({"n": 1025}, r"n must be in \[1, 1024\]; got n=1025"),
        ({"n": True}, "n must be an integer; got n=True"),
        ({"n": 1.0}, "n must be an integer; got n=1.0"),
        ({"presence_penalty": 2.1}, r"presence_penalty must be in \[-2, 2\]; got .*=2.1"),
        ({"frequency_penalty": -3}, r"frequency_penalty must be in \[-2, 2\]"),
        ({"repetition_penalty": 0}, r"repetition_penalty must be in \[1e-05, 1e\+06\]; got .*=0.0"),
        ({"temperature": -0.1}, r"temperature must be in \[0, 1e\+06\]; got temperature=-0.1"),
        ({"temperature": float("nan")}, "temperature must be in .* got temperature=nan"),
        ({"temperature": float("inf")}, "temperature must be in .* got temperature=inf"),
        ({"temperature": 10**400}, "temperature must be in .* got temperature=inf"),
        ({"temperature": 1e-6}, "must be 0 or at least 1e-05; got temperature=1e-06. Use 0"),
        ({"temperature": "hot"}, "temperature must be a number; got temperature='hot'"),
        ({"temperature": True}, "temperature must be a number; got temperature=True"),
        ({"temperature": None}, "temperature must be a number; got temperature=None"),
        ({"top_p": 0}, r"top_p must be in \(0, 1\]; got top_p=0.0"),
        ({"top_p": 1.01}, r"top_p must be in \(0, 1\]"),
        ({"top_p": float("nan")}, r"top_p must be in \(0, 1\]; got top_p=nan"),
        ({"top_k": -2}, r"top_k must be in \[-1, 2147483647\]; got top_k=-2"),
        ({"min_p": 1.5}, r"min_p must be in \[0, 1\]; got min_p=1.5"),
        ({"seed": 2**64}, "seed must be in .*; got seed=18446744073709551616"),
        ({"seed": -(2**63) - 1}, "seed must be in"),
        ({"seed": 1 << 20000}, "seed must be in .*; got seed=20001 bits"),
        ({"seed": 0.5}, "seed must be an integer; got seed=0.5"),
        ({"stop": ""}, "stop must hold strings that are not empty; got ''"),
        ({"stop": [3]}, "stop must hold strings that are not empty; got 3"),
        ({"stop": 3}, "stop must be a list of strings; got stop=3"),
        ({"stop": ["x"] * 65}, "stop holds at most 64 entries; got 65"),
        ({"stop": "x" * 1025}, "stop holds strings of at most 1024 characters; got one of 1025"),
        ({"stop_token_ids": "12"}, "stop_token_ids must be a list of token ids; got .*'12'"),
        ({"stop_token_ids": [-1]}, r"stop_token_ids\[0\] must be in \[0, 2147483647\]"),
        ({"stop_token_ids": [5, True]}, r"stop_token_ids\[1\] must be an integer; got .*=True"),
        ({"stop_token_ids": range(65)}, "stop_token_ids holds at most 64 entries; got 65"),
        ({"bad_words": ["w"] * 129}, "bad_words holds at most 128 entries; got 129"),
        ({"bad_words": ["a", "\ud800"]}, r"bad_words\[1\] must be valid Unicode; got '.ud800'"),
        ({"stop": "a\ud800"}, r"stop\[0\] must be valid Unicode; got .* at character 1. Replace"),
        ({"n": [1] * 10**5}, r"n must be an integer; got n=\[1, 1.{,60}\.\.\.\. Pass an int"),
        ({"ignore_eos": 10**5000}, "got ignore_eos=an int too long to print. Pass a bool"),
        ({"bad_words": [""]}, "bad_words must hold strings that are not empty"),
        ({"ignore_eos": 1}, "ignore_eos must be True or False; got ignore_eos=1"),
        ({"detokenize": None}, "detokenize must be True or False; got detokenize=None"),
        ({"max_tokens": 0}, r"max_tokens must be in \[1, 2147483647\]; got max_tokens=0"),
        ({"min_tokens": -1}, r"min_tokens must be in \[0"),
        ({"logprobs": -2}, r"logprobs must be in \[-1"),
        ({"prompt_logprobs": -2}, r"prompt_logprobs must be in \[-1"),
        ({"prompt_logprobs": 1.5}, "prompt_logprobs must be an integer"),
        ({"logprobs": True}, "logprobs must be an integer; got logprobs=True"),
        ({"logit_bias": {1: 101}}, r"logit_bias\[1\] must be in \[-100, 100\]; got .*=101.0"),
        ({"logit_bias": {1: float("nan")}}, r"logit_bias\[1\] must be in .* got .*=nan"),
        ({"logit_bias": {"x": 1}}, "a key of logit_bias must be an integer; got .*'x'"),
        ({"logit_bias": [1]}, r"logit_bias must map token ids to numbers; got logit_bias=\[1\]"),
        ({"logit_bias": {i: 0 for i in range(1025)}}, "logit_bias holds at most 1024 entries"),
        ({"allowed_token_ids": []}, "allowed_token_ids must allow at least one token"),
        ({"allowed_token_ids": 5}, "allowed_token_ids must be a list of token ids; got .*=5"),
        ({"output_kind": 3}, "output_kind must be one of CUMULATIVE, DELTA, .*; got output_kind=3"),
        ({"output_kind": "DELTA"}, "got output_kind='DELTA'. Pass a RequestOutputKind"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens=5, max_tokens=4. Lower min_tokens"),
        ({"stop": "x", "detokenize": False}, r"got stop=\['x'\] with detokenize=False"),
        (
            {"allowed_token_ids": [7], "stop_token_ids": [7, 8], "min_tokens": 1},
            r"got allowed_token_ids=\[7\], min_tokens=1",
        ),
    ],
)
def test_refusals(keywords: dict, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        SamplingParams(**keywords)


def test_an_output_kind_may_be_that_of_vllm() -> None:
    theirs = Enum("RequestOutputKind", {"CUMULATIVE": 0, "DELTA": 1, "FINAL_ONLY": 2})
    for kind in theirs:
        assert SamplingParams(output_kind=kind).output_kind is RequestOutputKind[kind.name]  # pyright: ignore[reportArgumentType]


def test_a_clone_is_equal_and_another() -> None:
    params = SamplingParams(temperature=0.5, stop=["x"], logit_bias={1: 2.0})
    assert params.clone() == params and params.clone() is not params
    changed = params.replace(top_k=4, stop=None)
    assert (changed.top_k, changed.stop, changed.temperature) == (4, (), 0.5)
    assert params.top_k == 0
    with pytest.raises(RequestError, match=r"n must be in \[1, 1024\]; got n=0"):
        params.replace(n=0)
    with pytest.raises(TypeError, match="'topk'. Did you mean top_k"):
        params.replace(topk=4)


def test_none_stands_for_every_default_where_it_is_optional() -> None:
    asked = {f.name: None for f in dataclasses.fields(SamplingParams)}
    assert SamplingParams.from_optional(**asked) == SamplingParams()
    assert SamplingParams.from_optional(n=None, top_k=3) == SamplingParams(top_k=3)


def test_minus_one_is_no_seed() -> None:
    assert SamplingParams(seed=-1).seed is None
    assert SamplingParams(seed=-2).seed == -2


# Fields of vLLM 0.33's SamplingParams and some of earlier versions, each with its default and a
# value that asks for something else (None: any value is taken).
THEIRS = {
    "n": (1, None),
    "presence_penalty": (0.0, None),
    "frequency_penalty": (0.0, None),
    "repetition_penalty": (1.0, None),
    "temperature": (1.0, None),
    "top_p": (1.0, None),
    "top_k": (0, None),
    "min_p": (0.0, None),
    "seed": (None, None),
    "stop": (None, None),
    "stop_token_ids": (None, None),
    "ignore_eos": (False, None),
    "max_tokens": (16, None),
    "min_tokens": (0, None),
    "logprobs": (None, None),
    "prompt_logprobs": (None, None),
    "prompt_logprob_token_ids": (None, [3]),
    "prompt_logprob_start": (None, 7),
    "logprob_token_ids": (None, [3]),
    "flat_logprobs": (False, True),
    "detokenize": (True, None),
    "skip_special_tokens": (True, None),
    "spaces_between_special_tokens": (True, None),
    "include_stop_str_in_output": (False, None),
    "output_kind": (RequestOutputKind.CUMULATIVE, None),
    "stream_interval": (None, 5),
    "skip_clone": (False, None),
    "output_text_buffer_length": (0, 4),
    "structured_outputs": (None, {"json": {}}),
    "logit_bias": (None, None),
    "allowed_token_ids": (None, None),
    "extra_args": (None, {"a": 1}),
    "bad_words": (None, None),
    "skip_reading_prefix_cache": (None, True),
    "thinking_token_budget": (None, 100),
    "repetition_detection": (None, {"max_pattern_size": 4}),
    "routed_experts_prompt_start": (0, 2),
    "trace_decode_token_ids": (None, [3]),
    "guided_decoding": (None, {"json": {}}),
    "logits_processors": (None, [print]),
    "truncate_prompt_tokens": (None, 50),
    "best_of": (None, 3),
    "use_beam_search": (False, True),
    "length_penalty": (1.0, 0.5),
    "early_stopping": (False, True),
}


def test_every_field_of_vllm_is_taken_at_its_default() -> None:
    defaults = {name: default for name, (default, _) in THEIRS.items()}
    assert SamplingParams(**defaults) == SamplingParams(max_tokens=16)
    ours = {f.name for f in dataclasses.fields(SamplingParams)}
    assert ours < set(THEIRS)
    assert set(THEIRS) == ours | set(_SETTLED)
    assert SamplingParams(length_penalty=1, spaces_between_special_tokens=False) is not None


@pytest.mark.parametrize("name", [name for name, (_, other) in THEIRS.items() if other is not None])
def test_another_value_of_a_field_that_only_vllm_has_is_refused(name: str) -> None:
    value = THEIRS[name][1]
    with pytest.raises(RequestError, match=rf"^{name} must be .*; got {name}=.*\. [A-Z].*\.$"):
        SamplingParams(**{name: value})
    for wrong in ("", np.arange(3)):
        with pytest.raises(RequestError, match=f"{name} must be"):
            SamplingParams(**{name: wrong})


def test_unknown_keyword_names_the_nearest() -> None:
    with pytest.raises(TypeError, match="SamplingParams has no .*'temprature'. Did you mean temp"):
        SamplingParams(temprature=0.5)
    with pytest.raises(TypeError, match="got 'qqq'. It takes: allowed_token_ids, bad_words"):
        SamplingParams(qqq=1)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"stop_token_ids": [100]}, "stop_token_ids must lie in the vocabulary; got token id 100"),
        ({"logit_bias": {100: 1}}, "logit_bias must lie in the vocabulary; .* vocab_size=100"),
        ({"allowed_token_ids": [1, 400]}, "allowed_token_ids must lie in .*id 400"),
        ({"logprobs": 6}, "logprobs must be at most max_logprobs=5; got logprobs=6"),
        ({"logprobs": -1}, "max_logprobs=5; got logprobs=-1, all 100 tokens. Ask for fewer"),
        ({"prompt_logprobs": -1}, "max_logprobs=5; got prompt_logprobs=-1, all 100 tokens"),
        ({"prompt_logprobs": 6}, "or raise max_logprobs of the engine, to 100 at most"),
        ({"min_tokens": 64}, "min_tokens must be below max_model_len=64; got min_tokens=64"),
    ],
)
def test_check_against_the_engine(keywords: dict, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        SamplingParams(**keywords).check_against(**_ENGINE)


@pytest.mark.parametrize("name", ["stop", "bad_words"])
def test_strings_need_a_tokenizer(name: str) -> None:
    params = SamplingParams(**{name: ["x"]})
    params.check_against(**_ENGINE)
    with pytest.raises(RequestError, match=rf"{name} needs a tokenizer; got {name}=\('x',\)"):
        params.check_against(**_ENGINE, has_tokenizer=False)


def test_the_users_choice_beats_the_checkpoint() -> None:
    defaults = {"temperature": 0.8, "top_p": 0.95}
    params = SamplingParams.from_defaults(defaults, temperature=0.0)
    assert (params.temperature, params.top_p) == (0.0, 0.95)
    with pytest.raises(TypeError, match="has no parameter of this name; got 'tempo'"):
        SamplingParams.from_defaults({"tempo": 1})
