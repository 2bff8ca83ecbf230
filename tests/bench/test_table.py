"""Tables and figures as a terminal shows them."""

import pytest

from jinfer.bench.table import WIDTH, amount, figure, percent, table


def test_columns_line_up() -> None:
    shown = table(("case", "by", "us"), [("a", "xla", "1.2"), ("longer", "x", "12,345")], left=2)
    assert shown.splitlines() == [
        "case    by       us",
        "a       xla     1.2",
        "longer  x    12,345",
    ]


def test_a_reason_stands_for_the_figures_and_goes_on_below() -> None:
    reason = "word " * 40
    rows = [("a", "xla", "1.2", "3"), ("b", "tpu", reason)]
    shown = table(("case", "by", "us", "MB"), rows, left=2)
    *_, first, second, third = shown.splitlines()
    assert first.startswith("b     tpu  word word")
    assert second.startswith(" " * 11 + "word") and third.startswith(" " * 11 + "word")
    assert max(map(len, shown.splitlines())) <= WIDTH
    assert (first + second + third).split() == ["b", "tpu", *["word"] * 40]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0, "0"),
        (0.0123, "0.012"),
        (1.234, "1.23"),
        (9.996, "10.0"),
        (99.96, "100"),
        (1e6, "1,000,000"),
    ],
)
def test_figures_have_three_digits(value: float, said: str) -> None:
    assert figure(value) == said


def test_amounts() -> None:
    assert [amount(v, "B") for v in (2.5e12, 42.9e9, 1.25e6)] == ["2.50 TB", "42.9 GB", "1.25 MB"]


def test_percent() -> None:
    assert percent(0.1234) == "12.3 %"
