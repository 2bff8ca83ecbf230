"""How large a step may be for the sake of those who watch: targets for TTFT and TPOT."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from jinfer.schedule.capacity import bucket_for, step_fills
from jinfer.schedule.step_times import StepTimes

# Dispatches that an arriving prompt may have before it: the one that runs, and the one queued
# behind it. Together they may take half of the time to its first token.
_SHARE_OF_DISPATCH = 0.25


@dataclass(frozen=True, slots=True)
class Awaited:
    """A prompt whose first token somebody waits for."""

    num_tokens: int  # that are still to be computed
    deadline_s: float  # when the first token is due


class Pace:
    """Limits the size of steps so that first tokens and further tokens come in time.

    The rules:

    1. Where nobody decodes, a step is as large as the budget allows.
    2. With a TPOT target, a step in which somebody decodes has the largest size that is predicted
       to stay within it; but never so small that no prompt gets on: beside the decoding rows there
       is room for one token at least, however tight the target.
    3. With a TTFT target as well, a prompt that would come too late in steps of that size, and in
       time in larger ones, gets the smallest size in which it is in time. The first token has one
       chance, while TPOT is a mean over many tokens, so here TTFT goes first. A prompt that comes
       too late in any case enlarges nothing.
    4. With a TTFT target, several decode steps in one dispatch take a quarter of it at most.
    5. A prompt's end is left to the next step where two steps take less time than the padding; see
       `step_fills`.
    6. With a TTFT target, a prompt that can no longer be in time lets those go first that can: see
       `WaitingQueue`.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        ttft_target_s: float | None = None,
        tpot_target_s: float | None = None,
        step_cost_tokens: int | None = None,
    ) -> None:
        """Knows no step's time yet, and until it does limits nothing.

        Args:
          sizes: tokens of the steps there are, ascending.
          ttft_target_s: from arrival to first token; None = no matter.
          tpot_target_s: between tokens, in the mean of a request; None = no matter.
          step_cost_tokens: a step takes as long as its tokens and so many more; None = not known.
        """
        self.times = StepTimes()
        self.has_ttft_target = ttft_target_s is not None
        self.has_tpot_target = tpot_target_s is not None
        self._ttft_target_s = ttft_target_s
        self._tpot_target_s = tpot_target_s
        self._sizes = tuple(sizes)
        # By number of tokens, how many of them a step computes.
        self._fills: Sequence[int] = range(self._sizes[-1] + 1)
        if step_cost_tokens is not None:
            self._fills = step_fills(self._sizes, step_cost_tokens)

    def deadline_s(self, arrival_s: float) -> float:
        """When the first token of a request is due; never, without a TTFT target."""
        return math.inf if self._ttft_target_s is None else arrival_s + self._ttft_target_s

    def can_meet(
        self, prompt: Awaited, num_tokens_before: int, num_decodes: int, now_s: float
    ) -> bool:
        """Whether a prompt can be in time if it is the next to begin, with a step to spare.

        Without that step those that just manage would go first, and one small delay would make
        each of them late.

        Args:
          prompt: one that waits.
          num_tokens_before: of the prompts that have begun.
          num_decodes: rows that compute one token in each step.
          now_s: when the next step can begin.
        """
        size = self._sizes[-1]
        whole = Awaited(num_tokens_before + prompt.num_tokens, prompt.deadline_s)
        return bool(self._in_time([whole], size, num_decodes, now_s + self.times.predict(size)))

    def most_tokens(self, num_decodes: int, prompts: Sequence[Awaited], now_s: float) -> int:
        """The token budget of the next step: one of the sizes.

        Args:
          num_decodes: rows that compute one token each.
          prompts: those that wait or have begun, in the order in which they are computed.
          now_s: when the step can begin.
        """
        largest = self._sizes[-1]
        if self._tpot_target_s is None or not num_decodes or num_decodes >= largest:
            return largest
        sizes = self._sizes[self._sizes.index(bucket_for(self._sizes, num_decodes + 1)) :]
        kept = [size for size in sizes if self.times.predict(size) <= self._tpot_target_s]
        chosen = kept[-1] if kept else sizes[0]
        candidates = [size for size in sizes if size >= chosen]
        num_in_time = [self._in_time(prompts, size, num_decodes, now_s) for size in candidates]
        return candidates[num_in_time.index(max(num_in_time))]

    def fill(self, num_tokens: int) -> int:
        """How many of a step's tokens it computes, so that it is not padded in vain."""
        return self._fills[num_tokens]

    def most_steps(self, num_rows: int, max_steps: int) -> int:
        """Decode steps of one dispatch, at most `max_steps`, of so many rows."""
        step_s = self.times.predict(num_rows)
        if self._ttft_target_s is None or not step_s:
            return max_steps
        return min(max_steps, max(1, int(_SHARE_OF_DISPATCH * self._ttft_target_s / step_s)))

    def _in_time(
        self, prompts: Sequence[Awaited], size: int, num_decodes: int, now_s: float
    ) -> int:
        """How many prompts get their first token in time, in steps of `size` tokens from now."""
        step_s = self.times.predict(size)
        num_tokens = num_in_time = 0
        for prompt in prompts:
            num_tokens += prompt.num_tokens
            num_steps = math.ceil(num_tokens / max(1, size - num_decodes))
            num_in_time += now_s + num_steps * step_s <= prompt.deadline_s
        return num_in_time
