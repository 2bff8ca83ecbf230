"""Stop strings, found wherever the text is cut."""

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from jinfer.request.stop import Finish, StopChecker

_TEXT = st.text("ab", max_size=24)
_STOPS = st.lists(st.text("ab", min_size=1, max_size=5), max_size=4)


def _run(pieces: list[str], stops: list[str], include: bool) -> tuple[str, str | None]:
    checker = StopChecker(stops, include_stop_str_in_output=include)
    shown = ""
    for piece in pieces:
        checked = checker.feed(piece)
        shown += checked.text
        if checked.stop is not None:
            return shown, checked.stop
    return shown + checker.flush(), None


def _by_search(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """The same by looking at every prefix of the whole text."""
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


@settings(deadline=None)
@given(text=_TEXT, stops=_STOPS, include=st.booleans(), data=st.data())
def test_equals_a_search_of_the_whole_text(text, stops, include, data) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    bounds = [0, *cuts, len(text)]
    pieces = [text[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]
    want = _by_search(text, stops, include)
    assert _run(pieces, stops, include) == want
    assert _run(list(text), stops, include) == want


@settings(deadline=None)
@given(text=_TEXT, stops=_STOPS)
def test_what_was_shown_is_never_taken_back(text, stops) -> None:
    want, _ = _by_search(text, stops, False)
    checker, shown = StopChecker(stops), ""
    for char in text:
        checked = checker.feed(char)
        shown += checked.text
        assert want.startswith(shown)
        if checked.stop is not None:
            assert shown == want
            return


def test_holds_back_no_more_than_needed() -> None:
    checker = StopChecker(["</end>"])
    assert checker.feed("one <").text == "one "
    assert checker.feed("/").text == ""
    assert checker.feed("b").text == "</b"
    assert checker.feed(" </e").text == " "
    assert checker.flush() == "</e" and checker.flush() == ""


def test_without_stop_strings_or_when_included_nothing_waits() -> None:
    assert StopChecker([]).feed("abc").text == "abc"
    including = StopChecker(["cd"], include_stop_str_in_output=True)
    assert including.feed("abc").text == "abc"
    checked = including.feed("de")
    assert (checked.text, checked.stop) == ("d", "cd")


def test_a_match_before_min_tokens_is_text() -> None:
    checker = StopChecker(["ab"])
    assert checker.feed("ab a", may_stop=False).text == "ab "
    # It ends where stopping is allowed, though it began before.
    checked = checker.feed("b")
    assert (checked.text, checked.stop) == ("", "ab")


def test_feeding_after_the_end_is_our_own_mistake() -> None:
    checker = StopChecker(["a"])
    checker.feed("a")
    with pytest.raises(AssertionError, match="fed after the output stopped: text='b'"):
        checker.feed("b")
    with pytest.raises(AssertionError, match="an empty stop string"):
        StopChecker([""])


def test_reasons_are_vllms_words() -> None:
    assert [str(reason) for reason in Finish] == ["stop", "length", "abort", "error"]
    assert Finish.STOP == "stop"
