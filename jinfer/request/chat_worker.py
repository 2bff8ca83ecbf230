"""Renders chat templates in a separate process with hard limits.

`chat.py` runs this file as a script and never imports it. A template is code from a checkpoint, and
no check inside one process stops every `'a' * 10**10` or endless loop; the kernel's limits do. This
file imports only the standard library and jinja2.

Arguments: a socket's file descriptor, then the folders to import from.
"""

import datetime
import functools
import json
import re
import resource
import signal
import sys
from multiprocessing.connection import Connection

if __name__ == "__main__":
    sys.path.extend(path for path in sys.argv[2:] if path not in sys.path)

from jinja2 import Template, TemplateError, TemplateSyntaxError, meta, nodes  # noqa: E402
from jinja2.ext import Extension, loopcontrols  # noqa: E402
from jinja2.parser import Parser  # noqa: E402
from jinja2.sandbox import ImmutableSandboxedEnvironment  # noqa: E402

_END_OF_TEXT = "<<end of the message to continue>> "
_MARKS = ("qzfirstqz", "qzsecondqz")  # texts of a probe, which no template writes itself


class RefusedError(Exception):
    """No text was rendered; the arguments are kind and details, both strings."""


class RaisedByTemplateError(TemplateError):
    """The template called raise_exception."""


class GenerationTag(Extension):
    """`{% generation %}...{% endgeneration %}` marks the assistant's text; renders its body."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return [nodes.Scope(body, lineno=parser.stream.current.lineno)]


def _raise_exception(message: object) -> None:
    raise RaisedByTemplateError(str(message))


def _strftime_now(style: str) -> str:
    return datetime.datetime.now().strftime(style)


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    # jinja2's own filter escapes HTML, which is wrong for a model's prompt.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _environment() -> ImmutableSandboxedEnvironment:
    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols]
    )
    env.filters["tojson"] = _to_json
    env.globals["raise_exception"] = _raise_exception
    env.globals["strftime_now"] = _strftime_now
    return env


@functools.lru_cache(maxsize=8)
def _compiled(source: str) -> tuple[Template, list[str]]:
    """The template, and the names that it can read."""
    env = _environment()
    tree = env.parse(source)
    names = sorted(meta.find_undeclared_variables(tree))
    return env.from_string(tree), names


@functools.lru_cache(maxsize=16)
def _reads_parts(source: str, role: str, variables: str) -> bool:
    """Whether the template shows the texts of a role's content that is a list of parts.

    Decided by rendering a small chat. A template that does not show such a message at all (it
    refuses the role, for example) is taken to treat it as it treats a user's.

    Args:
      source: the template.
      role: the role of the message.
      variables: JSON of the chat's variables, without which a template may fail.
    """
    parts = [{"type": "text", "text": mark} for mark in _MARKS]
    if _shows_marks(source, _probe(role, parts), variables):
        return True
    if role == "user" or _shows_marks(source, _probe(role, " ".join(_MARKS)), variables):
        return False
    return _reads_parts(source, "user", variables)


def _shows_marks(source: str, messages: list[dict], variables: str) -> bool:
    """Whether the rendered messages hold the marks as text, not as Python or JSON of a part."""
    template, _ = _compiled(source)
    given = {"bos_token": "", "eos_token": "", **json.loads(variables)}
    try:
        text = template.render(messages=messages, tools=None, documents=None, **given)
    except Exception:  # a template is a program and can raise anything; it shows nothing then
        return False
    is_part = re.search(rf"""['"]text\\*['"]: *\\*['"]{_MARKS[0]}""", text)
    return all(mark in text for mark in _MARKS) and is_part is None


def _probe(role: str, content: object) -> list[dict]:
    """A short chat with one message of this role and content."""
    question = {"role": "user", "content": "question"}
    message = {"role": role, "content": content}
    call = {"id": "call00000", "type": "function", "function": {"name": "f", "arguments": {}}}
    match role:
        case "user":
            return [message]
        case "system" | "developer":
            return [message, question]
        case "assistant":
            return [question, message, question]
        case _:  # the answer to a call of a tool
            called = {"role": "assistant", "content": "", "tool_calls": [call]}
            return [question, called, {**message, "tool_call_id": call["id"], "name": "f"}]


def _set_contents(job: dict) -> None:
    """Joins lists of parts, or makes texts into lists, as the job or the template wants it."""
    wanted = job["content_format"]
    variables = {k: v for k, v in job["variables"].items() if k not in ("tools", "documents")}
    said = json.dumps(variables, sort_keys=True)
    for message in job["messages"]:
        content = message.get("content")
        if isinstance(content, str) and wanted == "openai":
            message["content"] = [{"type": "text", "text": content}]
        elif isinstance(content, list) and wanted != "openai":
            if wanted == "string" or not _reads_parts(job["template"], message["role"], said):
                message["content"] = "\n".join(part["text"] for part in content)


def _mark_end(message: dict) -> str:
    """Appends the mark to the text to continue; returns that text."""
    content = message["content"]
    if isinstance(content, list):
        text = content[-1]["text"]
        content[-1]["text"] = text + _END_OF_TEXT
        return text
    message["content"] = content + _END_OF_TEXT
    return content


def _cut_at_mark(text: str, continued: str) -> str:
    """Cuts the prompt at the mark; trailing space stays only if the template keeps it."""
    mark = _END_OF_TEXT.strip()
    if mark not in text or continued.strip() not in text:
        raise RefusedError("continue", "")
    at = text.rindex(mark)
    # If the template trimmed the space after the mark, it would trim the text's space too.
    kept = text[at : at + len(_END_OF_TEXT)] == _END_OF_TEXT
    return text[:at] if kept else text[:at].rstrip()


def render(job: dict) -> str:
    """Renders one job, as `chat.py` makes it."""
    template, _ = _compiled(job["template"])
    _set_contents(job)
    messages = job["messages"]
    continued = _mark_end(messages[-1]) if job["continue_final_message"] else None
    pieces, num_chars = [], 0
    for piece in template.generate(messages=messages, **job["variables"]):
        num_chars += len(piece)
        if num_chars > job["max_chars"]:
            raise RefusedError("size", "")
        pieces.append(piece)
    text = "".join(pieces)
    return text if continued is None else _cut_at_mark(text, continued)


def answer(job: dict) -> dict[str, object]:
    """Returns the text and the names the template can read, or the failure's kind and details."""
    try:
        return {"text": render(job), "names": _compiled(job["template"])[1]}
    except RefusedError as refused:
        return {"error": refused.args[0], "details": refused.args[1]}
    except RaisedByTemplateError as error:
        return {"error": "raised", "details": str(error)[:500]}
    except TemplateSyntaxError as error:
        return {"error": "syntax", "details": f"{error.message} at line {error.lineno}"[:500]}
    except (MemoryError, RecursionError) as error:
        return {"error": "limit", "details": type(error).__name__}
    except Exception as error:  # a template is a program and can raise anything
        return {"error": "failed", "details": f"{type(error).__name__}: {error}"[:500]}


def main(connection: Connection) -> None:
    """Answers jobs until the connection closes. Exceeding a limit ends the process."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    while True:
        try:
            job = json.loads(connection.recv_bytes())
        except EOFError:
            return
        if sys.platform == "linux":  # macOS does not enforce this limit
            resource.setrlimit(resource.RLIMIT_AS, (job["max_bytes"], job["max_bytes"]))
        # Processor time, not wall time: templates must not fail on a busy machine.
        signal.setitimer(signal.ITIMER_PROF, job["max_cpu_s"])
        reply = answer(job)
        signal.setitimer(signal.ITIMER_PROF, 0)
        connection.send_bytes(json.dumps(reply).encode())


if __name__ == "__main__":
    main(Connection(int(sys.argv[1])))
