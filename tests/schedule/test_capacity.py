"""How many pages, and which step sizes."""

from functools import partial

import pytest

from jinfer.schedule.capacity import (
    MAX_TOKEN_BUCKETS,
    bucket_for,
    plan_pages,
    row_buckets,
    step_fills,
    token_buckets,
)

MIB = 2**20
BASE = dict(page_bytes=MIB, max_slots=4, max_model_len=1024, page_size=16)  # 64 pages a sequence


def test_takes_what_is_free() -> None:
    assert plan_pages(free_bytes=100 * MIB + 5, **BASE) == 100


def test_never_more_than_the_slots_can_fill() -> None:
    assert plan_pages(free_bytes=10_000 * MIB, **BASE) == 1 + 4 * 64


def test_the_smallest_pool_that_serves() -> None:
    assert plan_pages(free_bytes=65 * MIB, **BASE) == 65
    with pytest.raises(ValueError, match="must hold one sequence"):
        plan_pages(free_bytes=65 * MIB - 1, **BASE)


@pytest.mark.parametrize("num_pages", [65, 80, 100])
def test_a_request_is_honoured(num_pages: int) -> None:
    assert plan_pages(free_bytes=100 * MIB, requested_num_pages=num_pages, **BASE) == num_pages


def test_a_request_may_exceed_what_the_slots_can_fill() -> None:
    assert plan_pages(free_bytes=999 * MIB, requested_num_pages=900, **BASE) == 900


@pytest.mark.parametrize(
    ("free_bytes", "longest", "gib"),
    [(33 * MIB, 512, "0.032"), (MIB, 0, "0.001"), (0, 0, "0.000"), (-512 * MIB, 0, "-0.500")],
)
def test_too_little_memory_names_the_remedies(free_bytes: int, longest: int, gib: str) -> None:
    message = (
        rf"max_model_len=1024 tokens, 0\.063 GiB; got {gib} GiB free\. "
        rf"The longest context that fits is {longest} tokens: "
        r"lower max_model_len or max_num_seqs, or raise gpu_memory_utilization\."
    )
    with pytest.raises(ValueError, match=message):
        plan_pages(free_bytes=free_bytes, **BASE)


def test_the_longest_context_named_does_fit() -> None:
    longest = 32 * 16
    assert plan_pages(free_bytes=33 * MIB, **{**BASE, "max_model_len": longest}) == 33
    with pytest.raises(ValueError, match="must hold one sequence"):
        plan_pages(free_bytes=33 * MIB, **{**BASE, "max_model_len": longest + 1})


def test_a_request_beyond_memory() -> None:
    message = (
        r"got num_pages=2048, 2\.000 GiB, with 0\.098 GiB free\. "
        r"Lower num_pages to 100 or less, or raise gpu_memory_utilization"
    )
    with pytest.raises(ValueError, match=message):
        plan_pages(free_bytes=100 * MIB, requested_num_pages=2048, **BASE)


@pytest.mark.parametrize(("num_pages", "longest"), [(64, 1008), (1, 0), (0, 0)])
def test_a_request_too_small(num_pages: int, longest: int) -> None:
    message = (
        rf"max_model_len=1024 tokens, num_pages=65; got num_pages={num_pages}\. "
        rf"The longest context that fits is {longest} tokens: raise num_pages or lower max_model"
    )
    with pytest.raises(ValueError, match=message):
        plan_pages(free_bytes=100 * MIB, requested_num_pages=num_pages, **BASE)


@pytest.mark.parametrize(
    ("max_step_tokens", "max_slots", "want"),
    [
        (1, 1, (1,)),
        (8, 4, (1, 4, 8)),
        (100, 24, (1, 8, 16, 24, 32, 64, 100)),
        (2048, 256, (1, 32, 64, 128, 256, 512, 1024, 2048)),
        (8192, 256, (1, 128, 256, 512, 1024, 2048, 4096, 8192)),
        (8192, 2, (1, 2, 256, 512, 1024, 2048, 4096, 8192)),
    ],
)
def test_token_buckets(max_step_tokens: int, max_slots: int, want: tuple[int, ...]) -> None:
    assert token_buckets(max_step_tokens, max_slots) == want


def test_token_buckets_that_grow_faster_are_fewer() -> None:
    assert token_buckets(512, 32, growth=4) == (1, 8, 32, 128, 512)
    assert token_buckets(600, 20, growth=4) == (1, 8, 20, 32, 128, 512, 600)


def test_token_buckets_are_coarse_where_a_step_takes_the_time_to_read_the_weights() -> None:
    assert token_buckets(1024, 128, ridge_tokens=561) == (1, 8, 32, 128, 512, 1024)
    assert token_buckets(512, 256, ridge_tokens=207) == (1, 8, 32, 128, 256, 512)
    assert token_buckets(512, 32, growth=4, ridge_tokens=100) == (1, 8, 32, 128, 512)


def test_token_buckets_beside_decode_programs_begin_later() -> None:
    beside = partial(token_buckets, decodes=False)
    assert beside(512, 32, growth=4) == (8, 32, 128, 512)
    assert beside(600, 20, growth=4) == (8, 32, 128, 512, 600)
    assert beside(4, 4) == (4,)
    assert beside(1024, 128, ridge_tokens=561) == (32, 128, 512, 1024)
    assert beside(512, 256, ridge_tokens=207) == (32, 128, 256, 512)
    assert beside(24, 16, ridge_tokens=207) == (24,)
    assert beside(512, 32, ridge_tokens=100) == (8, 32, 64, 128, 256, 512)


def test_token_buckets_are_few_and_cover_every_step() -> None:
    for max_step_tokens in [*range(1, 70), 1000, 4095, 4096, 4097, 100_000, 2**20]:
        for max_slots in {1, 3, max_step_tokens // 2, max_step_tokens}:
            if not 1 <= max_slots <= max_step_tokens:
                continue
            for decodes in (True, False):
                buckets = token_buckets(max_step_tokens, max_slots, decodes=decodes)
                assert list(buckets) == sorted(set(buckets))
                assert len(buckets) <= MAX_TOKEN_BUCKETS
                assert buckets[-1] == max_step_tokens
                assert not decodes or (buckets[0] == 1 and max_slots in buckets)


def test_row_buckets() -> None:
    assert row_buckets(1) == (1,)
    assert row_buckets(5) == (1, 5)
    assert row_buckets(32) == (1, 8, 32)
    assert row_buckets(256) == (1, 8, 32, 128, 256)
    assert row_buckets(32, growth=2) == (1, 8, 16, 32)
    assert row_buckets(128, smallest=32) == (1, 32, 128)
    assert row_buckets(5, smallest=32) == (1, 5)


def test_a_step_is_not_padded_where_two_are_cheaper() -> None:
    fills = step_fills((1, 8, 32, 128, 512), step_cost_tokens=32)
    left_out = {n: fill for n, fill in enumerate(fills) if fill != n}
    # 33 to 64 are 32 and at most 32 more; 129 to 392 are 128 up to three times, and 8 more.
    assert left_out == {**dict.fromkeys(range(33, 65), 32), **dict.fromkeys(range(129, 393), 128)}
    assert step_fills((1, 8, 32), step_cost_tokens=32) == tuple(range(33))  # too dear


@pytest.mark.parametrize("step_cost_tokens", [0, 3, 50])
def test_no_other_way_to_fill_steps_is_cheaper(step_cost_tokens: int) -> None:
    buckets = (1, 4, 10, 24)

    def cost(num_tokens: int) -> int:
        fill = fills[num_tokens]
        size = bucket_for(buckets, fill) + step_cost_tokens
        return size + (cost(num_tokens - fill) if fill < num_tokens else 0)

    fills = step_fills(buckets, step_cost_tokens)
    assert len(fills) == 25 and fills[0] == 0
    best = [0]
    for num_tokens in range(1, 25):  # any split, not only at the sizes of buckets
        firsts = range(1, num_tokens + 1)
        ways = [bucket_for(buckets, n) + step_cost_tokens + best[num_tokens - n] for n in firsts]
        best.append(min(ways))
        assert cost(num_tokens) == best[num_tokens]


def test_an_engine_with_default_buckets_has_at_most_sixteen_programs() -> None:
    for max_step_tokens, max_slots in ((512, 32), (2048, 256), (2048, 128), (8192, 256)):
        num_writers = 2 + 1  # of slots, and the copier of pages
        steps = token_buckets(max_step_tokens, max_slots, decodes=False)
        assert len(steps) + len(row_buckets(max_slots)) + num_writers <= 16
    steps = token_buckets(512, 32, growth=4, decodes=False)
    assert len(steps) + len(row_buckets(32, growth=2)) + 3 <= 11


def test_a_step_smaller_than_the_slots() -> None:
    message = r"max_num_batched_tokens must be at least max_num_seqs.*got 8 < 16\. Raise max_num"
    with pytest.raises(ValueError, match=message):
        token_buckets(8, 16)


def test_bucket_for_takes_the_smallest_that_holds() -> None:
    buckets = token_buckets(100, 24)
    for num_tokens in range(1, 101):
        assert bucket_for(buckets, num_tokens) == min(b for b in buckets if b >= num_tokens)
    for num_tokens in (0, 101):
        with pytest.raises(AssertionError, match=f"num_tokens={num_tokens}"):
            bucket_for(buckets, num_tokens)
