"""Limits the size of steps to meet the targets for TTFT and TPOT."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from jinfer.schedule.capacity import bucket_for, step_fills
from jinfer.schedule.step_times import StepTimes

# An arriving prompt waits for at most two dispatches: the running one and the queued one. Together
# they may take half of its TTFT target.
_SHARE_OF_DISPATCH = 0.25


@dataclass(frozen=True, slots=True)
class Awaited:
    """A prompt that waits for its first token."""

    num_tokens: int  # still to be computed
    deadline_s: float  # when the first token is due


class Pace:
    """Limits the size of steps to meet the TTFT and TPOT targets.

    The rules:

    1. If no row decodes, a step is as large as the budget allows.
    2. With a TPOT target, a step with decoding rows has the largest size that is predicted to meet
       it. However tight the target, the step has room for at least one prompt token beside the
       decoding rows, so prompts advance.
    3. With a TTFT target as well, the step grows to the smallest size that lets the most prompts
       meet their deadlines. TTFT goes before TPOT, because the first token has one chance, while
       TPOT is a mean over many tokens. A prompt that is late at any size does not enlarge the step.
    4. With a TTFT target, the decode steps of one dispatch take at most a quarter of it.
    5. The end of a prompt is left to the next step if a second step takes less time than the
       padding; see `step_fills`.
    6. With a TTFT target, prompts that can no longer meet it go behind prompts that can; see
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
        """Limits nothing until it has observed the times of steps.

        Args:
          sizes: step sizes in tokens, ascending.
          ttft_target_s: from arrival to first token; None = no target.
          tpot_target_s: mean time between tokens of a request; None = no target.
          step_cost_tokens: fixed cost of a step, in tokens that take as long; None = unknown.
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
        """When the first token of a request is due; infinity without a TTFT target."""
        return math.inf if self._ttft_target_s is None else arrival_s + self._ttft_target_s

    def can_meet(
        self, prompt: Awaited, num_tokens_before: int, num_decodes: int, now_s: float
    ) -> bool:
        """Whether a prompt meets its deadline if it starts next, with one step to spare.

        Without the spare step, prompts with no margin would go first, and one small delay would
        make all of them late.

        Args:
          prompt: a waiting prompt.
          num_tokens_before: tokens left to compute of prompts that have begun.
          num_decodes: rows that compute one token in each step.
          now_s: when the next step can start.
        """
        size = self._sizes[-1]
        whole = Awaited(num_tokens_before + prompt.num_tokens, prompt.deadline_s)
        return bool(self._in_time([whole], size, num_decodes, now_s + self.times.predict(size)))

    def most_tokens(self, num_decodes: int, prompts: Sequence[Awaited], now_s: float) -> int:
        """The token budget of the next step: one of the sizes.

        Args:
          num_decodes: rows that compute one token each.
          prompts: prompts that wait or have begun, in the order of computation.
          now_s: when the step can start.
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
        """How many of `num_tokens` a step computes, to avoid padding; see `step_fills`."""
        return self._fills[num_tokens]

    def most_steps(self, num_rows: int, max_steps: int) -> int:
        """Decode steps of one dispatch of `num_rows` rows, at most `max_steps`."""
        step_s = self.times.predict(num_rows)
        if self._ttft_target_s is None or not step_s:
            return max_steps
        return min(max_steps, max(1, int(_SHARE_OF_DISPATCH * self._ttft_target_s / step_s)))

    def _in_time(
        self, prompts: Sequence[Awaited], size: int, num_decodes: int, now_s: float
    ) -> int:
        """How many prompts meet their deadlines in steps of `size` tokens from now."""
        step_s = self.times.predict(size)
        num_tokens = num_in_time = 0
        for prompt in prompts:
            num_tokens += prompt.num_tokens
            num_steps = math.ceil(num_tokens / max(1, size - num_decodes))
            num_in_time += now_s + num_steps * step_s <= prompt.deadline_s
        return num_in_time
