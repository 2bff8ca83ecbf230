"""KV memory that nothing fills, on paper."""

import dataclasses

import numpy as np
import pytest

from jinfer.bench.kv_waste import CASES, plan_for, simulate
from jinfer.startup.chips import CHIPS


def test_a_request_alone_wastes_the_rest_of_its_last_page_and_what_is_taken_ahead() -> None:
    chip = CHIPS["h200"]
    plan = dataclasses.replace(plan_for(chip, "NVIDIA H200", "auto"), max_decode_steps=1)
    waste = simulate(plan, chip, [(17, 3)], [0.0])
    # A prompt of 17 in two pages and one to grow into, then two tokens in the same.
    assert waste.num_allocated == 3 * 32 and waste.num_unfilled == 15 + 14 + 13
    ahead = simulate(dataclasses.replace(plan, max_decode_steps=32), chip, [(17, 3)], [0.0])
    assert ahead.num_unfilled == 15 + 13  # both in one dispatch


@pytest.mark.parametrize(("name", "device_kind", "kv_cache_dtype"), CASES[::2])
def test_lengths_as_of_conversations_waste_less_than_four_percent(
    name: str, device_kind: str, kv_cache_dtype: str
) -> None:
    # The means of the conversations in Azure's trace of 2023: 1,155 tokens in, 211 out.
    rng = np.random.default_rng(0)
    columns = [np.clip(rng.lognormal(np.log(mean) - 0.5, 1.0, 60), 4, 4000) for mean in (1155, 211)]
    lengths = [(int(num_in), int(num_out)) for num_in, num_out in zip(*columns, strict=True)]
    plan = plan_for(CHIPS[name], device_kind, kv_cache_dtype)
    waste = simulate(plan, CHIPS[name], lengths, [0.2 * i for i in range(60)])
    assert waste.num_allocated > 0 and waste.share < 0.04
