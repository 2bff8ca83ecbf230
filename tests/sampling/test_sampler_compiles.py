"""The sampler as XLA compiles it for a TPU that is not here."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from jinfer.bench.chips import describe
from jinfer.sampling.sampler import empty_state, sample

pytestmark = pytest.mark.slow

NUM_ROWS, VOCAB_SIZE = 128, 128_256


@pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="this jaxlib prints no program of a newer compiler"
)
def test_logits_of_128_rows_are_never_transposed() -> None:
    pytest.importorskip("libtpu")
    chip, _ = describe("v6e")
    state = jax.eval_shape(lambda: empty_state(NUM_ROWS + 1, VOCAB_SIZE))
    logits_RV = jax.ShapeDtypeStruct((NUM_ROWS, VOCAB_SIZE), jnp.float32)
    number_R = jax.ShapeDtypeStruct((NUM_ROWS,), jnp.int32)
    shapes: Any = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=SingleDeviceSharding(chip)
        ),
        (logits_RV, state, number_R, number_R),
    )
    text = jax.jit(sample).lower(*shapes).compile().as_text()
    arrays = set(re.findall(r"[fs]32\[12[89],128256\]\{\d,\d", text or ""))
    assert arrays == {"f32[128,128256]{1,0", "s32[128,128256]{1,0", "s32[129,128256]{1,0"}
