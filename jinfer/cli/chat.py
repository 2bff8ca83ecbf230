"""`jinfer chat`: a conversation in the terminal."""

import re
import sys
from argparse import Namespace
from dataclasses import replace

from jinfer.cli.arguments import engine_args, sampling_args
from jinfer.cli.flag_defaults import MAX_TOKENS
from jinfer.cli.interrupt import at_once
from jinfer.cli.keyboard import prepare_input, read_message
from jinfer.cli.profile import profiled, require_profile_folder
from jinfer.cli.screen import counted, note, show
from jinfer.errors import RequestError
from jinfer.llm import LLM
from jinfer.request.output import RequestOutput
from jinfer.request.params import SamplingParams
from jinfer.request.prompt import Prompt

_HELP = """\
/reset   forget the conversation        /quit   end (as does Ctrl-D)
/last N  keep only the last N turns     /help   this list
Ctrl-C stops an answer. A line that ends in \\ goes on in the next one; lines between two \"\"\" are
one message, and so are pasted lines, where the terminal marks a paste.
"""
_GREETING = 'for several lines paste them, end a line with \\, or write between two """'
STEP_TOKENS = 128  # one of generate's sizes, to share programs; most messages fit in a step or two
# Part of the context for an answer: the limit by default, and what /last N, as proposed, leaves.
ROOM_SHARE = 0.25

_PROBE = "Hello."  # a message whose answer nobody wants
_COMMAND = re.compile(r"/\w+")  # not the path /home/user

Messages = list[dict[str, str]]


def chat(args: Namespace) -> int:
    """Talks until the user ends it; returns 0."""
    chosen = sampling_args(args)
    SamplingParams(**chosen)  # raises before the model is loaded
    require_profile_folder(args.profile)
    asked = {"max_num_seqs": 1, **engine_args(args)}
    asked.setdefault("max_num_batched_tokens", max(STEP_TOKENS, asked["max_num_seqs"]))
    with at_once(lambda: LLM(args.model, **asked)) as llm:
        params = replace(llm.get_default_sampling_params(), **chosen)
        if params.max_tokens is None:
            limit = min(MAX_TOKENS["chat"], int(llm.engine.plan.max_model_len * ROOM_SHARE))
            params = replace(params, max_tokens=max(limit, params.min_tokens))
        conversation = Conversation(llm, params, system=args.system)
        if not args.quiet:
            note(f"chat with {args.model}; /help lists the commands")
            note(_GREETING)
        with profiled(args.profile):
            return conversation.run()


class Conversation:
    """The turns so far, and the loop that adds to them.

    A turn is a message of the user and its answer.

    Raises:
      RequestError: the model has no chat template, or its template refuses the system message.
    """

    def __init__(self, llm: LLM, params: SamplingParams, *, system: str | None) -> None:
        self._llm, self._params = llm, params
        self._max_len = llm.engine.plan.max_model_len
        self._first: Messages = [] if system is None else [{"role": "system", "content": system}]
        self._turns: list[Messages] = []
        self._unanswered: str | None = None  # a message for which the context has no room
        llm.render(self._with(_PROBE))

    def run(self) -> int:
        """Reads messages and answers them until /quit or the end of the input."""
        prepare_input()
        while True:
            try:
                message = read_message()
            except EOFError:
                show("\n" if sys.stdin.isatty() and sys.stdout.isatty() else "")
                return 0
            except KeyboardInterrupt:
                show("\n" if sys.stdout.isatty() else "")
                note("/quit or Ctrl-D ends the chat")
                continue
            if message == "/quit":
                return 0
            self._obey(message)

    def _obey(self, message: str) -> None:
        command, _, argument = message.partition(" ")
        if message == "/help":
            show(_HELP)
        elif message == "/reset":
            self._turns, self._unanswered = [], None
            note("the conversation is forgotten")
        elif command == "/last":
            self._keep_last(argument.strip())
        elif _COMMAND.fullmatch(command) and "\n" not in message:
            note(f"there is no such command; got {command}. /help lists them.")
        elif message:
            self._answer(message)

    def _keep_last(self, argument: str) -> None:
        """Forgets all turns but the last ones; then answers a message that had no room."""
        if not (argument.isascii() and argument.isdigit() and int(argument[:9])):
            note(f"/last takes a number of turns from 1 on; got {argument!r}. Write /last 2.")
            return
        kept = min(int(argument[:9]), len(self._turns))
        self._turns = self._turns[len(self._turns) - kept :]
        note(f"going on from the last {counted(kept, 'turn')}")
        if self._unanswered is not None:
            self._answer(self._unanswered)

    def _answer(self, message: str) -> None:
        self._unanswered = None
        try:
            message.encode()  # raises for bytes that are not UTF-8
            self._answer_or_offer(message)
        except UnicodeEncodeError:
            note("error: a message must be UTF-8 text; got other bytes. Convert it.")
        except RequestError as error:
            note(f"error: {error} /reset begins anew.")

    def _answer_or_offer(self, message: str) -> None:
        """Answers if the context has room for it; else offers to go on from the last turns."""
        prompt = self._llm.render(self._with(message))
        if len(prompt.token_ids or ()) >= self._max_len:
            self._offer_room(message)
            return
        output = self._stream(prompt)
        if output is None:
            return
        completion = output.outputs[0]
        if completion.text:
            answer = {"role": "assistant", "content": completion.text}
            self._turns.append([{"role": "user", "content": message}, answer])
        if completion.finish_reason == "length":
            self._tell_cut(output)

    def _with(self, message: str, num_turns: int | None = None) -> Messages:
        """All messages to send: the system message, the last turns (None = all), a new message."""
        turns = self._turns if num_turns is None else self._turns[len(self._turns) - num_turns :]
        said = [one for turn in turns for one in turn]
        return [*self._first, *said, {"role": "user", "content": message}]

    def _num_tokens(self, message: str, num_turns: int) -> int:
        return len(self._llm.render(self._with(message, num_turns)).token_ids or ())

    def _tell_cut(self, output: RequestOutput) -> None:
        num_tokens = len(output.outputs[0].token_ids)
        if len(output.prompt_token_ids) + num_tokens >= self._max_len:
            self._say_full(self._turns_that_fit(_PROBE))
        else:
            note(f"the answer was cut after {counted(num_tokens, 'token')}; raise --max-tokens")

    def _offer_room(self, message: str) -> None:
        """Says that the message does not fit, and which turns would leave room for it."""
        if self._num_tokens(message, 0) >= self._max_len:
            note(
                f"error: a message must leave room in the context of {self._max_len:,} tokens; "
                "got a longer one. Shorten it."
            )
            return
        self._unanswered = message
        self._say_full(self._turns_that_fit(message))

    def _say_full(self, num_turns: int) -> None:
        """Says that the context is full, and what the user may do.

        Args:
          num_turns: the last turns that leave room; 0 = none do.
        """
        last = ""
        if num_turns:
            answers = "answers" if self._unanswered is not None else "goes on"
            last = f"/last {num_turns} {answers} with the last {counted(num_turns, 'turn')} alone, "
        note(f"the context of {self._max_len:,} tokens is full: {last}/reset begins anew")

    def _turns_that_fit(self, message: str) -> int:
        """The most turns that leave ROOM_SHARE of the context for an answer; fewer than all."""
        most_tokens = self._max_len * (1 - ROOM_SHARE)
        fitting, too_many = 0, len(self._turns)
        while too_many - fitting > 1:
            middle = (fitting + too_many) // 2
            if self._num_tokens(message, middle) <= most_tokens:
                fitting = middle
            else:
                too_many = middle
        return fitting

    def _stream(self, prompt: Prompt) -> RequestOutput | None:
        """The answer, or the part of it that came before Ctrl-C; None for nothing."""
        shown, output = "", None
        has_screen = sys.stdout.isatty()
        try:
            # Ctrl-C leaves the loop, which ends the request.
            for output in self._llm.stream(prompt, self._params):
                grown = output.outputs[0].text
                show(grown[len(shown) :])
                shown = grown
        except RequestError:
            show("\n")  # the error gets a line of its own
            raise
        except KeyboardInterrupt:
            if has_screen:
                show(" [stopped]")
            else:
                note("stopped")
        show("\n\n" if has_screen and sys.stdin.isatty() else "\n")
        return output
