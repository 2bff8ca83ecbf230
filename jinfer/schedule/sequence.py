"""The tokens of one completion, as the scheduler tracks them."""

import enum
import math
from collections import abc
from dataclasses import dataclass, field, replace

from jinfer.axes import PageId, Slot


class Status(enum.Enum):
    WAITING = "waiting"  # owns nothing: new, or preempted
    RUNNING = "running"  # owns a slot, and pages from its first planned chunk on
    FINISHED = "finished"  # owns nothing, and never runs again


@dataclass(slots=True, eq=False)
class TokenSequence:
    """The tokens of one completion: a request with n=3 has three sequences.

    Compared and hashed by identity. The scheduler alone writes the fields below `arrival_s`.

    A step is planned, then committed when its tokens have been read; in between it is in
    flight. Planned and committed tokens have separate counts, so the next step can be planned
    before this one's tokens are known:

      num_computed <= num_scheduled <= length       num_tokens <= length
    """

    request_id: str
    index: int  # which of the request's n
    prompt_ids: abc.Sequence[int]
    max_length: int  # most tokens, prompt and output
    scores_prompt: bool = False  # for prompt logprobs: every prompt position needs logits
    root_key: bytes = b""  # parent of the first page's key: equal keys may share pages
    priority: int = 0  # lower goes first
    arrival_s: float = 0.0  # when the request came, on the clock of `Scheduler.plan`
    order: int = -1  # of arrival at the scheduler, kept when preempted; -1 before
    output_ids: list[int] = field(default_factory=list)
    num_computed: int = 0  # tokens whose K/V is in the pool
    num_scheduled: int = 0  # the same, with those of steps in flight
    num_unread: int = 0  # tokens sampled by steps in flight, values not known yet
    num_in_flight: int = 0  # chunks planned, not yet committed
    num_scored: int = 0  # prompt positions with logprobs delivered: 0 .. num_scored - 1
    pages: list[PageId] = field(default_factory=list)  # in order of position
    page_keys: list[bytes] = field(default_factory=list)  # of full pages of known tokens
    num_published: int = 0  # leading pages published to the prefix cache
    num_cached: int = 0  # prompt tokens it found there when first admitted
    slot: Slot | None = None
    status: Status = Status.WAITING
    num_preemptions: int = 0
    num_overtaken: int = 0  # later sequences that started while this was the oldest waiting
    is_due: bool = False  # overtaken max_overtaken times: goes before all that are not due
    is_late: bool = False  # will miss its TTFT target: goes last in its priority

    @property
    def rank(self) -> tuple[float, bool, int]:
        """Lower ranks start first and keep their pages longer."""
        if self.is_due:
            return -math.inf, False, self.order
        return self.priority, self.is_late, self.order

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_ids)

    @property
    def num_tokens(self) -> int:
        """Tokens whose values the host knows: the prompt and the outputs read so far."""
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def length(self) -> int:
        """Tokens of the sequence once all steps in flight have been read."""
        return self.num_tokens + self.num_unread

    @property
    def num_unscheduled(self) -> int:
        """Tokens the next step could compute: 1 when decoding, 0 after the last was sampled."""
        return self.length - self.num_scheduled if self.length < self.max_length else 0

    def restarted(self) -> "TokenSequence":
        """Returns a sequence with the same tokens that owns nothing, to go on instead of this one.

        It keeps its rank. Steps in flight belong to this one, which must be finished.
        """
        return replace(
            self,
            output_ids=list(self.output_ids),
            num_computed=0,
            num_scheduled=0,
            num_unread=0,
            num_in_flight=0,
            pages=[],
            page_keys=[],
            num_published=0,
            slot=None,
            status=Status.WAITING,
            num_preemptions=self.num_preemptions + 1,  # so `num_cached` stays
        )

    def token_at(self, position: int) -> int:
        """The token id at `position`, of the prompt or of the outputs read so far."""
        return self.tokens(position, position + 1)[0]

    def tokens(self, start: int, stop: int) -> list[int]:
        """Token ids at positions `start` .. `stop` - 1, which the host must already know."""
        assert 0 <= start <= stop <= self.num_tokens, f"{start=}, {stop=}, {self.num_tokens=}"
        num_prompt = len(self.prompt_ids)
        outputs = self.output_ids[max(0, start - num_prompt) : max(0, stop - num_prompt)]
        return [*self.prompt_ids[start:stop], *outputs]
