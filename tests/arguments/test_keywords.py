"""Editors and `help` know every argument of LLM, with its type, default and meaning."""

import importlib.util
import inspect
import re
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import pytest

import jinfer
from jinfer.arguments.engine_args import EngineArgs
from jinfer.arguments.keywords import ChatKeywords, EngineKeywords
from jinfer.config import EngineConfig
from jinfer.llm import LLM

ROOT = Path(__file__).resolve().parents[2]
_spec = importlib.util.spec_from_file_location("pages", ROOT / "docs" / "pages.py")
assert _spec is not None and _spec.loader is not None
pages = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(pages)
OWN = {field.name: field for field in fields(EngineConfig)}


def test_the_keywords_are_the_fields_with_their_types() -> None:
    typed = get_type_hints(EngineConfig)
    del typed["model"]
    assert get_type_hints(EngineKeywords) == typed
    assert list(EngineKeywords.__annotations__) == list(OWN)[1:]  # the order of the fields


@pytest.mark.parametrize("entry", [LLM, jinfer.AsyncLLM, EngineArgs])
def test_the_signature_has_every_argument_with_its_default(entry: Any) -> None:
    parameters = inspect.signature(entry).parameters
    assert set(parameters) == set(OWN)
    assert parameters["model"].default == "fable"
    for name in list(OWN)[1:]:
        assert parameters[name].default == OWN[name].default
        assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY


def test_the_docstring_of_llm_has_every_meaning() -> None:
    doc = inspect.cleandoc(LLM.__doc__ or "")
    found = re.findall(r"^  (\w+): ((?:.*)(?:\n    .*)*)", doc, flags=re.MULTILINE)
    told = {name: " ".join(text.split()) for name, text in found if name in OWN}
    assert told == {name: f"{text}." for name, text in pages.engine_meanings().items()}
    assert all(len(text) > 10 for text in told.values())


def test_the_keywords_of_chat_are_those_of_render() -> None:
    render = inspect.signature(LLM.render).parameters.values()
    names = {one.name for one in render if one.kind is one.KEYWORD_ONLY}
    assert set(ChatKeywords.__annotations__) == names


@pytest.mark.parametrize("page", ["arguments.md", "from_vllm.md"])
def test_the_generated_pages_are_up_to_date(page: str) -> None:
    made = pages.arguments_page() if page == "arguments.md" else pages.migration_page()
    stored = (ROOT / "docs" / page).read_text(encoding="utf-8")
    assert stored == made, "run `python docs/pages.py`"


def test_every_argument_has_its_line_on_the_page() -> None:
    page = pages.arguments_page()
    names = [*OWN, *(field.name for field in fields(jinfer.SamplingParams))]
    for name in names:
        assert re.search(rf"^\| `{name}` \| `.+` \| .* \| .+ \|$", page, re.MULTILINE), name
