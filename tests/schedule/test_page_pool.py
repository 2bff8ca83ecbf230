"""Pages are handed out once, counted, and come back."""

import random
from collections import Counter

import pytest

from jinfer.schedule.page_pool import PagePool, pages_for


@pytest.mark.parametrize(
    ("num_tokens", "want"), [(0, 0), (1, 1), (15, 1), (16, 1), (17, 2), (32, 2), (33, 3)]
)
def test_pages_for_rounds_up(num_tokens: int, want: int) -> None:
    assert pages_for(num_tokens, 16) == want


def test_the_bin_is_never_handed_out() -> None:
    pool = PagePool(5)
    assert pool.num_free_pages == 4
    assert sorted(pool.allocate(4) or []) == [1, 2, 3, 4]
    assert pool.allocate(1) is None


def test_allocates_all_or_nothing() -> None:
    pool = PagePool(4)
    assert pool.allocate(4) is None
    assert pool.num_free_pages == 3
    assert pool.allocate(0) == []


def test_a_shared_page_is_free_after_its_last_owner() -> None:
    pool = PagePool(2)
    page_ids = pool.allocate(1) or []
    assert page_ids == [1]
    pool.share(page_ids)
    pool.release(page_ids)
    assert pool.num_free_pages == 0
    pool.release(page_ids)
    assert pool.num_free_pages == 1


def test_misuse_is_caught() -> None:
    pool = PagePool(3)
    page_ids = pool.allocate(1) or []
    pool.release(page_ids)
    with pytest.raises(AssertionError, match="released a free page: page_id=1"):
        pool.release(page_ids)
    with pytest.raises(AssertionError, match="shared a free page: page_id=1"):
        pool.share(page_ids)
    with pytest.raises(AssertionError, match="negative count: num_pages=-1"):
        pool.allocate(-1)
    with pytest.raises(AssertionError, match="at least the null page: num_pages=0"):
        PagePool(0)


def test_random_use_agrees_with_a_counter() -> None:
    rng = random.Random(0)
    pool = PagePool(20)
    owned: list[list] = []
    num_refused = 0
    for _ in range(3000):
        action = rng.choice(("allocate", "allocate", "share", "release", "release"))
        if action == "allocate":
            num_pages = rng.randint(0, 6)
            num_free = pool.num_free_pages
            page_ids = pool.allocate(num_pages)
            assert (page_ids is None) == (num_pages > num_free)
            num_refused += page_ids is None
            owned.append(page_ids or [])
            new, before = set(page_ids or []), {p for pages in owned[:-1] for p in pages}
            assert not new & before
        elif owned:
            page_ids = owned[rng.randrange(len(owned))]
            if action == "share":
                pool.share(page_ids)
                owned.append(list(page_ids))
            else:
                owned.remove(page_ids)
                pool.release(page_ids)
        refs = Counter(p for pages in owned for p in pages)
        assert 0 not in refs
        assert pool.num_free_pages == 19 - len(refs)
    assert num_refused > 50
