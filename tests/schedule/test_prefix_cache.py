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


def test_of_two_pages_with_the_same_content_one_is_kept() -> None:
    pool = PagePool(4)
    cache = PrefixCache(pool)
    first, second, third = pool.allocate(3) or []
    for page_id in (first, second):
        cache.publish(b"key", page_id)
    pool.release([first])
    assert pool.num_idle([first, second]) == 0 and cache.find([b"key"]) == [second]
    pool.release([second])
    assert pool.num_idle([second]) == 1 and cache.find([b"key"]) == [second]
    cache.publish(b"key", third)  # computed once more: the newest use counts
    assert pool.num_idle([second]) == 0 and cache.find([b"key"]) == [third]
    assert pool.num_free_pages == 2


class NaiveModel:
    """Who owns which page, what was written there, and when its content was last let go.

    Contents are (family, place in the family): each hangs on the place before.
    """

    def __init__(self, num_pages: int, seed: int) -> None:
        self.rng = random.Random(seed)
        self.num_pages = num_pages
        self.pool = PagePool(num_pages)
        self.cache = PrefixCache(self.pool)
        forget = self.pool.on_reuse
        self.pool.on_reuse = lambda page_id: (self.check_eviction(page_id), forget(page_id))
        self.owned: list[list[int]] = []  # the pages that each owner holds, in order
        self.num_owners = [0] * num_pages
        self.content: dict[int, bytes] = {}  # of each page that was written
        self.released_at: dict[bytes, int] = {}  # of each content, by whom nobody owns now
        self.now = self.num_found = self.num_evicted = 0

    def check_eviction(self, page_id: int) -> None:
        """Least recently used first, and nothing is known that hangs on it."""
        key = self.content[page_id]
        assert self.num_owners[page_id] == 0
        assert bytes([key[0], key[1] + 1]) not in self.cache
        assert self.released_at[key] == min(self.released_at.values())
        del self.released_at[key]
        self.num_evicted += 1

    def begin(self) -> None:
        """A new owner: of the pages that are found, unless it does not look, and of fresh ones."""
        rng = self.rng
        family, count = rng.randrange(5), rng.randint(1, 6)
        keys = [bytes([family, place]) for place in range(count)]
        found = self.cache.find(keys) if rng.random() < 0.8 else []
        assert [self.content[p] for p in found] == keys[: len(found)]
        assert self.pool.num_idle(found) == sum(self.num_owners[p] == 0 for p in found)
        num_free = self.pool.num_free_pages
        if count - len(found) + self.pool.num_idle(found) > num_free:
            assert self.pool.allocate(num_free + 1) is None
            return
        self.pool.share(found)
        for page_id in found:
            self.released_at.pop(self.content[page_id], None)
        fresh = self.pool.allocate(count - len(found))
        assert fresh is not None and not any(self.num_owners[p] for p in fresh)
        num_named = count if rng.random() < 0.7 else rng.randint(0, count)
        for index, page_id in enumerate(fresh, start=len(found)):
            self.content[page_id] = keys[index]
            if index < num_named:
                self.cache.publish(keys[index], page_id)
                self.released_at.pop(keys[index], None)
        for page_id in [*found, *fresh]:
            self.num_owners[page_id] += 1
        self.owned.append([*found, *fresh])
        self.num_found += len(found)

    def end(self) -> None:
        pages = self.owned.pop(self.rng.randrange(len(self.owned)))
        for page_id in reversed(pages):
            self.num_owners[page_id] -= 1
            self.now += 1
            self.pool.release([page_id])
            if self.pool.is_idle(page_id):
                self.released_at[self.content[page_id]] = self.now

    def clear(self) -> None:
        """Forgets all; owners from before end, since they know their pages by name no longer."""
        while self.owned:
            self.end()
        self.cache.clear()
        self.released_at.clear()

    def check(self) -> None:
        held = sum(map(bool, self.num_owners))
        assert self.num_owners[0] == 0
        assert self.pool.num_free_pages == self.num_pages - 1 - held

    def run(self, num_operations: int) -> None:
        for _ in range(num_operations):
            choice = self.rng.random()
            if choice < 0.5 or not self.owned:
                self.begin()
            elif choice < 0.999:
                self.end()
            else:
                self.clear()
            self.check()
        self.clear()
        assert self.pool.num_free_pages == self.num_pages - 1 and len(self.cache) == 0


def test_random_operations() -> None:
    model = NaiveModel(num_pages=24, seed=0)
    model.run(20_000)
    assert model.num_found > 1000 and model.num_evicted > 1000


@pytest.mark.slow
def test_a_million_random_operations() -> None:
    model = NaiveModel(num_pages=24, seed=1)
    model.run(1_000_000)
    assert model.num_found > 50_000 and model.num_evicted > 50_000
