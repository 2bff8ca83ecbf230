"""Each kind of bad input is one clear sentence, told before any device work, and costs no other."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from random_checkpoint import write_llama_checkpoint

from jinfer import LLM, CheckpointError, RequestError, SamplingParams
from jinfer.request.prompt import Prompt
from jinfer.request.tokenizer import encode_prompt

SMALL = {"max_num_seqs": 8, "max_num_batched_tokens": 8, "max_model_len": 128, "progress": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama_checkpoint(tmp_path_factory.mktemp("llama"), seed=3)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(late_compile="error", **SMALL) as llm:
        yield llm


@pytest.fixture(scope="module")
def bare() -> Iterator[LLM]:
    with LLM(skip_tokenizer_init=True, late_compile="error", **SMALL) as llm:
        yield llm


BAD_PROMPTS = [
    ([], "a prompt needs at least one token; got none"),
    (list(range(3, 131)), "got 128 tokens with max_model_len=128. Shorten it to 127 tokens"),
    ("word " * 200, "must leave room for one token of output; got "),
    ([3, -1], r"must be in \[0, 4096\); got -1 at position 1"),
    ([3, 4, 4096], r"must be in \[0, 4096\); got 4096 at position 2"),
    ([3, 4.5], "token ids must be integers; got 4.5 at position 1"),
    (["text", 3], "token ids must be integers; got 'text' at position 0"),
    (None, "a prompt must be text or token ids; got None"),
    ({"text": "hello"}, r"a prompt dict takes the keys .* got \['text'\]"),
    ("half \ud800", "a prompt must be valid Unicode"),
    ({"prompt": "x", "cache_salt": "\ud800"}, "a cache_salt must be valid Unicode; got .*Replace"),
    ([3, 10**5000], "got an int too long to print at position 1"),
]


@pytest.mark.parametrize(("prompt", "message"), BAD_PROMPTS)
def test_a_bad_prompt_is_refused_and_costs_no_other(llm: LLM, prompt: Any, message: str) -> None:
    prompts = ["Once upon a time", prompt, [5, 6, 7]]
    params = SamplingParams(max_tokens=2, ignore_eos=True)
    with pytest.raises(RequestError, match=f"^prompt 1: .*{message}"):
        llm.generate(prompts, params)
    assert not llm.engine.has_work
    first, refused, last = llm.generate(prompts, params, on_error="return")
    assert isinstance(refused.error, RequestError) and refused.finished and not refused.outputs
    for served in (first, last):
        assert served.error is None and len(served.outputs[0].token_ids) == 2


def test_nothing_runs_for_a_bad_prompt(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llm.engine, "step", lambda: pytest.fail("a step ran"))
    for prompt, _ in BAD_PROMPTS:
        with pytest.raises(RequestError):
            llm.generate([[5, 6], prompt])


def test_an_empty_text_has_the_tokens_that_the_tokenizer_adds(llm: LLM) -> None:
    [output] = llm.generate("", SamplingParams(max_tokens=2, ignore_eos=True))
    assert output.prompt_token_ids == [1] and output.prompt == ""
    assert len(output.outputs[0].token_ids) == 2
    tokenizer = llm.engine.tokenizer
    assert encode_prompt(Prompt("", None), tokenizer) == [tokenizer.bos_token_id]


def test_a_bad_conversation_of_many_is_named_by_its_index(llm: LLM) -> None:
    good = [{"role": "user", "content": "hi"}]
    with pytest.raises(RequestError, match=r"^conversation 2: messages\[0\] needs a role"):
        llm.chat([good, good, [{"content": "hi"}], good])
    with pytest.raises(RequestError, match=r"^messages\[0\] needs a role"):
        llm.chat([{"content": "hi"}])


def test_a_flat_list_with_a_float_is_one_bad_prompt(llm: LLM) -> None:
    [output] = llm.generate([1, 2.5], on_error="return")
    assert isinstance(output.error, RequestError)
    outputs = dict(llm.as_completed([2.5, [5]], SamplingParams(max_tokens=1), on_error="return"))
    assert isinstance(outputs[0].error, RequestError) and outputs[1].error is None


BAD_PARAMS = [
    ({"logprobs": 21}, "logprobs must be at most max_logprobs=20; got logprobs=21"),
    ({"prompt_logprobs": 21}, "prompt_logprobs must be at most max_logprobs=20"),
    ({"logprobs": -1}, "at most max_logprobs=20; got logprobs=-1, all 4096 tokens. Ask for fewer"),
    ({"stop_token_ids": [4096]}, "stop_token_ids must lie in the vocabulary; got token id 4096"),
    ({"allowed_token_ids": [5000]}, "allowed_token_ids must lie in the vocabulary"),
    ({"logit_bias": {4096: 1.0}}, "logit_bias must lie in the vocabulary"),
    ({"min_tokens": 128}, "min_tokens must be below max_model_len=128; got min_tokens=128"),
    ({"min_tokens": 126}, "min_tokens=126 with room for 125 after 3 tokens of prompt"),
    ({"stop_token_ids": list(range(3, 67))}, "at most 64 stop token ids; got 65"),
    ({"bad_words": [" "]}, "a bad word must be more than spaces; got ' '"),
    ({"allowed_token_ids": [2], "min_tokens": 1}, r"min_tokens=1, and stop tokens \[2\]"),
    # "king" is token 2255, "a" is 4009, and "aa" is that twice.
    ({"allowed_token_ids": [2, 2255], "bad_words": ["king"], "min_tokens": 1}, "ends no bad word"),
    ({"allowed_token_ids": [4009], "bad_words": ["aa"]}, r"got .*=\[4009\], bad_words=\['aa'\]"),
]


@pytest.mark.parametrize(("asked", "message"), BAD_PARAMS)
def test_params_that_this_engine_cannot_honour_are_refused(
    llm: LLM, asked: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        llm.generate([5, 6, 7], SamplingParams(**asked))
    each = [SamplingParams(max_tokens=1), SamplingParams(**asked)]
    served, refused = llm.generate([[5, 6, 7], [5, 6, 7]], each, on_error="return")
    assert served.error is None and refused.error is not None


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"temperature": float("nan")}, r"temperature must be in \[0, 1e\+06\]; got .*nan"),
        ({"temperature": -0.5}, "temperature must be in"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\]; got top_p=0.0"),
        ({"top_p": float("inf")}, "top_p must be in"),
        ({"min_p": 1.5}, "min_p must be in"),
        ({"n": 0}, r"n must be in \[1, 1024\]; got n=0"),
        ({"n": 1025}, "n must be in"),
        ({"max_tokens": 0}, "max_tokens must be in"),
        ({"stop": ["x"] + [f"s{i}" for i in range(64)]}, "stop holds at most 64 entries; got 65"),
        ({"stop": [""]}, "stop must hold strings that are not empty"),
        ({"max_tokens": 3, "min_tokens": 4}, "min_tokens must not exceed max_tokens"),
        ({"stop": "x", "detokenize": False}, "detokenize=False"),
    ],
)
def test_params_out_of_range_are_refused_by_themselves(asked: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        SamplingParams(**asked)


def test_an_unknown_keyword_names_the_nearest(folder: Path) -> None:
    with pytest.raises(TypeError, match="'temprature'. Did you mean temperature?"):
        SamplingParams(temprature=0.5)
    with pytest.raises(TypeError, match="LLM has no .*'max_model_length'. Did you mean max_model_"):
        LLM(folder, max_model_length=5)


def test_sampling_params_of_a_wrong_kind_are_refused(llm: LLM) -> None:
    with pytest.raises(RequestError, match="must be SamplingParams or a list of them; got dict"):
        llm.generate("x", {"temperature": 0})  # pyright: ignore[reportArgumentType]
    with pytest.raises(RequestError, match="sampling_params must be SamplingParams; got dict"):
        llm.stream("x", {"temperature": 0})  # pyright: ignore[reportArgumentType]
    with pytest.raises(RequestError, match="one entry per prompt; got 1 for 2 prompts"):
        llm.generate([[5], [6]], [SamplingParams()])
    with pytest.raises(ValueError, match="on_error must be 'raise' or 'return'; got on_error='ig"):
        llm.generate([[5]], on_error="ignore")


@pytest.mark.parametrize("messages", ["hello", {"role": "user"}, [], [[]], ["hi"]])
def test_a_bad_conversation_is_refused(llm: LLM, messages: Any) -> None:
    if messages == []:
        assert llm.chat(messages) == []
        return
    with pytest.raises(RequestError, match="messages|message|dict"):
        llm.chat(messages)
    [output] = llm.chat(messages, on_error="return")
    assert isinstance(output.error, RequestError)


def test_a_bad_argument_of_chat_is_refused(llm: LLM) -> None:
    messages = [{"role": "user", "content": "hi"}]
    for asked, message in (
        ({"chat_template": 5}, "a chat template must be text; got 5"),
        ({"chat_template": "nosuch"}, r"must be one of \['default'\]; got 'nosuch'"),
        ({"chat_template_kwargs": 5}, "chat_template_kwargs must be a dict; got 5. Pass such as"),
        ({"chat_template_kwargs": {"messages": 5}}, "must name variables of the template.*messag"),
        ({"chat_template_content_format": "x"}, "must be 'auto', 'string' or 'openai'; got 'x'"),
        ({"mm_processor_kwargs": {"a": 1}}, r"these models read text only; got \{'a': 1\}. Leave"),
    ):
        with pytest.raises(RequestError, match=message):
            llm.chat(messages, **asked)
    with pytest.raises(
        TypeError, match="chat has no .*'chat_templat'. Did you mean chat_template?"
    ):
        llm.chat(messages, chat_templat="x")


def test_text_without_a_tokenizer_is_refused(bare: LLM) -> None:
    for refused in (
        lambda: bare.generate("text"),
        lambda: bare.chat([{"role": "user", "content": "hi"}]),
        lambda: bare.generate([5], SamplingParams(stop="x")),
        lambda: bare.generate([5], SamplingParams(bad_words=["x"])),
    ):
        with pytest.raises(RequestError, match="needs a tokenizer; got .*skip_tokenizer_init=True"):
            refused()


BAD_ARGUMENTS = [
    ({"max_num_seqs": 0}, "max_num_seqs must be at least 1; got max_num_seqs=0"),
    ({"max_num_seqs": "abc"}, "max_num_seqs must be an integer; got max_num_seqs='abc'"),
    ({"max_num_seqs": True}, "max_num_seqs must be an integer"),
    ({"max_num_seqs": 64, "max_num_batched_tokens": 8}, "must be at least max_num_seqs.*8 < 64"),
    ({"max_model_len": 1}, "max_model_len must be at least 2; got max_model_len=1"),
    ({"max_model_len": 257}, "max_model_len=257, max_position_embeddings=256. Lower it"),
    ({"page_size": -1}, "page_size must be at least 1"),
    ({"num_pages": 3}, "num_pages=17; got num_pages=3. The longest context that fits is 32 tok"),
    ({"num_pages": 10**9}, "num_pages=1000000000, .* GiB, with .* GiB free. Lower num_pages to"),
    ({"long_prefill_token_threshold": -1}, "long_prefill_token_threshold must be at least 1"),
    (
        {"ttft_target_ms": 0},
        "ttft_target_ms must be a number above 0; got ttft_target_ms=0. Pass millis",
    ),
    ({"tpot_target_ms": "fast"}, "tpot_target_ms must be a number above 0; got .*'fast'"),
    (
        {"kv_offloading_size": -1},
        "kv_offloading_size must be a number, at least 0; got .*=-1. Pass GiB",
    ),
    ({"kv_offloading_size": "a"}, "kv_offloading_size must be a number, at least 0; got"),
    (
        {"kv_offloading_size": 1, "enable_prefix_caching": False},
        "kv_offloading_size keeps pages of the prefix cache; got .*=1 with enable_prefix_caching",
    ),
    ({"dtype": "int3"}, "dtype must be one of 'auto', .*; got dtype='int3'"),
    ({"dtype": 32}, "dtype must be one of"),
    ({"kv_cache_dtype": "fp8_e5m2"}, "kv_cache_dtype must be one of 'auto', 'int8', 'fp8', .*e5m2"),
    (
        {"gpu_memory_utilization": 2},
        r"gpu_memory_utilization must be a number in \(0, 1\]; got .*=2",
    ),
    ({"gpu_memory_utilization": "a"}, "gpu_memory_utilization must be a number in"),
    ({"gpu_memory_utilization": float("nan")}, "gpu_memory_utilization must be a number in .*nan"),
    ({"gpu_memory_utilization": 1e-9}, "the KV pool must hold one sequence of max_model_len=256"),
    ({"seed": "a"}, "seed must be an integer; got seed='a'"),
    ({"seed": -1}, r"seed must be in \[0, 4294967295\]; got seed=-1"),
    ({"max_logprobs": 101}, r"max_logprobs must be in \[0, 100\]; got max_logprobs=101"),
    ({"max_logprobs": None}, "max_logprobs must be an integer; got max_logprobs=None"),
    ({"layer_loop": "fori"}, "layer_loop must be one of 'scan', 'unrolled'; got"),
    ({"attention": "flash"}, "attention must be one of .*; got attention='flash'"),
    ({"load_format": "gguf"}, "load_format must be one of 'auto', 'safetensors', 'dummy'; got"),
    (
        {"generation_config": "x"},
        "generation_config must be 'auto', 'vllm' or a folder with .*; got",
    ),
    ({"late_compile": "ignore"}, "late_compile must be one of 'warn', 'error'; got"),
    ({"skip_tokenizer_init": "no"}, "skip_tokenizer_init must be True or False; got"),
    ({"progress": 1}, "progress must be True or False; got progress=1"),
    ({"compilation_cache": 5}, "compilation_cache must be a string or a Path; got"),
    ({"tokenizer": 5}, "tokenizer must be a string or a Path; got tokenizer=5"),
]


@pytest.mark.parametrize(("asked", "message"), BAD_ARGUMENTS)
def test_a_bad_argument_is_refused_before_the_weights_are_read(
    folder: Path, asked: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "jinfer.startup.load.load_params", lambda *_, **__: pytest.fail("weights read")
    )
    with pytest.raises(ValueError, match=message):
        LLM(folder, **{"skip_tokenizer_init": True, "progress": False, **asked})


def test_what_files_show_is_refused_before_the_device_is_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax, "devices", lambda: pytest.fail("a device was touched"))
    with pytest.raises(CheckpointError, match="has no config.json"):
        LLM(tmp_path, progress=False)
    write_llama_checkpoint(tmp_path, seed=1)
    with pytest.raises(CheckpointError, match="needs tokenizer.json"):
        LLM(tmp_path, progress=False)


@pytest.mark.parametrize("model", [None, 5])
def test_a_model_of_a_wrong_kind_is_refused(model: Any) -> None:
    with pytest.raises(ValueError, match=f"model must be a string or a Path; got model={model}"):
        LLM(model)


def test_a_context_without_room_is_told_with_what_would_fit(tmp_path: Path) -> None:
    # One token of this model takes 65,536 bytes; ten million of them, 610 GiB.
    sizes = {"max_position_embeddings": 10**7, "num_key_value_heads": 4, "head_dim": 1024}
    write_llama_checkpoint(tmp_path, seed=1, hidden_size=8, intermediate_size=8, **sizes)
    with pytest.raises(
        ValueError,
        match=r"max_model_len=10000000 tokens, 610.\d+ GiB; got [\d.]+ GiB free. The longest "
        r"context that fits is \d+ tokens: lower max_model_len or max_num_seqs, or raise gpu",
    ):
        LLM(tmp_path, skip_tokenizer_init=True, progress=False, max_model_len=10**7)


def test_weights_without_room_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jinfer.startup.load.free_bytes_each", lambda devices: 2**16)
    with pytest.raises(
        ValueError, match=r"weights must fit into free memory; got 0.0.. GiB of flo"
    ):
        LLM(folder, skip_tokenizer_init=True, progress=False)


def test_a_failed_start_leaves_nothing_on_the_device(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jinfer.startup.load.Compiling.result", lambda self: 1 / 0)
    before = {id(array) for array in jax.live_arrays()}
    with pytest.raises(ZeroDivisionError):  # as a notebook does, pytest keeps the traceback
        LLM(folder, skip_tokenizer_init=True, **SMALL)
    assert all(id(array) in before for array in jax.live_arrays())


def test_a_damaged_checkpoint_is_refused_before_anything_compiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jinfer.startup.load.Compiling", lambda *_, **__: pytest.fail("compiled"))
    folder = write_llama_checkpoint(tmp_path / "model", seed=1)
    stored = folder / "model.safetensors"
    stored.write_bytes(stored.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="model.safetensors"):
        LLM(folder, skip_tokenizer_init=True, **SMALL)


def test_what_is_no_model_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="got model='.*nowhere', which is not a folder here"):
        LLM(str(tmp_path / "nowhere"))
    with pytest.raises(CheckpointError, match="which has no config.json"):
        LLM(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="which is a file"):
        LLM(tmp_path / "file")


def test_a_truncated_checkpoint_is_refused(tmp_path: Path) -> None:
    write_llama_checkpoint(tmp_path, seed=1)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="model.safetensors"):
        LLM(tmp_path, skip_tokenizer_init=True, **SMALL)


def test_a_config_without_a_needed_key_is_refused(tmp_path: Path) -> None:
    write_llama_checkpoint(tmp_path, seed=1)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["num_attention_heads"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="num_attention_heads"):
        LLM(tmp_path, skip_tokenizer_init=True, **SMALL)


def test_what_generation_config_cannot_suggest_is_refused_unless_unread(tmp_path: Path) -> None:
    write_llama_checkpoint(tmp_path, seed=3)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 6], "top_p": 7}')
    with pytest.raises(CheckpointError, match="got top_p=7.0.*or ask for generation_config="):
        LLM(tmp_path, skip_tokenizer_init=True, **SMALL)
    with LLM(tmp_path, skip_tokenizer_init=True, generation_config="vllm", **SMALL) as llm:
        assert llm.get_default_sampling_params() == SamplingParams()
        [output] = llm.generate([7], SamplingParams(logit_bias={6: 100.0}))
        assert list(output.outputs[0].token_ids) == [6]


def test_an_unsupported_architecture_is_refused(tmp_path: Path) -> None:
    write_llama_checkpoint(tmp_path, seed=1, architectures=["MambaForCausalLM"])
    with pytest.raises(NotImplementedError, match="MambaForCausalLM"):
        LLM(tmp_path, skip_tokenizer_init=True, **SMALL)


def test_a_missing_tokenizer_is_refused(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="tokenizer.json or .* set skip_tokenizer_init=True"):
        LLM(folder, **SMALL)


def test_an_array_of_ids_is_a_prompt(llm: LLM) -> None:
    two = llm.generate(np.array([[5, 6], [7, 8]]), SamplingParams(max_tokens=1))
    assert [list(output.prompt_token_ids) for output in two] == [[5, 6], [7, 8]]
