"""What the host keeps, by name, and the moves that follow from it."""

from jinfer.axes import PageId
from jinfer.schedule.host_index import HostIndex
from jinfer.schedule.plan import PageSave

A, B, C, D = (bytes([i]) for i in range(4))


def test_the_page_used_longest_ago_goes_first() -> None:
    index = HostIndex(num_pages=2, min_restored=1)
    index.save(PageId(5), A)
    index.save(PageId(6), B)
    assert index.take_moves() == ((PageSave(PageId(5), A), PageSave(PageId(6), B)), ())
    index.save(PageId(7), A)  # given up once more: nothing moves, but it was used
    index.save(PageId(8), C)
    assert index.take_moves() == ((PageSave(PageId(8), C),), (B,))
    assert index.find([A, C, B]) == [A, C]
    index.restore([A, C])
    index.save(PageId(9), D)
    assert index.find([A]) == [A] and index.find([C]) == []  # of a prefix the end goes first


def test_what_the_same_plan_forgot_need_not_move() -> None:
    index = HostIndex(num_pages=1, min_restored=1)
    index.save(PageId(5), A)
    index.take_moves()
    index.save(PageId(6), B)
    index.save(PageId(7), A)
    assert index.take_moves() == ((), ())  # and B came only to go


def test_what_is_saved_restored_and_forgotten_by_one_plan_moves() -> None:
    index = HostIndex(num_pages=1, min_restored=1)
    index.save(PageId(5), A)
    index.restore([A])
    index.save(PageId(6), B)
    index.save(PageId(7), C)
    assert index.take_moves() == ((PageSave(PageId(5), A), PageSave(PageId(7), C)), (A,))
    index.save(PageId(8), D)
    assert index.take_moves() == ((PageSave(PageId(8), D),), (C,))


def test_few_pages_are_not_worth_fetching() -> None:
    index = HostIndex(num_pages=9, min_restored=2)
    for page_id, key in enumerate((A, B)):
        index.save(PageId(page_id), key)
    assert (index.find([A, C]), index.find([A, B]), index.find([])) == ([], [A, B], [])


def test_no_room_no_moves_and_clearing_forgets() -> None:
    index = HostIndex(num_pages=0, min_restored=1)
    index.save(PageId(5), A)
    assert len(index) == 0 and index.take_moves() == ((), ())
    index = HostIndex(num_pages=3, min_restored=1)
    index.save(PageId(5), A)
    index.take_moves()
    index.save(PageId(6), B)
    index.clear()
    assert len(index) == 0
    assert index.take_moves() == ((), (A,))
