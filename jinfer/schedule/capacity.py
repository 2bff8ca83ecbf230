"""How many pages the pool gets, and which step sizes get a program."""

from bisect import bisect_left
from collections.abc import Sequence

from jinfer.schedule.page_pool import pages_for

MAX_TOKEN_BUCKETS = 8  # each is one compiled program, and start-up pays for all of them
_COARSE_GROWTH = 4  # for sizes at which reading the weights dwarfs the cost of padding
_FAR_RIDGE = 128  # tokens: with a ridge this high, a step of 32 takes as long as one of a few


def plan_pages(
    *,
    free_bytes: int,
    page_bytes: int,
    max_slots: int,
    max_model_len: int,
    page_size: int,
    requested_num_pages: int | None = None,
    knob: str = "gpu_memory_utilization",
) -> int:
    """Decides the number of pages in the pool, null page included.

    The requested number; without one, all that `free_bytes` holds, up to all slots full.

    Args:
      free_bytes: device memory left for the pool, after weights and temporaries.
      page_bytes: bytes of one page, all layers, on one device.
      max_slots: sequences that run at the same time.
      max_model_len: tokens of the longest sequence, prompt and output.
      page_size: tokens per page.
      requested_num_pages: the user's number, null page included; None = decide.
      knob: the argument that raises `free_bytes`, for the messages.

    Raises:
      ValueError: if one sequence of `max_model_len` tokens does not fit, or if the requested
        pages exceed the memory.
    """
    num_needed = 1 + pages_for(max_model_len, page_size)
    num_fitting = max(0, free_bytes) // page_bytes
    if num_needed > num_fitting:
        raise ValueError(
            f"the KV pool must hold one sequence of max_model_len={max_model_len} tokens, "
            f"{_gib(num_needed * page_bytes)}; got {_gib(free_bytes)} free. "
            f"The longest context that fits is {_longest_context(num_fitting, page_size)} tokens: "
            f"lower max_model_len or max_num_seqs, or raise {knob}."
        )
    if requested_num_pages is None:
        return min(num_fitting, 1 + max_slots * (num_needed - 1))
    if requested_num_pages > num_fitting:
        raise ValueError(
            f"the KV pool must fit into free memory; got num_pages={requested_num_pages}, "
            f"{_gib(requested_num_pages * page_bytes)}, with {_gib(free_bytes)} free. "
            f"Lower num_pages to {num_fitting} or less, or raise {knob}."
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

    Sizes grow from 8 by the factor `growth`. Smaller ones would save nothing: below 8 tokens a step
    takes the time of reading the weights, padded or not. Up to `ridge_tokens` that nearly holds, so
    the factor is 4 there. If steps that only decode have their own programs, sizes start at 32 when
    the ridge is at 128 or more. If not, 1 and `max_slots` are added; a full engine decodes
    `max_slots` tokens in every step. Beyond MAX_TOKEN_BUCKETS the smallest above 1 are dropped.

    Args:
      max_step_tokens: tokens of the largest step.
      max_slots: sequences that run at the same time.
      growth: ratio of neighbouring sizes; a larger one compiles less and pads more.
      ridge_tokens: tokens up to which reading the weights dominates a step; 0 = unknown.
      decodes: whether steps that only decode use these sizes too, instead of their own programs.

    Raises:
      ValueError: if a step is too small for one token of every slot.
    """
    if max_step_tokens < max_slots:
        raise ValueError(
            "max_num_batched_tokens must be at least max_num_seqs, so that every sequence can "
            f"decode in each step; got {max_step_tokens} < {max_slots}. "
            "Raise max_num_batched_tokens or lower max_num_seqs."
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
    """Decides how many of n tokens a step computes, for each n from 0 to the largest bucket.

    It computes all n, or fills a smaller bucket and leaves the rest to later steps, whichever is
    cheaper in total. A step costs its bucket, padding included, plus `step_cost_tokens`. Example:
    with buckets of 128 and 512, 140 tokens become 128 and then 12 if a step costs less than the
    padding it saves.

    Args:
      buckets: step sizes with a program, ascending.
      step_cost_tokens: fixed cost of a step, mostly reading the weights, in tokens that would
        take as long.
    """
    fills, costs = [0], [0]
    for num_tokens in range(1, buckets[-1] + 1):
        fitting = buckets[: bisect_left(buckets, num_tokens)]
        choices = [(bucket_for(buckets, num_tokens), -num_tokens)]
        choices += [(size + step_cost_tokens + costs[num_tokens - size], -size) for size in fitting]
        cost, negative_fill = min(choices)  # at equal cost the fullest step
        fills.append(-negative_fill)
        costs.append(cost)
    return tuple(fills)


def row_buckets(max_slots: int, growth: int = _COARSE_GROWTH, smallest: int = 8) -> tuple[int, ...]:
    """Decides the row counts B that get a decode program, ascending.

    1, then from `smallest` by the factor `growth`, and `max_slots`. The factor is 4 by default:
    beside reading the weights, padding rows cost almost nothing.
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
    return max(0, num_pages - 1) * page_size  # less the null page


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:,.3f} GiB"
