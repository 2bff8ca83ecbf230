"""`jinfer chat`: a conversation in the terminal."""

import importlib.util
import sys
from argparse import Namespace
from dataclasses import replace

from jinfer.cli.arguments import engine_args, sampling_args
from jinfer.cli.profile import profiled, require_profile_folder
from jinfer.cli.screen import note, show
from jinfer.errors import RequestError
from jinfer.llm import LLM
from jinfer.request.params import SamplingParams

_HELP = """\
/reset  forget the conversation    /quit  end (as does Ctrl-D)
/help   this list                  Ctrl-C stops an answer
"""
STEP_TOKENS = 64  # few programs to compile; most messages fit in a step or two


def chat(args: Namespace) -> int:
    """Talks until the user ends it; returns 0."""
    chosen = sampling_args(args)
    SamplingParams(**chosen)  # raises before the model is loaded
    require_profile_folder(args.profile)
    asked = {"max_num_seqs": 1, **engine_args(args)}
    asked.setdefault("max_num_batched_tokens", max(STEP_TOKENS, asked["max_num_seqs"]))
    with LLM(args.model, **asked) as llm:
        params = replace(llm.get_default_sampling_params(), **chosen)
        conversation = Conversation(llm, params, system=args.system)
        if not args.quiet:
            note(f"chat with {args.model}; /help lists the commands")
        with profiled(args.profile):
            return conversation.run()


class Conversation:
    """The messages so far, and the loop that adds to them.

    Raises:
      RequestError: the model has no chat template, or its template refuses the system message.
    """

    def __init__(self, llm: LLM, params: SamplingParams, *, system: str | None) -> None:
        self._llm, self._params = llm, params
        self._first = [] if system is None else [{"role": "system", "content": system}]
        self._messages = list(self._first)
        llm.render([*self._messages, {"role": "user", "content": "Hello."}])

    def run(self) -> int:
        """Reads lines and answers them until /quit or the end of the input."""
        if importlib.util.find_spec("readline") is not None:
            importlib.import_module("readline")  # gives input() its editing and history
        while True:
            try:
                line = input("> " if sys.stdin.isatty() else "").strip()
            except EOFError:
                show("\n" if sys.stdin.isatty() else "")
                return 0
            except KeyboardInterrupt:
                show("\n")
                note("/quit or Ctrl-D ends the chat")
                continue
            if line == "/quit":
                return 0
            self._obey(line)

    def _obey(self, line: str) -> None:
        if line == "/help":
            show(_HELP)
        elif line == "/reset":
            self._messages = list(self._first)
            note("the conversation is forgotten")
        elif line.startswith("/"):
            note(f"there is no such command; got {line}. /help lists them.")
        elif line:
            self._answer(line)

    def _answer(self, line: str) -> None:
        asked = [*self._messages, {"role": "user", "content": line}]
        try:
            answer = self._stream(asked)
        except RequestError as error:  # usually the context is full
            note(f"error: {error} /reset begins anew.")
            return
        if answer:
            self._messages = [*asked, {"role": "assistant", "content": answer}]

    def _stream(self, messages: list[dict[str, str]]) -> str:
        """The answer, or the part of it that came before Ctrl-C."""
        text = ""
        try:
            # Ctrl-C leaves the loop, which ends the request.
            for output in self._llm.stream(self._llm.render(messages), self._params):
                grown = output.outputs[0].text
                show(grown[len(text) :])
                text = grown
        except KeyboardInterrupt:
            show(" [stopped]")
        show("\n\n" if sys.stdin.isatty() else "\n")
        return text
