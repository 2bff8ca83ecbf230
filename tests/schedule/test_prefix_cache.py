"""The prefix cache and its pool against a naive model."""

import random

import pytest

from jinfer.schedule.page_pool import PagePool
from jinfer.schedule.prefix_cache import PrefixCache, page_key, root_key


def test_keys_name_everything_before_them() -> None:
    root = root_key("model", "float32", "")
    first = page_key(root, [1, 2, 3, 4])
    assert len(first) == 16
    assert page_key(root, [1, 2, 3, 4]) == first
    others = [
        page_key(root, [1, 2, 3, 5]),
        page_key(first, [1, 2, 3, 4]),
        page_key(root_key("model", "float32", "salt"), [1, 2, 3, 4]),
        page_key(root_key("model", "int8", ""), [1, 2, 3, 4]),
    ]
    assert len({first, *others}) == 5
    assert root_key("a\x00b") != root_key("a", "b") != root_key("", "ab")


def test_the_longest_known_prefix_is_found_and_the_leaf_goes_first() -> None:
    pool = PagePool(5)
    cache = PrefixCache(pool)
    pages = pool.allocate(3)
    assert pages is not None
    keys = [bytes([i]) for i in range(3)]
    for key, page_id in zip(keys, pages, strict=True):
        cache.publish(key, page_id)
    pool.release(reversed(pages))
    assert pool.num_free_pages == 4 and cache.find(keys) == pages
    assert pool.allocate(1) not in [[p] for p in pages]  # the one that holds nothing goes first
    assert pool.allocate(1) == [pages[2]]
    assert cache.find(keys) == pages[:2] and keys[2] not in cache
    pool.share(pages[:1])
    assert pool.allocate(2) is None  # a shared page is nobody else's
    assert pool.allocate(1) == [pages[1]]
    assert cache.find(keys) == pages[:1]


def test_clearing_forgets_names_and_not_owners() -> None:
    pool = PagePool(4)
    cache = PrefixCache(pool)
    pages = pool.allocate(2)
    assert pages is not None
    for page_id in pages:
        cache.publish(bytes([page_id]), page_id)
    pool.release(pages[:1])
    cache.clear()
    assert len(cache) == 0 and pool.num_free_pages == 2
    pool.release(pages[1:])
    assert pool.num_free_pages == 3 and pool.num_idle(range(1, 4)) == 0


def run_against_a_naive_model(num_operations: int, seed: int) -> int:
    """Random operations; returns how many pages were found in the cache."""
    rng = random.Random(seed)
    num_pages = 24
    pool = PagePool(num_pages)
    cache = PrefixCache(pool)
    owned: list[tuple[list[int], int]] = []  # (pages, family): what each owner holds, in order
    content: dict[int, bytes] = {}  # of each page that was written
    num_found = 0

    def keys_of(family: int, count: int) -> list[bytes]:
        return [bytes([family, i]) for i in range(count)]

    for _ in range(num_operations):
        choice = rng.random()
        if choice < 0.5:
            family, count = rng.randrange(5), rng.randint(1, 6)
            keys = keys_of(family, count)
            found = cache.find(keys)
            assert [content[p] for p in found] == keys[: len(found)]
            num_idle = pool.num_idle(found)
            pool.share(found)
            fresh = pool.allocate(count - len(found))
            if fresh is None:
                assert count - len(found) > pool.num_free_pages
                pool.release(reversed(found))
                continue
            num_found += len(found)
            held = {p for pages, _ in owned for p in pages}
            assert not held & set(fresh) and num_idle == len(set(found) - held)
            for index, page_id in enumerate(fresh, start=len(found)):
                content[page_id] = keys[index]
                if rng.random() < 0.9:
                    cache.publish(keys[index], page_id)
            owned.append(([*found, *fresh], family))
        elif owned and choice < 0.99:
            pages, _ = owned.pop(rng.randrange(len(owned)))
            pool.release(reversed(pages))
        elif choice > 0.999:
            cache.clear()
        held = {p for pages, _ in owned for p in pages}
        assert pool.num_free_pages == num_pages - 1 - len(held)
    for pages, _ in owned:
        pool.release(pages)
    assert pool.num_free_pages == num_pages - 1
    return num_found


def test_random_operations() -> None:
    assert run_against_a_naive_model(20_000, seed=0) > 1000


@pytest.mark.slow
def test_a_million_random_operations() -> None:
    assert run_against_a_naive_model(1_000_000, seed=1) > 50_000
