"""Renders chat templates in a separate process with hard limits.

`chat.py` runs this file as a script and never imports it. A template is code from a checkpoint, and
no check inside one process stops every `'a' * 10**10` or endless loop; the kernel's limits do. This
file imports only the standard library and jinja2.

Arguments: a socket's file descriptor, then the folders to import from.
"""

import datetime
import functools
import json
import resource
import signal
import sys
from multiprocessing.connection import Connection

if __name__ == "__main__":
    sys.path.extend(path for path in sys.argv[2:] if path not in sys.path)

from jinja2 import Template, TemplateError, TemplateSyntaxError, nodes  # noqa: E402
from jinja2.ext import Extension, loopcontrols  # noqa: E402
from jinja2.parser import Parser  # noqa: E402
from jinja2.sandbox import ImmutableSandboxedEnvironment  # noqa: E402

_END_OF_TEXT = "<<end of the message to continue>> "


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
def _compiled(source: str) -> tuple[Template, bool]:
    """The template, and whether it reads content as a list of parts."""
    env = _environment()
    tree = env.parse(source)
    reads_parts = _reads_parts(tree)
    return env.from_string(tree), reads_parts


def _reads_parts(tree: nodes.Template) -> bool:
    """Whether a loop runs over a message's content, directly or through a variable."""
    names = {
        node.target.name
        for node in tree.find_all(nodes.Assign)
        if isinstance(node.target, nodes.Name) and _is_content(node.node, frozenset())
    }
    return any(_is_content(node.iter, names) for node in tree.find_all(nodes.For))


def _is_content(node: nodes.Node | None, names: set[str] | frozenset[str]) -> bool:
    while isinstance(node, nodes.Filter):
        node = node.node
    if isinstance(node, nodes.Name):
        return node.name in names
    if isinstance(node, nodes.Getattr):
        return node.attr == "content"
    if isinstance(node, nodes.Getitem):
        return isinstance(node.arg, nodes.Const) and node.arg.value == "content"
    return False


def _join_parts(messages: list[dict]) -> None:
    for message in messages:
        if isinstance(message.get("content"), list):
            message["content"] = "\n".join(part["text"] for part in message["content"])


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
    """Renders one job: template, messages, variables, continue_final_message, max_chars."""
    template, reads_parts = _compiled(job["template"])
    messages = job["messages"]
    if not reads_parts:
        _join_parts(messages)
    continued = _mark_end(messages[-1]) if job["continue_final_message"] else None
    pieces, num_chars = [], 0
    for piece in template.generate(messages=messages, **job["variables"]):
        num_chars += len(piece)
        if num_chars > job["max_chars"]:
            raise RefusedError("size", "")
        pieces.append(piece)
    text = "".join(pieces)
    return text if continued is None else _cut_at_mark(text, continued)


def answer(job: dict) -> dict[str, str]:
    """Returns the rendered text, or the kind and details of the failure."""
    try:
        return {"text": render(job)}
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
