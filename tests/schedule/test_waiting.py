"""Who begins next, and how often somebody is overtaken."""

import random

from jinfer.schedule.scheduler import Scheduler
from jinfer.schedule.sequence import Status, TokenSequence
from jinfer.schedule.waiting import WaitingQueue


def make(order: int, priority: int = 0) -> TokenSequence:
    return TokenSequence(f"r{order}", 0, [1, 2, 3], 8, priority=priority, order=order)


def test_by_priority_and_then_by_arrival() -> None:
    queue = WaitingQueue(max_overtaken=9)
    a, b, c, d = sequences = [make(0, 1), make(1, 0), make(2, -1), make(3, 0)]
    for sequence in sequences:
        queue.add(sequence)
    assert queue.first(3) == [c, b, d] and queue.first(9) == [c, b, d, a]
    queue.discard(b)
    assert (len(queue), set(queue), queue.first(2)) == (3, {a, c, d}, [c, d])
    queue.add(b)  # preempted: its place is that of its arrival
    assert queue.first(9) == [c, b, d, a]


def test_the_oldest_is_due_once_it_was_overtaken_often_enough() -> None:
    queue = WaitingQueue(max_overtaken=2)
    old, young = make(0, 5), make(1, 5)
    queue.add(old)
    queue.add(young)
    for order in (2, 3):
        queue.add(make(order))
        queue.take(queue.first(1)[0])
    assert (old.num_overtaken, old.is_due) == (2, True)
    assert (young.num_overtaken, young.is_due) == (0, False)  # one after the other
    queue.add(make(4))
    assert queue.first(1) == [old]


def test_who_steps_back_goes_behind_its_own_priority_only() -> None:
    queue = WaitingQueue(max_overtaken=9)
    a, b, c = sequences = [make(0), make(1), make(2, 1)]
    for sequence in sequences:
        queue.add(sequence)
    queue.step_back(a)
    assert queue.first(9) == [b, a, c] and len(queue) == 3
    queue.step_back(b)
    assert queue.first(9) == [a, b, c]


def test_random_use_agrees_with_a_list() -> None:
    rng = random.Random(0)
    queue = WaitingQueue(max_overtaken=3)
    inside: list[TokenSequence] = []
    outside: list[TokenSequence] = []
    for order in range(3000):
        choice = rng.random()
        if choice < 0.4:
            inside.append(make(order, rng.randrange(3)))
            queue.add(inside[-1])
        elif choice < 0.5 and outside:
            inside.append(outside.pop(rng.randrange(len(outside))))
            queue.add(inside[-1])
        elif inside:
            candidates = queue.first(rng.randint(1, 4))
            taken = candidates[0] if candidates[0].is_due else candidates[-1]
            (queue.take if rng.random() < 0.8 else queue.discard)(taken)
            inside.remove(taken)
            outside.append(taken)
        inside.sort(key=lambda s: s.rank)
        assert len(queue) == len(inside) and queue.first(5) == inside[:5]
        assert all(s.num_overtaken <= 3 for s in inside)
    assert any(s.is_due for s in inside + outside)


def test_nobody_starves_under_endless_requests_of_higher_priority() -> None:
    scheduler = Scheduler(
        max_slots=2, max_step_tokens=8, page_size=4, num_pages=9, max_model_len=16, max_overtaken=7
    )
    low = [TokenSequence(f"low{i}", 0, [1, 2, 3], 16, priority=1) for i in range(3)]
    for sequence in low:
        scheduler.add(sequence)
    num_added = num_begun = 0
    while any(s.status is not Status.FINISHED for s in low):
        while scheduler.num_waiting < 6:
            scheduler.add(TokenSequence(f"high{num_added}", 0, [1, 2, 3], 16, priority=0))
            num_added += 1
        plan = scheduler.plan()
        assert plan is not None
        num_begun += sum(s.priority == 0 and s.num_preemptions == 0 for s in plan.admitted)
        for chunk in plan.chunks:
            scheduler.commit(chunk, 5 if chunk.samples else None)
            if chunk.sequence.num_tokens == 16:
                scheduler.finish(chunk.sequence)
        # The bound: 7 for itself and for each older one, and those that run beside the last.
        assert num_begun <= 7 * 3 + 2 * 4
    assert num_begun >= 7
    assert [s.num_overtaken for s in low] == [7, 7, 7]
