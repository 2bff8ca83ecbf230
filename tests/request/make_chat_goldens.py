"""Writes chat_goldens.json: what transformers makes of every template of the test data.

Run with transformers installed: python tests/request/make_chat_goldens.py <data>/chat_templates
"""

import json
import sys
from pathlib import Path

GOLDENS = Path(__file__).with_name("chat_goldens.json")
VARIABLES = {"date_string": "26 Jul 2024"}
SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
_TALK = [
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": 'It is  4. "Four" <b> é\n'},
    {"role": "user", "content": " And 3 + 3? "},
]
_TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": 'Tells the weather, "now".',
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "Where <é>"}},
            "required": ["city"],
        },
    },
}
_CALL = {"name": "weather", "arguments": {"city": "Zürich"}}
_TOOL_TALK = [
    {"role": "user", "content": "Weather in Zürich?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "abcdefghi", "type": "function", "function": _CALL}],
    },
    {"role": "tool", "tool_call_id": "abcdefghi", "name": "weather", "content": "sunny"},
]
_SYSTEM = {"role": "system", "content": "Be brief."}
CASES = {
    "talk": (_TALK, {}),
    "talk_prompt": (_TALK, {"add_generation_prompt": True}),
    "system_prompt": ([_SYSTEM, *_TALK], {"add_generation_prompt": True}),
    "continue": (_TALK[:2], {"continue_final_message": True}),
    "continue_space": (
        [_TALK[0], {"role": "assistant", "content": "So "}],
        {"continue_final_message": True},
    ),
    "tools": (_TALK, {"tools": [_TOOL], "add_generation_prompt": True}),
    "tool_talk": (_TOOL_TALK, {"tools": [_TOOL], "add_generation_prompt": True}),
    "roles_wrong": ([_TALK[0], _TALK[0]], {}),
}


def main(folder: Path) -> None:
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    library = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<s>": 0, "</s>": 1}, "<s>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=library, **SPECIAL_TOKENS)
    goldens = {}
    for path in sorted(folder.rglob("*.jinja")):
        rows = goldens[path.relative_to(folder).as_posix()] = {}
        for name, (messages, options) in CASES.items():
            try:
                text = tokenizer.apply_chat_template(
                    messages,
                    chat_template=path.read_text(encoding="utf-8"),
                    tokenize=False,
                    **options,
                    **VARIABLES,
                )
                rows[name] = {"text": text}
            except Exception as error:
                rows[name] = {"error": type(error).__name__}
    GOLDENS.write_text(json.dumps(goldens, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
