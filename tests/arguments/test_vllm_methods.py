"""Names of vLLM that jinfer lacks end in a sentence, and imports move over."""

import importlib
import re

import pytest

import jinfer
from jinfer.arguments.vllm_methods import (
    METHODS,
    NAMES,
    missing_attribute,
    missing_name,
    require_absent,
)
from jinfer.async_llm import AsyncLLM
from jinfer.llm import LLM


def test_a_missing_method_is_told_with_the_way_around_it() -> None:
    for name, remedy in METHODS.items():
        assert not hasattr(LLM, name) and not hasattr(AsyncLLM, name)
        assert remedy.endswith("."), name
    error = missing_attribute("LLM", "beam_search")
    assert isinstance(error, NotImplementedError)
    assert str(error) == (
        "LLM has no beam_search as in vLLM; got .beam_search. Beam search is not supported yet; "
        "use n above 1, or best-of by logprobs."
    )


@pytest.mark.parametrize("kind", [LLM, AsyncLLM])
def test_the_classes_tell_it(kind: type) -> None:
    empty = object.__new__(kind)
    with pytest.raises(NotImplementedError, match=f"{kind.__name__} has no wake_up as in vLLM"):
        empty.wake_up()
    assert not hasattr(empty, "wake_up")
    with pytest.raises(AttributeError, match=f"'{kind.__name__}' object has no attribute 'wakeup'"):
        _ = empty.wakeup


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("jinfer", "LLM SamplingParams EngineArgs AsyncEngineArgs AsyncLLMEngine TextPrompt"),
        ("jinfer", "TokensPrompt PromptType RequestOutput CompletionOutput __version_tuple__"),
        ("jinfer.sampling_params", "SamplingParams RequestOutputKind"),
        ("jinfer.outputs", "RequestOutput CompletionOutput"),
        ("jinfer.inputs", "TextPrompt TokensPrompt PromptType SingletonPrompt"),
    ],
)
def test_imports_move_over(module: str, names: str) -> None:
    for name in names.split():
        assert getattr(importlib.import_module(module), name) is not None
    assert set(jinfer.__all__) >= set(names.split()) - {"__version_tuple__", "SingletonPrompt"}


def test_the_names_are_the_same_objects() -> None:
    assert jinfer.AsyncLLMEngine is AsyncLLM
    assert importlib.import_module("jinfer.sampling_params").SamplingParams is jinfer.SamplingParams
    assert jinfer.__version_tuple__ == (0, 1, 0)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("jinfer", "LLMEngine"),
        ("jinfer.sampling_params", "BeamSearchParams"),
        ("jinfer.outputs", "PoolingRequestOutput"),
        ("jinfer.inputs", "EmbedsPrompt"),
    ],
)
def test_a_name_that_is_missing_is_told_by_its_import(module: str, name: str) -> None:
    told = re.escape(f"{module} has no {name} as in vLLM. {NAMES[name]}")
    with pytest.raises(ImportError, match=f"^{told}$"):
        exec(f"from {module} import {name}")
    assert isinstance(missing_name("jinfer", "unheard_of"), AttributeError)


def test_keywords_of_vllm_must_be_absent() -> None:
    require_absent(lora_request=None, tokenization_kwargs={}, mm_processor_kwargs=[None, {}])
    with pytest.raises(NotImplementedError, match="lora_request must be None; got .*'a'. LoRA"):
        require_absent(lora_request="a")
    with pytest.raises(NotImplementedError, match="tokenization_kwargs must be None; .* Tokeni"):
        require_absent(tokenization_kwargs={"truncate_prompt_tokens": 3})
    with pytest.raises(TypeError, match="generate has no parameter of this name; got 'lora'"):
        require_absent(lora=None)
