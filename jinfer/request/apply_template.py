"""From the arguments of a chat, as vLLM and Hugging Face name them, to one prompt."""

from collections.abc import Mapping
from typing import Any

from jinfer.errors import RequestError, shown
from jinfer.request.chat import ChatRenderer, choose_template

# Of chat_template_kwargs: arguments that it may give as well, and names it must not give.
_ARGUMENTS = ("add_generation_prompt", "continue_final_message", "tools", "documents")
_RESERVED = ("messages", "chat_template", "tokenize")


def apply_template(
    renderer: ChatRenderer,
    templates: Mapping[str, str],
    special_tokens: Mapping[str, str],
    messages: Any,
    *,
    chat_template: str | None = None,
    chat_template_content_format: str = "auto",
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    tools: Any = None,
    documents: Any = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> str:
    """Returns the prompt of one conversation.

    Args:
      renderer: renders the template.
      templates: the checkpoint's templates by name.
      special_tokens: the tokenizer's special tokens by name, such as bos_token.
      messages: dicts with "role" and "content".
      chat_template: source or name of a template; None = "tool_use" with tools, or "default".
      chat_template_content_format: "auto", "string" or "openai", as in `ChatRenderer.render`.
      add_generation_prompt: ends with the header of the assistant's turn.
      continue_final_message: ends inside the last message; overrides add_generation_prompt.
      tools: functions the model may call, as JSON schemas.
      documents: texts for retrieval.
      chat_template_kwargs: further variables of the template; as in vLLM, an argument of this
        function that it names has the value given here.

    Raises:
      RequestError: there is no template, it rejects the messages, or it exceeds a limit.
    """
    arguments = {
        "add_generation_prompt": add_generation_prompt,
        "continue_final_message": continue_final_message,
        "tools": tools,
        "documents": documents,
    }
    variables = _checked_kwargs(chat_template_kwargs)
    arguments |= {name: variables.pop(name) for name in _ARGUMENTS if name in variables}
    if arguments["continue_final_message"]:
        arguments["add_generation_prompt"] = False
    if chat_template is None or (isinstance(chat_template, str) and "{" not in chat_template):
        chat_template = choose_template(templates, name=chat_template, tools=arguments["tools"])
    return renderer.render(
        chat_template,
        messages,
        content_format=chat_template_content_format,
        variables=variables,
        special_tokens={"bos_token": "", "eos_token": "", **special_tokens},
        **arguments,
    )


def _checked_kwargs(given: Any) -> dict[str, Any]:
    if not isinstance(given, Mapping | None):
        raise RequestError(
            f"chat_template_kwargs must be a dict; got {shown(given)}. "
            'Pass such as {"enable_thinking": False}.'
        )
    variables = {} if given is None else dict(given)
    for name in variables:
        if not isinstance(name, str) or name in _RESERVED:
            raise RequestError(
                "chat_template_kwargs must name variables of the template, other than "
                f"{', '.join(_RESERVED)}; got {shown(name)}. Pass it as an argument of its own, "
                "or leave it out."
            )
    return variables
