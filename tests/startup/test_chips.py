"""What the makers say of chips, and how JAX calls them."""

import pytest

from jinfer.startup.chips import CHIPS, chip_of


@pytest.mark.parametrize(
    ("device_kind", "name"),
    [
        ("TPU v4", "v4"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5e", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v5p", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("TPU7x", "tpu7x"),
        ("Tesla T4", "t4"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA L40S", None),  # not an L4
        ("TPU v4i", None),
        ("cpu", None),
        ("", None),
    ],
)
def test_chips_by_the_names_that_jax_gives_them(device_kind: str, name: str | None) -> None:
    assert chip_of(device_kind) is (CHIPS[name] if name else None)


def test_the_ridge_is_where_arithmetic_takes_as_long_as_reading_the_weights() -> None:
    num_parameters = 8e9
    for chip in CHIPS.values():
        below, above = (
            chip.bound_s(0, 2 * num_parameters * num_tokens)
            for num_tokens in (chip.ridge_tokens - 1, chip.ridge_tokens)
        )
        assert below < chip.bound_s(2 * num_parameters, 0) <= above


def test_bounds() -> None:
    assert CHIPS["h200"].bound_s(4.8e12, 0) == 1.0
    assert CHIPS["tpu7x"].bound_s(0, 2307e12, share=0.5) == 2.0
