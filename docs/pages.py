"""Writes the generated pages `docs/arguments.md` and `docs/from_vllm.md`, and LLM's docstring.

Run `python docs/pages.py` after a change to an argument; tests compare the files with what it
would write.
"""

import ast
import inspect
import re
import textwrap
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

from jinfer import config
from jinfer.arguments.vllm_older import OLDER
from jinfer.arguments.vllm_rows import Row, Rows
from jinfer.arguments.vllm_table import TABLE, VLLM_VERSION
from jinfer.config import EngineConfig
from jinfer.request import vllm_params
from jinfer.request.params import SamplingParams

DOCS = Path(__file__).resolve().parent
LLM_FILE = DOCS.parent / "jinfer" / "llm.py"
_MADE = "<!-- Made by `python docs/pages.py`; edit the sources, not this page. -->\n"


def engine_meanings() -> dict[str, str]:
    """What each field of `EngineConfig` means: the comment behind it, or those above it."""
    source = inspect.getsource(config)
    lines = source.splitlines()
    classes = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
    body = next(node for node in classes if node.name == EngineConfig.__name__).body
    return {
        node.target.id: _comment_of(lines, node.lineno - 1)
        for node in body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }


def sampling_meanings() -> dict[str, str]:
    """What each parameter of `SamplingParams` means, from its docstring."""
    section = inspect.cleandoc(SamplingParams.__doc__ or "").split("\nArgs:\n")[1].split("\n\n")[0]
    found = re.findall(r"^  (\w+): (.*(?:\n    .*)*)", section, flags=re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in found}


def keyword_lines() -> str:
    """The "Args:" of `LLM`: every engine argument with its meaning, wrapped."""
    return "\n".join(
        textwrap.fill(
            f"{name}: {meaning}.",
            width=100,
            initial_indent=" " * 6,
            subsequent_indent=" " * 8,
            break_on_hyphens=False,
        )
        for name, meaning in engine_meanings().items()
    )


def with_keywords(source: str) -> str:
    """The source of `jinfer/llm.py` with these lines in the docstring of `LLM`."""
    before, rest = source.split("    Args:\n      model: ", 1)
    behind = rest.split("      Further keywords", 1)[1]
    return f"{before}    Args:\n{keyword_lines()}\n      Further keywords{behind}"


def arguments_page() -> str:
    """The page `docs/arguments.md`."""
    return "\n".join(
        [
            _MADE,
            "# Arguments\n",
            "## Of the engine\n",
            "Keywords of `LLM` and `AsyncLLM`, keys of a YAML file, and flags of the command line "
            "(`--max-num-seqs`; `--engine-seed` for `seed`). None: jinfer decides from the "
            "checkpoint and the hardware. [`from_vllm.md`](from_vllm.md) lists vLLM's arguments.\n",
            *_table(fields(EngineConfig), engine_meanings()),
            "\n## Of a request\n",
            "Keywords of `SamplingParams`, and flags of the command line.\n",
            *_table(fields(SamplingParams), sampling_meanings()),
            "",
        ]
    )


def migration_page() -> str:
    """The page `docs/from_vllm.md`."""
    own = {name: row for name, row in TABLE.items() if row.own}
    return "\n".join(
        [
            _MADE,
            "# From vLLM\n",
            _MOVING,
            f"## Arguments of vLLM {VLLM_VERSION} that jinfer has\n",
            *_own_table(own),
            "\n## Accepted with any value\n",
            "The value makes no difference in jinfer.\n",
            *_note_table({name: row for name, row in TABLE.items() if row.any_value}),
            "\n## Accepted at some values\n",
            "jinfer takes the values that describe what it does, and None. It refuses others in "
            "one message that lists all of them.\n",
            *_only_table({name: row for name, row in TABLE.items() if row.accepts}),
            "\n## Fields of vLLM's SamplingParams that jinfer's does not have\n",
            "Accepted at the values that change nothing.\n",
            *_settled_table(),
            "\n## Engine arguments of earlier versions\n",
            *_own_table({name: row for name, row in OLDER.items() if row.own}),
            "",
            *_note_table({name: row for name, row in OLDER.items() if row.any_value}),
            "",
            *_only_table({name: row for name, row in OLDER.items() if row.accepts}),
            "",
        ]
    )


def _comment_of(lines: list[str], index: int) -> str:
    behind = re.search(r"  # (.*)$", lines[index])
    if behind:
        return behind[1].rstrip(".")
    above: list[str] = []
    while lines[index - 1].strip().startswith("# "):
        index -= 1
        above.insert(0, lines[index].strip().removeprefix("# "))
    return " ".join(above).rstrip(".")


def _table(of: tuple[Field[Any], ...], meanings: dict[str, str]) -> list[str]:
    head = ["| argument | type | default | meaning |", "|---|---|---|---|"]
    return head + [
        f"| `{one.name}` | `{_type_name(one)}` | {_default(one)} | {_cell(meanings[one.name])} |"
        for one in of
    ]


def _type_name(one: Field[Any]) -> str:
    name = one.type if isinstance(one.type, str) else inspect.formatannotation(one.type)
    return re.sub(r"\b(?:pathlib|collections\.abc|jinfer\.[\w.]+?|typing)\.", "", name).replace(
        "|", "\\|"
    )


def _default(one: Field[Any]) -> str:
    if one.default is MISSING:
        return ""
    return f"`{getattr(one.default, 'name', None) or repr(one.default)}`"


def _own_table(rows: Rows) -> list[str]:
    head = ["| vLLM | jinfer | vLLM's default | difference |", "|---|---|---|---|"]
    return head + [
        f"| `{name}` | `{row.own}` | `{row.default!r}` | {_cell(row.note)} |"
        for name, row in rows.items()
    ]


def _note_table(rows: Rows) -> list[str]:
    head = ["| vLLM | why |", "|---|---|"]
    return head + [
        f"| {', '.join(f'`{name}`' for name in names)} | {_cell(note)} |"
        for note, names in _by_note(rows).items()
    ]


def _only_table(rows: Rows) -> list[str]:
    head = ["| vLLM | accepted | why no other |", "|---|---|---|"]
    return head + [
        f"| `{name}` | {_values(row)} | {_cell(row.note)} |" for name, row in rows.items()
    ]


def _settled_table() -> list[str]:
    head = ["| vLLM | accepted | instead of other values |", "|---|---|---|"]
    return head + [
        f"| `{name}` | {', '.join(f'`{value!r}`' for value in accepted)} | {_cell(advice)} |"
        for name, (accepted, advice) in vllm_params._SETTLED.items()
    ]


def _by_note(rows: Rows) -> dict[str, list[str]]:
    names: dict[str, list[str]] = {}
    for name, row in rows.items():
        names.setdefault(row.note, []).append(name)
    return names


def _values(row: Row) -> str:
    listed = [value for value in row.accepts if value is not None] or [None]
    return ", ".join(f"`{value!r}`" for value in listed)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


_MOVING = """\
Replace `vllm` with `jinfer` in the imports:

```python
from jinfer import LLM, SamplingParams, EngineArgs, AsyncEngineArgs, AsyncLLMEngine
from jinfer import TextPrompt, TokensPrompt, PromptType, RequestOutput, CompletionOutput
from jinfer.sampling_params import RequestOutputKind
from jinfer.inputs import SingletonPrompt
```

Install jinfer beside vLLM or without it; no torch is needed. A script then runs unless it asks for
something that jinfer cannot do. One error names all such arguments of `LLM(...)`. Methods that
jinfer lacks, such as `beam_search` and `sleep`, raise `NotImplementedError`, which says what to use
instead; `hasattr` is False for them.

These things differ:

- `SamplingParams(max_tokens=None)` is the default: until the model stops or the context ends. In
  vLLM it is 16.
- `SamplingParams` cannot be changed in place: `params = params.replace(temperature=0.5)`. A
  temperature between 0 and 1e-5 is refused; vLLM takes 0.01 for one between 0 and 0.01.
- `bad_words` bans every spelling of a word, not only the tokenizer's own.
- A stop string that is exactly one special token ends the output, even if the text leaves
  special tokens out.
- `gpu_memory_utilization` is a fraction of the memory that is free at start-up, 0.9 by default. In
  vLLM it is a fraction of the whole GPU, 0.92 by default.
- `max_model_len=None` takes as much of the trained context as fits into memory. In vLLM the start
  fails if the whole context does not fit.
- `dtype="auto"` is bfloat16 on TPUs and GPUs, and float32 on CPUs, whatever the checkpoint stores.
- Weights and KV cache stay until `close()`, or the end of `with LLM(...) as llm:`. `del llm` is not
  needed, and there is no `sleep`.
- A bad prompt need not end the others: with `generate(..., on_error="return")` its output has an
  `error`.
- `AsyncLLM` may skip intermediate outputs if the caller reads slowly, never the last.
- `priority` always counts; there is no need for `scheduling_policy="priority"`.
- `RequestOutput.metrics` is always filled, also offline.
"""


def main() -> None:
    """Writes both pages and the docstring."""
    LLM_FILE.write_text(with_keywords(LLM_FILE.read_text(encoding="utf-8")), encoding="utf-8")
    (DOCS / "arguments.md").write_text(arguments_page(), encoding="utf-8")
    (DOCS / "from_vllm.md").write_text(migration_page(), encoding="utf-8")


if __name__ == "__main__":
    main()
