"""What a case must move and compute, timings, and the command that reports them."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

from jinfer.bench import chips
from jinfer.bench.baselines import BASELINES, names_for
from jinfer.bench.ceilings import Ceilings
from jinfer.bench.kernel_cases import CASES, chosen, decode, work_of
from jinfer.bench.kernels import (
    IMPLEMENTATIONS,
    _calls_in_turn,
    _compiled_loop,
    _error,
    _page_table,
    _rows,
    arguments,
    page_size_of,
    time_case,
    timing_table,
)
from jinfer.bench.kernels_ahead import check_targets, compile_cases, compiled_table
from jinfer.bench.table import WIDTH
from jinfer.bench.timing import Timing, time_loop
from jinfer.cli import main
from jinfer.step.attention import ATTENTION
from kernels_pallas.paged_attention.cases import Case

CEILINGS = Ceilings(copy_bytes_per_s=10e9, read_bytes_per_s=20e9, flops_per_s=1e11, dtype="float32")


def case(rows: list[tuple[int, int]], pages_dtype: str | None = None) -> Case:
    kv_len, query_len = zip(*rows, strict=True)
    return Case(
        name="a", kv_len=kv_len, query_len=query_len, num_padding=0, pages_dtype=pages_dtype
    )  # 4 query heads, 2 kv heads of width 64


def test_work_of_one_decoding_row() -> None:
    work = work_of(case([(100, 1)]), "float32")
    one_head = 64 * 4  # bytes
    moved_kv = (1 + 1 + 99) * 2 * 2 * one_head  # new ones read and written, old ones read
    assert work.num_bytes == moved_kv + 2 * 4 * one_head
    assert work.num_flops == 100 * 4 * 2 * 2 * 64
    assert work.pool_bytes == 100 * 2 * 2 * one_head


def test_work_counts_the_pairs_that_are_not_masked() -> None:
    rows = [(7, 7), (9, 3), (5, 0), (4, 1)]
    pairs = sum(1 for kv, new in rows for q in range(kv - new, kv) for k in range(kv) if k <= q)
    assert work_of(case(rows), "bfloat16").num_flops == pairs * 4 * 2 * 2 * 64


def test_work_of_8_bit_pages_counts_scales() -> None:
    plain, small = (work_of(case([(1000, 1)], dtype), "float32") for dtype in (None, "int8"))
    assert small.pool_bytes == 1000 * 2 * 2 * (64 + 4)
    assert plain.num_bytes - small.num_bytes == 1000 * 2 * 2 * (64 * 4 - 64 - 4)


def test_cases_have_names_of_their_own() -> None:
    names = [each.name for each in CASES]
    assert len(set(names)) == len(names)
    assert {"decode_64x8k", "decode_256x128k", "prefill_8k", "decode_16x8k_fp8"} <= set(names)
    assert decode(16, 8192) in CASES


def test_choosing_cases() -> None:
    small = chosen([], small=True, dtype="float32")
    assert 5 <= len(small) < len(chosen([], small=False, dtype="float32")) == len(CASES)
    assert [c.name for c in chosen(["prefill_*"], small=True, dtype="float32")] == [
        "prefill_1k",
        "prefill_8k",
    ]


def test_arguments_cover_every_page_once() -> None:
    mixed = case([(33, 1), (16, 16), (5, 2)])
    made = arguments(mixed, "float32", 16, 2, jax.ShapeDtypeStruct)
    table_BM = _page_table(mixed, 16)
    assert made.pages.shape == (2, 1 + 5, 2, 16, 128)
    assert made.table_BM.shape == table_BM.shape
    assert sorted(table_BM[table_BM > 0]) == [1, 2, 3, 4, 5]
    kv_len_B, start_B, query_len_B = _rows(mixed)
    assert start_B.tolist() == [0, 1, 17] and made.q_TNH.shape[0] == 19
    assert np.all(kv_len_B >= query_len_B)


def test_names_and_page_sizes_are_the_engines_own() -> None:
    assert {name for names in IMPLEMENTATIONS.values() for name in names} <= set(ATTENTION)
    plain, quantized = decode(1, 1024), decode(1, 1024, pages_dtype="int8")
    sizes = {
        p: (page_size_of(plain, p, "bfloat16"), page_size_of(quantized, p, "bfloat16"))
        for p in IMPLEMENTATIONS
    }
    assert sizes == {"cpu": (16, 16), "gpu": (16, 64), "tpu": (64, 128)}


def test_a_loop_is_timed_without_its_dispatch(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    def run(num_calls: int) -> None:
        now[0] += 0.005 + 0.001 * num_calls

    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    timing = time_loop(run, num_loops=3, loop_s=0.05)
    assert timing.num_calls == 50
    assert timing.median_s == pytest.approx(0.001)


def test_ceilings_bound_by_the_slower_of_two() -> None:
    assert CEILINGS.bound_s(20e9, 0.5e11) == 1.0
    assert CEILINGS.bound_s(5e9, 2e11) == 2.0
    better = Ceilings(
        copy_bytes_per_s=30e9, read_bytes_per_s=15e9, flops_per_s=1e10, dtype="float32"
    )
    assert CEILINGS.faster(better).bytes_per_s == 30e9
    assert CEILINGS.faster(better).flops_per_s == 1e11


def test_what_cannot_run_says_why() -> None:
    options = {"dtype": "float32", "page_size": 16, "num_loops": 1}
    no_room = time_case(decode(16, 1024), "xla", free_bytes=1 << 20, **options)
    declined = time_case(case([(20, 1)]), "gpu", free_bytes=1 << 30, **options)
    shown = timing_table([no_room, declined], CEILINGS)
    assert "no room: 0.2 GiB needed" in shown and "choose the xla implementation" in shown
    assert max(map(len, shown.splitlines())) <= WIDTH


def test_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    words = ["bench", "kernels", "--cases", "decode_1x1k", "--repeats", "2", "--json", str(file)]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= WIDTH
    assert "decode_1x1k  xla" in out and "in the same run: copy" in out
    figures = json.loads(file.read_text())
    [result] = figures["results"]
    assert result["why_not"] is None and result["timing"]["num_loops"] == 2
    assert 0 < result["bandwidth_share"] < 1.5
    moved_s = result["work"]["num_bytes"] / result["timing"]["median_s"]
    ceilings = figures["ceilings"]
    best = max(ceilings["copy_bytes_per_s"], ceilings["read_bytes_per_s"])
    assert result["bandwidth_share"] == pytest.approx(moved_s / best)


def test_targets() -> None:
    check_targets(["v4", "v6e", "h100", "h200"])  # one architecture of GPUs, any of TPUs
    with pytest.raises(ValueError, match="one GPU architecture"):
        check_targets(["a100", "h100"])


@pytest.mark.slow
def test_compiles_for_a_chip_that_is_not_here() -> None:
    pytest.importorskip("libtpu", reason='the TPU compiler is not here; pip install "jax[tpu]"')
    cases = [decode(1, 1024), decode(64, 131_072)]
    run, no_room_here = compile_cases(cases, "v5e", ["tpu"], dtype="bfloat16", page_size=None)
    assert run.alias_bytes is not None and run.pool_bytes is not None
    assert run.alias_bytes >= run.pool_bytes and run.bound_by == "bandwidth"
    assert run.bound_s == pytest.approx(run.work.num_bytes / 819e9)
    shown = compiled_table([run, no_room_here])
    assert "in place" in shown and "no room: 34 GB of pages" in shown
    assert max(map(len, shown.splitlines())) <= WIDTH


def test_short_calls_share_a_turn_of_the_loop_but_not_on_a_cpu() -> None:
    short, long = (work_of(decode(16, context), "bfloat16") for context in (1024, 131_072))
    turns = [_calls_in_turn(work, "gpu") for work in (short, long)]
    assert turns == [16, 1] and _calls_in_turn(short, "cpu") == 1


def test_a_loop_in_turns_runs_and_is_counted_by_the_call() -> None:
    case = decode(2, 64)
    for turn in (1, 3):
        run, _ = _compiled_loop(case, "xla", ATTENTION["xla"], "float32", 16, 2, turn)
        run(2)
    assert Timing(median_s=6.0, fastest_s=3.0, slowest_s=9.0, num_calls=2, num_loops=1).of_each(
        3
    ) == Timing(median_s=2.0, fastest_s=1.0, slowest_s=3.0, num_calls=6, num_loops=1)


def wrong(q_TNH, k_TKH, v_TKH, pages, layer, table_BM, kv_len_B, *rows, scale):
    """Misses the last key of every row."""
    return ATTENTION["xla"](
        q_TNH, k_TKH, v_TKH, pages, layer, table_BM, kv_len_B - 1, *rows, scale=scale
    )


@pytest.mark.parametrize("pages_dtype", [None, "int8", "float8_e4m3fn"])
def test_a_wrong_answer_shows(pages_dtype: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    mixed = case([(200, 1), (40, 40), (70, 3)], pages_dtype)
    options = {"dtype": "float32", "page_size": 16, "free_bytes": 1 << 30, "num_loops": 1}
    right = time_case(mixed, "xla", **options)
    assert right.error is not None and right.error < 8e-5 and not right.is_wrong
    monkeypatch.setitem(ATTENTION, "wrong", wrong)
    found = time_case(mixed, "wrong", **options)
    assert found.is_wrong
    assert "WRONG" in timing_table([right, found], CEILINGS).splitlines()[2]


def test_a_wrong_answer_ends_the_command_with_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ATTENTION, "wrong", wrong)
    words = "bench kernels --cases decode_1x1k --repeats 1 --implementation"
    assert main([*words.split(), "wrong"]) == 1


def test_baselines_are_timed_where_they_can_be() -> None:
    assert names_for(decode(16, 1024), ("gpu",), "gpu") == ("gpu", "triton", "cudnn")
    assert names_for(decode(16, 1024), ("tpu",), "tpu") == ("tpu",)
    for declined in (decode(16, 1024, pages_dtype="int8"), case([(9, 2)])):
        assert names_for(declined, ("gpu",), "gpu") == ("gpu",)


def test_the_triton_baseline_is_called_as_it_must_be(monkeypatch: pytest.MonkeyPatch) -> None:
    triton = BASELINES["triton"]
    simulated = replace(triton, attend=partial(triton.attend, interpret=True))
    monkeypatch.setitem(BASELINES, "triton", simulated)
    rows = case([(256, 1), (100, 1), (17, 1)])
    assert _error(rows, "triton", "float32", 8) < 8e-5


@pytest.mark.parametrize(
    ("name", "rows", "page_size", "message"),
    [
        ("triton", [(9, 3)], 8, "one token per row; got 3 tokens of 1 rows"),
        ("triton", [(24, 1)], 8, "into 16 parts of whole blocks of 8 pages; got 3 pages"),
        ("cudnn", [(24, 1), (8, 1)], 8, "as many pages as the table has entries, 6; got 4"),
    ],
)
def test_baselines_decline_in_a_sentence(
    name: str, rows: list[tuple[int, int]], page_size: int, message: str
) -> None:
    with pytest.raises(NotImplementedError, match=message):
        _error(case(rows), name, "float32", page_size)


@pytest.mark.parametrize(("target", "said"), [("v6e", "compiling for v6e"), (None, "pip install")])
def test_without_an_accelerator_the_compiler_is_asked(
    target: str | None,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    compiled, timed = [], []
    for attribute, value in {
        "default_target": lambda: target,
        "_compile": lambda _, targets: compiled.extend(targets) or {},
        "_time": lambda *_: timed.append("the CPU") or {},
    }.items():
        monkeypatch.setattr(f"jinfer.cli.bench_kernels.{attribute}", value)
    assert main(["bench", "kernels"]) == 0
    assert said in capsys.readouterr().err
    assert (compiled, timed) == (([target], []) if target else ([], ["the CPU"]))


@pytest.mark.slow
def test_baselines_compile_for_an_h200() -> None:
    pytest.importorskip("jax_plugins.xla_cuda13", reason="the GPU compiler is not here")
    case = decode(16, 8192)
    [triton] = compile_cases([case], "h200", ["triton"], dtype="bfloat16", page_size=None)
    assert triton.why_not is None and triton.temp_bytes is not None
    assert triton.temp_bytes < triton.work.pool_bytes // 16


@pytest.mark.parametrize(
    ("installed", "want"),
    [
        (set(), None),
        ({"jax_plugins"}, None),
        ({"jax_plugins", "jax_plugins.xla_cuda13"}, "h200"),
        ({"libtpu"}, "v6e"),
    ],
)
def test_a_chip_without_its_compiler_is_no_default(
    installed: set[str], want: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def find_spec(name: str) -> object:
        package, _, inner = name.partition(".")
        if inner and package not in installed:  # as importlib does
            raise ModuleNotFoundError(package)
        return object() if name in installed else None

    monkeypatch.setattr(chips, "find_spec", find_spec)
    assert chips.default_target() == want
