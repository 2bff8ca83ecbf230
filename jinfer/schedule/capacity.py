"""How many pages the pool gets, and which step sizes get a program."""

from bisect import bisect_left
from collections.abc import Sequence

from jinfer.schedule.page_pool import pages_for

MAX_TOKEN_BUCKETS = 8  # each is one compiled program, and start-up pays for all of them
_COARSE_GROWTH = 4  # where a padding token or row costs next to nothing beside the weights
_FAR_RIDGE = 128  # tokens: with such a ridge, or a higher one, 32 take as long as a few


def plan_pages(
    *,
    free_bytes: int,
    page_bytes: int,
    max_slots: int,
    max_model_len: int,
    page_size: int,
    requested_num_pages: int | None = None,
) -> int:
    """Decides the number of pages in the pool, the bin page included.

    As asked for; else as many as `free_bytes` holds, but not more than every slot can fill.

    Args:
      free_bytes: device memory left for the pool, weights and temporaries already taken off.
      page_bytes: one page over all layers, as it lies on one device.
      max_slots: sequences that run at the same time.
      max_model_len: tokens of the longest sequence, prompt and output.
      page_size: tokens per page.
      requested_num_pages: the user's own figure, the bin included; None means decide.

    Raises:
      ValueError: if one sequence of `max_model_len` tokens does not fit, or if the pages asked
        for exceed the memory.
    """
    num_needed = 1 + pages_for(max_model_len, page_size)
    num_fitting = max(0, free_bytes) // page_bytes
    if num_needed > num_fitting:
        raise ValueError(
            f"the KV pool must hold one sequence of max_model_len={max_model_len} tokens, "
            f"{_gib(num_needed * page_bytes)}; got {_gib(free_bytes)} free. "
            f"The longest context that fits is {_longest_context(num_fitting, page_size)} tokens: "
            "lower max_model_len or max_num_seqs, or raise gpu_memory_utilization."
        )
    if requested_num_pages is None:
        return min(num_fitting, 1 + max_slots * (num_needed - 1))
    if requested_num_pages > num_fitting:
        raise ValueError(
            f"the KV pool must fit into free memory; got num_pages={requested_num_pages}, "
            f"{_gib(requested_num_pages * page_bytes)}, of {_gib(free_bytes)}. "
            f"Lower num_pages to {num_fitting} or less, or raise gpu_memory_utilization."
        )
    if requested_num_pages < num_needed:
        longest = _longest_context(requested_num_pages, page_size)
        raise ValueError(
            f"the KV pool must hold one sequence of max_model_len={max_model_len} tokens, "
            f"num_pages={num_needed}; got num_pages={requested_num_pages}. "
            f"The longest context that fits is {longest} tokens: raise num_pages or lower "
            "max_model_len."
        )
    return requested_num_pages


def token_buckets(
    max_step_tokens: int,
    max_slots: int,
    growth: int = 2,
    ridge_tokens: int = 0,
    *,
    decodes: bool = True,
) -> tuple[int, ...]:
    """Decides the step sizes T that get a program, ascending; the last is `max_step_tokens`.

    From 8 on by `growth`. Less wins nothing: such a step takes the time to read the weights, padded
    or not. Up to `ridge_tokens` the same holds, nearly, so there sizes grow by four. Where steps
    that only decode have programs of their own, sizes begin at 32 if the ridge is far above; where
    not, 1 is among them, and `max_slots`, which a full engine decodes in every step. Of more than
    MAX_TOKEN_BUCKETS the smallest above 1 go first.

    Args:
      max_step_tokens: tokens of the largest step.
      max_slots: sequences that run at the same time.
      growth: ratio of neighbours; a larger one compiles less and pads more.
      ridge_tokens: up to here the time of a step is that of reading the weights; 0 = not known.
      decodes: whether steps that only decode are among them, rather than programs of their own.

    Raises:
      ValueError: if a step is too small for one token of every slot.
    """
    if max_step_tokens < max_slots:
        raise ValueError(
            "max_num_batched_tokens must be at least max_num_seqs, so that every sequence can "
            f"decode in each step; got {max_step_tokens} < {max_slots}. "
            "Raise the one or lower the other."
        )
    powers = set()
    size = 8 if decodes or ridge_tokens < _FAR_RIDGE else 8 * _COARSE_GROWTH
    while size <= max_step_tokens:
        powers.add(size)
        size *= _COARSE_GROWTH if size * _COARSE_GROWTH <= ridge_tokens else growth
    kept = {max_step_tokens, *((1, max_slots) if decodes else ())}
    droppable = sorted(powers - kept)
    num_surplus = max(0, len(powers | kept) - MAX_TOKEN_BUCKETS)
    return tuple(sorted(kept | set(droppable[num_surplus:])))


def step_fills(buckets: Sequence[int], step_cost_tokens: int) -> tuple[int, ...]:
    """Decides how many of n tokens a step computes, by n from 0 to the largest bucket.

    All of them, or as many as a smaller bucket holds: whichever makes the steps for all n cheapest.
    A step costs its bucket, padding included, and `step_cost_tokens`. So 140 tokens in buckets of
    128 and 512 are 128 and then 12, where a step costs less than the padding that it saves.

    Args:
      buckets: step sizes with a program, ascending.
      step_cost_tokens: what a step costs beside its tokens, as the number of tokens that take as
        long: reading the weights, above all.
    """
    fills, costs = [0], [0]
    for num_tokens in range(1, buckets[-1] + 1):
        fitting = buckets[: bisect_left(buckets, num_tokens)]
        choices = [(bucket_for(buckets, num_tokens), -num_tokens)]
        choices += [(size + step_cost_tokens + costs[num_tokens - size], -size) for size in fitting]
        cost, negative_fill = min(choices)  # of equal ones the fullest step
        fills.append(-negative_fill)
        costs.append(cost)
    return tuple(fills)


def row_buckets(max_slots: int, growth: int = _COARSE_GROWTH, smallest: int = 8) -> tuple[int, ...]:
    """Decides the row counts B that get a decode program, ascending.

    1, then from `smallest` on by `growth`, and `max_slots`. By four where a padding row costs next
    to nothing beside the weights.
    """
    rows = {1, max_slots}
    size = smallest
    while size < max_slots:
        rows.add(size)
        size *= growth
    return tuple(sorted(rows))


def bucket_for(buckets: Sequence[int], num_tokens: int) -> int:
    """The smallest of the ascending `buckets` that holds `num_tokens`."""
    assert 1 <= num_tokens <= buckets[-1], f"{num_tokens=}, {buckets=}"
    return buckets[bisect_left(buckets, num_tokens)]


def _longest_context(num_pages: int, page_size: int) -> int:
    return max(0, num_pages - 1) * page_size  # page 0 is the bin


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:,.3f} GiB"
