"""paged_attention_gpu: its numbers in interpret mode, and its manners."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import backend

from kernels_pallas.compat import told_the_chip
from kernels_pallas.paged_attention.cases import CASES, LAYER, Case, build
from kernels_pallas.paged_attention.gpu import (
    _num_parts,
    _unit_of_chip,
    paged_attention_gpu,
    stored_head_dim,
)
from kernels_pallas.paged_attention.reference import paged_attention_reference

OLD_JAX = jax.__version_info__ < (0, 11)
interpreted_only_on_new_jax = pytest.mark.skipif(
    OLD_JAX, reason="jax before 0.11 cannot interpret Mosaic GPU kernels"
)
newer_jax_is_not_refused = pytest.mark.skipif(OLD_JAX, reason="jax before 0.11 is refused first")
TOLERANCE = {"bfloat16": 2e-2, "float16": 5e-3}
# More keys than the ring has stages for, even in three parts, so that stages are used again.
LONG = Case(name="long", kv_len=(1200, 0, 65, 64), query_len=(1, 0, 1, 1), page_size=32)
LONG_CHUNK = Case(name="long_chunk", kv_len=(600,), query_len=(40,), page_size=16, window=300)
LONG_FP8 = replace(LONG, name="long_fp8", pages_dtype="float8_e4m3fn")
LONG_CHUNK_INT8 = replace(LONG_CHUNK, name="long_chunk_int8", page_size=64, pages_dtype="int8")
WIDTH_96 = replace(LONG_CHUNK_INT8, name="width_96_int8", head_dim=96, stored_width=128)
# Each takes seconds to interpret. These have every option, reuse stages, and split contexts.
FAST = ("window_soft_cap_sinks-parts_1", "long-parts_3", "long_fp8-parts_3")
SMALL_PAGES = "on GPU, 8-bit pages hold 32 or a multiple of 64 tokens; got page_size=8. Choose"
DECLINED = {
    "width_96": r"must be one of \[64, 128, 256\]; got 96. Allocate it with 128, which pads",
    "int8_pages": SMALL_PAGES,
    "int8_pages_all_options": SMALL_PAGES,
    "bfloat16_fp8_pages": SMALL_PAGES,
}


def in_16_bits(case):
    """The case with queries that the kernel takes."""
    return replace(case, dtype="bfloat16" if case.dtype == "float32" else case.dtype)


RUNS = [
    pytest.param(
        in_16_bits(case),
        num_parts,
        id=(name := f"{case.name}-parts_{num_parts}"),
        marks=() if name in FAST else pytest.mark.slow,
    )
    for case, num_parts in (
        *((case, 1) for case in CASES if case.name not in DECLINED),
        *((case, 3) for case in CASES if case.name in ("empty_rows", "bfloat16_sinks")),
        # What was declined for its small pages.
        *(
            (replace(case, name=f"{case.name}_of_32", page_size=32), 1)
            for case in CASES
            if DECLINED.get(case.name) == SMALL_PAGES
        ),
        *((case, num_parts) for case in (LONG, LONG_CHUNK) for num_parts in (1, 3)),
        (replace(LONG, name="pages_of_128", page_size=128, head_dim=128), 1),
        (replace(LONG_CHUNK, name="width_256_long", head_dim=256), 2),
        *((case, num_parts) for case in (LONG_FP8, LONG_CHUNK_INT8) for num_parts in (1, 3)),
        (replace(LONG_FP8, name="fp8_pages_of_128", page_size=128, head_dim=128), 1),
        (replace(LONG_CHUNK_INT8, name="width_256_int8", head_dim=256), 2),
        (WIDTH_96, 1),
    )
]


# Another way to multiply, with rows of another number; the rest is the same.
RUNS_ON_BLACKWELL = [
    pytest.param(in_16_bits(case), num_parts, id=case.name, marks=marks)
    for case, num_parts, marks in (
        (LONG_FP8, 3, ()),
        (LONG, 1, pytest.mark.slow),
        (LONG_CHUNK_INT8, 2, pytest.mark.slow),
        (WIDTH_96, 1, pytest.mark.slow),
        *(
            (case, 1, pytest.mark.slow)
            for case in CASES
            if case.name in ("prefill_at_page_edges", "empty_rows", "group_3", "width_128")
            or case.name in ("window_soft_cap_sinks", "float16", "nothing_to_do")
        ),
    )
]


def interpreted(inputs, **tiling):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    interpret = plgpu.InterpretGPUParams(detect_races=True)
    fn = partial(paged_attention_gpu, **inputs.options, **tiling, interpret=interpret)
    return jax.jit(fn, static_argnums=4)


def races_found():
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call  # no public way

    return interpret_pallas_call.get_races().races_found


def same_bits(a, b):
    return np.array_equal(*(np.ascontiguousarray(x).view(np.uint8) for x in (a, b)))


def same_pages(a, b):
    """Page 0 is the bin; everything else is bit-exact: written where asked, else untouched."""
    return all(
        same_bits(x[:, 1:], y[:, 1:]) and same_bits(np.delete(x, LAYER, 0), np.delete(y, LAYER, 0))
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


@interpreted_only_on_new_jax
@pytest.mark.parametrize(("case", "num_parts"), RUNS)
def test_equals_the_reference(case, num_parts):
    check(case, num_parts=num_parts)


@interpreted_only_on_new_jax
@pytest.mark.parametrize(("case", "num_parts"), RUNS_ON_BLACKWELL)
def test_equals_the_reference_on_blackwell(case, num_parts):
    check(case, num_parts=num_parts, unit="tcgen05")


def check(case, **tiling):
    inputs = build(case)
    expected_TNH, expected_pages = paged_attention_reference(*inputs.args, **inputs.options)
    attend = interpreted(inputs, **tiling)
    out_TNH, pages = jax.tree.map(np.asarray, attend(*inputs.args))
    assert not races_found()

    tolerance, owned_T = TOLERANCE[case.dtype], inputs.owned_T
    np.testing.assert_allclose(
        out_TNH[owned_T].astype(np.float32), expected_TNH[owned_T], rtol=tolerance, atol=tolerance
    )
    np.testing.assert_array_equal(out_TNH[~owned_T], 0)
    assert out_TNH.dtype == inputs.args[0].dtype
    assert same_pages(pages, expected_pages)

    again_TNH, pages_again = jax.tree.map(np.asarray, attend(*inputs.args))
    assert same_bits(out_TNH, again_TNH)
    assert same_pages(pages, pages_again)


@interpreted_only_on_new_jax
@pytest.mark.slow
@pytest.mark.parametrize("tile_tokens", [1, 5])
def test_any_tile_gives_the_same_answer(tile_tokens):
    case = next(case for case in CASES if case.name == "window_soft_cap_sinks")
    inputs = build(replace(case, dtype="bfloat16"))
    expected_TNH, _ = paged_attention_reference(*inputs.args, **inputs.options)
    out_TNH, _ = interpreted(inputs, tile_tokens=tile_tokens)(*inputs.args)
    got_TNH = np.asarray(out_TNH)[inputs.owned_T].astype(np.float32)
    np.testing.assert_allclose(got_TNH, expected_TNH[inputs.owned_T], rtol=2e-2, atol=2e-2)


def test_parts_fill_the_chip_and_are_not_tiny():
    num_parts = partial(_num_parts, None, unit="wgmma")
    assert num_parts(num_blocks=8, context_tokens=1 << 20) == 33  # of 8 makes 264 = 2 * 132
    assert _num_parts(None, num_blocks=8, context_tokens=1 << 20, unit="tcgen05") == 37
    assert num_parts(num_blocks=8, context_tokens=4096) == 8
    assert num_parts(num_blocks=1000, context_tokens=1 << 20) == 1
    assert num_parts(num_blocks=1, context_tokens=16) == 1


def arrays(**changes):
    case = Case(name="refused", kv_len=(9,), query_len=(1,), dtype="bfloat16")
    inputs = build(replace(case, **changes))
    return inputs.args, inputs.options


@pytest.mark.parametrize("name", DECLINED)
def test_declines_a_case_by_its_limit(name):
    case = in_16_bits(next(case for case in CASES if case.name == name))
    inputs = build(case)
    with pytest.raises(NotImplementedError, match=DECLINED[name]):
        paged_attention_gpu(*inputs.args, **inputs.options)


REFUSALS = (
    (
        {"page_size": 24},
        r"16-bit pages hold 8, 16, 32 or a multiple of 64 tokens; got page_size=24",
    ),
    ({"page_size": 16, "pages_dtype": "int8"}, r"pages hold 32 or .*; got page_size=16\. Choose"),
    ({"num_q_heads": 130}, r"at most 64 query heads; got 65\. Choose the xla implementation"),
    (
        {"head_dim": 320},
        r"on GPU, heads are at most 256 wide; got head_dim=320\. Choose the xl",
    ),
    (
        {"dtype": "float16", "pages_dtype": "int8", "page_size": 32},
        r"beside 8-bit pages q, k and v must all be bfloat16; got float16\. Convert them",
    ),
)


@pytest.mark.parametrize(("changes", "message"), REFUSALS)
def test_refuses_what_it_cannot_do(changes, message):
    args, options = arrays(**changes)
    with pytest.raises(NotImplementedError, match=message):
        paged_attention_gpu(*args, **options)


def test_refuses_mixed_dtypes():
    (q_TNH, *others), options = arrays()
    with pytest.raises(NotImplementedError, match="got bfloat16, float32. Convert them"):
        paged_attention_gpu(q_TNH.astype(jnp.float32), *others, **options)


def test_stored_head_dim_is_the_next_that_the_kernel_takes():
    widths = [stored_head_dim(head_dim) for head_dim in (40, 64, 80, 96, 128, 192, 256)]
    assert widths == [64, 64, 128, 128, 128, 256, 256]


@newer_jax_is_not_refused
def test_refuses_to_run_on_a_cpu():
    args, options = arrays()
    message = r"needs a Hopper or Blackwell chip .*; got cpu, None\. .*, attention=\"xla_wide\"\."
    with pytest.raises(NotImplementedError, match=message):
        paged_attention_gpu(*args, **options)


def chip(kind, **more):
    return SimpleNamespace(platform="cuda", device_kind=kind, num_cores=100, **more)


OTHERS = (
    *(("Tesla T4", "7.5"), ("NVIDIA A100-SXM4-80GB", "8.0"), ("NVIDIA L4", "8.9")),
    ("NVIDIA GeForce RTX 5090", "12.0"),  # a Blackwell without tcgen05
)


@newer_jax_is_not_refused
@pytest.mark.parametrize(("kind", "capability"), OTHERS)
def test_refuses_other_chips(kind, capability, monkeypatch):
    args, options = arrays()
    message = rf"10.x; got {kind}, (None|{capability})\. .*, attention=\"xla_wide\"\."
    # A mesh tells its chip's kind and no more.
    with told_the_chip(chip(kind)), pytest.raises(NotImplementedError, match=message):
        paged_attention_gpu(*args, **options)
    monkeypatch.setattr(
        backend, "get_default_device", lambda: chip(kind, compute_capability=capability)
    )
    with pytest.raises(NotImplementedError, match=message):
        paged_attention_gpu(*args, **options)


@newer_jax_is_not_refused
def test_refuses_a_blackwell_that_mosaic_would_take_for_a_hopper():
    args, options = arrays()
    with (
        told_the_chip(chip("NVIDIA B200")),
        pytest.raises(NotImplementedError, match=r"tells its .* got NVIDIA B200, None\. Choose"),
    ):
        paged_attention_gpu(*args, **options)


@newer_jax_is_not_refused
@pytest.mark.parametrize(
    ("kind", "capability", "unit"),
    [
        *(("NVIDIA H100 80GB HBM3", "9.0", "wgmma"), ("NVIDIA GH200 480GB", "9.0", "wgmma")),
        *(("NVIDIA B200", "10.0", "tcgen05"), ("NVIDIA B300", "10.3", "tcgen05")),
    ],
)
def test_chooses_what_multiplies_by_the_chip(kind, capability, unit, monkeypatch):
    if unit == "wgmma":
        with told_the_chip(chip(kind)):
            assert _unit_of_chip() == unit
    monkeypatch.setattr(
        backend, "get_default_device", lambda: chip(kind, compute_capability=capability)
    )
    assert _unit_of_chip() == unit
    with told_the_chip(chip(kind)):
        assert _unit_of_chip() == unit


@newer_jax_is_not_refused
def test_refuses_unknown_units_and_wide_heads_on_blackwell():
    args, options = arrays()
    with pytest.raises(ValueError, match="unit must be wgmma or tcgen05; got unit='mma'. Leave"):
        paged_attention_gpu(*args, **options, unit="mma", interpret=True)
    args, options = arrays(head_dim=256)
    message = "on Blackwell, the pool's head_dim must be 64 or 128; got 256. Choose the xla"
    with pytest.raises(NotImplementedError, match=message):
        paged_attention_gpu(*args, **options, unit="tcgen05", interpret=True)


@pytest.mark.skipif(not OLD_JAX, reason="needs jax before 0.11")
def test_refuses_old_jax():
    args, options = arrays()
    with pytest.raises(NotImplementedError, match=r"needs jax >= 0.11; got 0.*Update jax"):
        paged_attention_gpu(*args, **options)


@newer_jax_is_not_refused
@pytest.mark.parametrize("tile_tokens", [0, 33])
def test_refuses_impossible_tiles(tile_tokens):
    args, options = arrays()
    message = f"from 1 to 32, the rows .* per kv head; got tile_tokens={tile_tokens}. Leave"
    with pytest.raises(ValueError, match=message):
        paged_attention_gpu(*args, **options, tile_tokens=tile_tokens, interpret=True)


@newer_jax_is_not_refused
def test_refuses_no_parts():
    args, options = arrays()
    with pytest.raises(ValueError, match="num_parts must be >= 1; got num_parts=0. Leave it out"):
        paged_attention_gpu(*args, **options, num_parts=0, interpret=True)
