"""Renders messages to one prompt with the checkpoint's chat template.

A template is a program from the checkpoint. It runs in jinja2's sandbox, in a worker process. The
kernel limits the worker's processor time and memory, so a bad template can only fail.
"""

import importlib.util
import json
import signal
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from jinfer.errors import RequestError, shown
from jinfer.request.messages import check_messages, with_text_arguments
from jinfer.request.unused import changed_jobs, warn_unused

# The longest template found in a checkpoint has 20 thousand characters.
MAX_TEMPLATE_CHARS = 1 << 18
# A context of a million tokens has about 4 million characters.
MAX_OUTPUT_CHARS = 1 << 23
MAX_INPUT_BYTES = 1 << 25
# Real templates take milliseconds; a worker needs about 60 MiB to start.
MAX_CPU_S = 1.0
MAX_MEMORY_BYTES = 1 << 29
# For a worker that is stuck without computing, or starved by other work. Counted in short waits:
# a machine that is paused for a minute loses one wait, not all.
MAX_WALL_S = 30.0
_WAIT_S = 0.25

_WORKER = Path(__file__).with_name("chat_worker.py")


class ChatRenderer:
    """Renders chat templates; owns one worker process, started at the first use.

    Thread-safe. `close()`, leaving the `with` block, or the end of the program ends the worker.
    After a template exceeds a limit, the next call starts a new worker.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._worker: _Worker | None = None
        self._checked: set[tuple[int, str]] = set()  # a template's hash, and a part of a chat

    def __enter__(self) -> "ChatRenderer":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the worker process; a later `render` starts a new one."""
        with self._lock:
            self._stop()

    def render(
        self,
        template: str,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        content_format: str = "auto",
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
        special_tokens: Mapping[str, str] | None = None,
    ) -> str:
        """Returns the prompt, as Hugging Face's `apply_chat_template` does.

        Content as a list of parts reaches the template as a list if the template shows the texts of
        such a list, and otherwise as one text, joined with newlines. Messages, tools, documents and
        variables that do not change the prompt are logged as a warning, once for each template.

        Args:
          template: jinja2 source.
          messages: dicts with "role" and "content"; content is a string or a list of
            {"type": "text", "text": ...}. The template may read further keys.
          add_generation_prompt: ends with the header of the assistant's turn.
          continue_final_message: ends inside the last message; the model continues it.
          content_format: "string" or "openai" (lists) for all contents; "auto" decides for lists.
          tools: functions the model may call, as JSON schemas.
          documents: texts for retrieval, if the template supports them.
          variables: further names the template may read, such as enable_thinking.
          special_tokens: the tokenizer's, by names such as bos_token.

        Raises:
          RequestError: messages are malformed, or the template refuses, fails or exceeds a limit.
        """
        _check_template(template)
        _check_format(content_format)
        options = {
            "tools": _as_dicts("tools", tools),
            "documents": _as_dicts("documents", documents),
            "add_generation_prompt": add_generation_prompt,
        }
        job = {
            "template": template,
            "messages": check_messages(messages),
            "variables": {**(special_tokens or {}), **(variables or {}), **options},
            "content_format": content_format,
            "continue_final_message": continue_final_message,
            "max_chars": MAX_OUTPUT_CHARS,
            "max_cpu_s": MAX_CPU_S,
            "max_bytes": MAX_MEMORY_BYTES,
        }
        if continue_final_message:
            _check_continuable(job["messages"][-1], add_generation_prompt)
        job, reply = self._rendered(job, messages)
        if "error" in reply:
            raise _explained(reply["error"], reply["details"])
        unread = set(variables or ()) - set(reply["names"])
        self._warn_of_unused(job, reply["text"], unread)
        return reply["text"]

    def _rendered(
        self, job: dict[str, Any], messages: Sequence[Mapping[str, Any]]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Renders a job; if it fails, then with the tool calls' arguments as text, if they were.

        Returns:
          The job that was rendered, and the reply; the first reply if both fail.
        """
        reply = self._ask(_as_json(job))
        if reply.get("error") not in ("failed", "raised"):
            return job, reply
        as_given = with_text_arguments(job["messages"], messages)
        if as_given is None:
            return job, reply
        with_text = {**job, "messages": as_given}
        second = self._ask(_as_json(with_text))
        return (job, reply) if "error" in second else (with_text, second)

    def _warn_of_unused(self, job: dict[str, Any], text: str, unread: Iterable[str]) -> None:
        """Logs, once for each template, the parts of a job that do not change its text."""
        template = hash(job["template"])
        for what, changed in changed_jobs(job):
            if (template, what) not in self._checked:
                self._checked.add((template, what))
                # Not `_as_json`: the check is a little larger, and must not meet the limit.
                if self._ask(json.dumps(changed).encode()).get("text") == text:
                    warn_unused(what)
        for name in sorted(unread):
            if (template, f"variable {name}") not in self._checked:
                self._checked.add((template, f"variable {name}"))
                warn_unused(f"the variable {name!r} (chat_template_kwargs)")

    def _ask(self, request: bytes) -> dict[str, Any]:
        with self._lock:
            if self._worker is None:
                self._worker = _Worker()
            try:
                reply = self._worker.ask(request)
            except BaseException:
                # Also on Ctrl-C: a late answer must not be taken for the next one.
                self._stop()
                raise
            if reply.get("error") == "limit":
                self._stop()
            return reply

    def _stop(self) -> None:
        if self._worker is not None:
            self._worker.stop()
            self._worker = None


def render_chat(template: str, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
    """Renders one chat with a worker of its own; see `ChatRenderer.render` for the options.

    Cost: starting the worker takes about 0.1 s; for many chats keep a `ChatRenderer`.
    """
    with ChatRenderer() as renderer:
        return renderer.render(template, messages, **options)


def choose_template(
    templates: Mapping[str, str], *, name: str | None = None, tools: Any = None
) -> str:
    """Chooses one of a checkpoint's templates: by name, or "tool_use" for tools, or "default".

    Raises:
      RequestError: the checkpoint has no template, or none of this name.
    """
    if name is None:
        name = "tool_use" if tools and "tool_use" in templates else "default"
    if name in templates:
        return templates[name]
    if not templates:
        raise RequestError(
            "chat needs a chat template; got a checkpoint without one. Pass chat_template=..., or "
            "use generate() with a prompt written out."
        )
    raise RequestError(
        f"chat_template must be one of {sorted(templates)}; got {name!r}. Choose one of them."
    )


def _check_continuable(message: Mapping[str, Any], add_generation_prompt: bool) -> None:
    if add_generation_prompt:
        raise RequestError(
            "continue_final_message and add_generation_prompt exclude each other; got both. "
            "Pass add_generation_prompt=False to continue the last message."
        )
    if not message.get("content"):
        raise RequestError(
            "continue_final_message needs content in the last message; got "
            f"{sorted(message)}. Begin its text, or use add_generation_prompt."
        )


def _check_template(template: Any) -> None:
    if not isinstance(template, str):
        raise RequestError(f"a chat template must be text; got {template!r:.60}. Pass a string.")
    if len(template) > MAX_TEMPLATE_CHARS:
        raise RequestError(
            f"a chat template has at most {MAX_TEMPLATE_CHARS} characters; got {len(template)}. "
            "Pass a shorter one."
        )


def _check_format(content_format: Any) -> None:
    if content_format not in ("auto", "string", "openai"):
        raise RequestError(
            "chat_template_content_format must be 'auto', 'string' or 'openai'; "
            f"got {shown(content_format)}. Leave it out, or choose one."
        )


def _as_dicts(name: str, values: Any) -> list[dict[str, Any]] | None:
    if values is None:
        return None
    if isinstance(values, str | Mapping) or not isinstance(values, Sequence):
        raise RequestError(f"{name} must be a list of dicts; got {values!r:.60}. Pass a list.")
    for value in values:
        if not isinstance(value, Mapping):
            raise RequestError(
                f"{name} must be a list of dicts; got {value!r:.60} in it. Pass JSON schemas."
            )
    return [dict(value) for value in values]


def _as_json(job: Mapping[str, Any]) -> bytes:
    try:
        request = json.dumps(job).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(
            "messages, tools and template variables must be plain JSON values; "
            f"got {error!s:.200}. Convert them to str, int, float, bool, list and dict."
        ) from None
    if len(request) > MAX_INPUT_BYTES:
        raise RequestError(
            f"a chat has at most {MAX_INPUT_BYTES} bytes; got {len(request)}. Shorten it."
        )
    return request


def _explained(kind: str, details: str) -> RequestError:
    details = details.rstrip(".")
    match kind:
        case "raised":
            return RequestError(
                f"the chat template refuses these messages; it says: {details}. "
                "Change the messages as it asks."
            )
        case "syntax":
            return RequestError(
                f"a chat template must be valid Jinja; got {details}. Pass another chat_template."
            )
        case "continue":
            return RequestError(
                "continue_final_message needs a template that writes out the last message; got one "
                "that drops or changes it. Use add_generation_prompt."
            )
        case "size":
            return RequestError(
                f"a rendered chat has at most {MAX_OUTPUT_CHARS} characters; got more. Shorten "
                "the messages, or pass another chat_template."
            )
        case "limit":
            return RequestError(
                f"a chat template must finish within {MAX_CPU_S:g} s and "
                f"{MAX_MEMORY_BYTES >> 20} MiB; got {details}. Pass another chat_template."
            )
        case _:
            return RequestError(
                f"the chat template fails on these messages; got {details}. "
                "Check their keys, or pass another chat_template."
            )


class _Worker:
    """One process of chat_worker.py and the connection to it."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-I", "-S", str(_WORKER), str(theirs.fileno())]
            self._process = subprocess.Popen(
                [*command, *_folders_of("jinja2", "markupsafe")],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # only the parent handles Ctrl-C in the terminal
            )
        self._line = Connection(ours.detach())
        self.stop = weakref.finalize(self, _end, self._process, self._line)

    def ask(self, request: bytes) -> dict[str, Any]:
        """Sends one request and returns the reply; a worker that dies is an error reply."""
        try:
            self._line.send_bytes(request)
            if not any(self._line.poll(_WAIT_S) for _ in range(int(MAX_WALL_S / _WAIT_S))):
                return {"error": "limit", "details": f"no answer in {MAX_WALL_S:g} s"}
            return json.loads(self._line.recv_bytes())
        except (EOFError, ConnectionError):
            code = self._process.wait()
        too_long = code == -signal.SIGPROF
        return {"error": "limit", "details": "more time" if too_long else f"exit status {code}"}


def _end(process: subprocess.Popen[bytes], line: Connection) -> None:
    line.close()
    process.kill()
    process.wait()


def _folders_of(*packages: str) -> list[str]:
    """Folders of the packages; the worker imports from these only."""
    folders = []
    for package in packages:
        spec = importlib.util.find_spec(package)
        assert spec is not None and spec.origin is not None, f"not installed: {package=}"
        folders.append(str(Path(spec.origin).parents[1]))
    return folders
