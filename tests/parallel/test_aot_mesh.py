"""Llama-3-70B in bfloat16 over chips that are not here: memory, and what they say to each other."""

from typing import Any

import jax
import pytest
from aot_configs import MESHES, is_tpu, run

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", MESHES)
def test_70b_exchanges_two_sums_per_layer_and_copies_nothing(name: str) -> None:
    target, config, model = MESHES[name]
    compiler = "libtpu" if is_tpu(target) else "jax_plugins.xla_cuda13"
    pytest.importorskip(compiler, reason="its compiler is not here")
    step, decode = run(name)
    # A scan has its layer once, and embeddings are looked up by one more sum.
    num_sums = 2 * (1 if is_tpu(target) else model.num_layers) + 1
    for program, num_tokens in ((step, 512), (decode, config.max_num_seqs)):
        needed = program["argument_bytes"] + program["temporary_bytes"]
        print(
            f"{name}, {program['program']}: {needed / 1e9:.2f} GB per chip, temporaries "
            f"{program['temporary_bytes'] / 1e6:.1f} MB"
        )
        assert needed < program["chip_bytes"]
        assert program["aliased_bytes"] >= program["pool_bytes"]
        assert program["temporary_bytes"] < 0.05 * program["weight_bytes"]
        if program["collectives"] is None:
            assert jax.__version_info__ < (0, 11) and is_tpu(target)
            continue
        check_exchanged(program["collectives"], num_tokens * model.hidden_size, num_sums)


def check_exchanged(collectives: list[list[Any]], num_activations: int, num_sums: int) -> None:
    """Two sums of activations per layer, in their dtype; besides that a few numbers per row."""
    large = [one for one in collectives if one[2] >= num_activations]
    print(f"  {num_sums} all-reduces of {2 * num_activations / 1e6:.2f} MB; others: ", end="")
    print(sorted({tuple(one) for one in collectives if one not in large}))
    assert large == [["all-reduce", "bf16", num_activations]] * num_sums
    # The weights of blocks of 128 tokens, of which the draw picks one.
    num_blocks = 64 * 129_024 // 128 + 64 * 128
    assert all(number <= 2 * num_blocks for _, _, number in collectives if number < num_activations)
