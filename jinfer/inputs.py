"""Types of prompts, under vLLM's names: `from jinfer.inputs import TokensPrompt`."""

from typing import Any, NotRequired, TypedDict

from jinfer.arguments.vllm_methods import missing_name

__all__ = ["PromptType", "SingletonPrompt", "TextPrompt", "TokensPrompt"]


class TextPrompt(TypedDict):
    """A prompt as text."""

    prompt: str
    cache_salt: NotRequired[str]  # only prompts with the same salt share cached prefixes


class TokensPrompt(TypedDict):
    """A prompt as token ids; they count, and `prompt` is only repeated in the output."""

    prompt_token_ids: list[int]
    prompt: NotRequired[str]
    cache_salt: NotRequired[str]


SingletonPrompt = str | list[int] | TextPrompt | TokensPrompt
PromptType = SingletonPrompt


def __getattr__(name: str) -> Any:
    raise missing_name(__name__, name)
