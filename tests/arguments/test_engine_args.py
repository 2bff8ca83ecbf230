"""Arguments that are collected before the engine is made."""

import dataclasses
from typing import Any

import pytest

import jinfer.llm
from jinfer import LLM, AsyncEngineArgs, EngineArgs
from jinfer.arguments.engine_args import keywords_of
from jinfer.config import EngineConfig


class MadeError(Exception):
    """Stands for an engine."""


@pytest.fixture(autouse=True)
def _no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    def made(config: EngineConfig) -> Any:
        raise MadeError(config)

    monkeypatch.setattr(jinfer.llm, "Engine", made)


def config_of_engine(make: Any) -> EngineConfig:
    with pytest.raises(MadeError) as made:
        make()
    return made.value.args[0]


@pytest.mark.parametrize("kind", [EngineArgs, AsyncEngineArgs])
def test_they_make_the_engine_that_llm_makes(kind: type[EngineArgs]) -> None:
    given: dict[str, Any] = {"block_size": 32, "trust_remote_code": True, "max_num_seqs": 3}
    args = kind(model="m", **given)
    wanted = EngineConfig(model="m", page_size=32, max_num_seqs=3)
    assert config_of_engine(lambda: LLM.from_engine_args(args)) == wanted
    assert config_of_engine(lambda: LLM(**vars(args))) == wanted
    assert config_of_engine(lambda: LLM(**dataclasses.asdict(args))) == wanted


def test_they_may_be_changed_and_compared() -> None:
    args = EngineArgs(model="m")
    assert args == EngineArgs("m") and args.max_model_len is None
    args.max_model_len = 64
    assert args != EngineArgs("m") and args == dataclasses.replace(
        EngineArgs("m"), max_model_len=64
    )
    assert config_of_engine(lambda: LLM.from_engine_args(args)).max_model_len == 64


def test_misspelt_names_are_told_at_once() -> None:
    wrong: dict[str, Any] = {"max_num_seq": 2}
    with pytest.raises(TypeError, match="Did you mean max_num_seqs"):
        EngineArgs("m", **wrong)
    args = EngineArgs("m")
    args.max_num_seq = 2
    with pytest.raises(TypeError, match="Did you mean max_num_seqs"):
        LLM.from_engine_args(args)


def test_an_access_token_is_not_shown() -> None:
    args = EngineArgs("m", hf_token="secret")
    assert "secret" not in repr(args) and args.hf_token == "secret"


def test_something_else_is_refused() -> None:
    with pytest.raises(TypeError, match="needs EngineArgs; got dict. Build them with"):
        keywords_of({"model": "m"})


def test_a_parameter_of_a_request_is_sent_there() -> None:
    wrong: dict[str, Any] = {"temperature": 0.5}
    with pytest.raises(TypeError, match=r"pass SamplingParams\(temperature=...\)"):
        LLM("m", **wrong)


def test_a_missing_template_is_told_before_the_engine_is_made() -> None:
    with pytest.raises(ValueError, match="chat_template='absent.jinja' .No such file"):
        LLM("m", chat_template="absent.jinja")
