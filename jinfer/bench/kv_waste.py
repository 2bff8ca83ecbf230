"""Simulates the empty fraction of allocated KV memory; runs the scheduler only, without a device.

    python -m jinfer.bench.kv_waste AzureLLMInferenceTrace_conv.csv

Requests arrive at the trace's own times, at an engine with jinfer's defaults for an 8B model on
each chip. The chip's bandwidth and arithmetic bound the time of a step. After each dispatch the
simulation counts the pages of each sequence, including those allocated ahead for further decode
steps, and the cells that its tokens fill.
"""

import argparse
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from jinfer.bench.table import table
from jinfer.bench.workload import Lengths, fitted, read_trace
from jinfer.config import EngineConfig, EnginePlan, ModelConfig
from jinfer.schedule.scheduler import Scheduler
from jinfer.schedule.sequence import TokenSequence
from jinfer.startup.chips import CHIPS, Chip
from jinfer.startup.plan import resolve_plan

LLAMA_3_8B = ModelConfig(
    family="llama", vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_layers=32,
    num_q_heads=32, num_kv_heads=8, head_dim=128, max_position_embeddings=8192, rms_norm_eps=1e-5,
    rope_theta=500_000.0,
)  # fmt: skip
# A chip, its name in JAX, and the dtype of KV pages, which decides the page size.
CASES = (
    ("h200", "NVIDIA H200", "auto"),
    ("h200", "NVIDIA H200", "int8"),
    ("v6e", "TPU v6 lite", "auto"),
    ("v6e", "TPU v6 lite", "int8"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Waste:
    """Cells of the pool, sums over dispatches."""

    num_allocated: int
    num_unfilled: int
    num_preemptions: int

    @property
    def share(self) -> float:
        return self.num_unfilled / self.num_allocated


def plan_for(chip: Chip, device_kind: str, kv_cache_dtype: str) -> EnginePlan:
    """The default plan on that chip, with the memory beside the weights."""
    return resolve_plan(
        EngineConfig(model="8b", kv_cache_dtype=kv_cache_dtype),
        LLAMA_3_8B,
        platform=chip.platform,
        free_bytes=int(chip.memory_gb * 1e9) - 2 * LLAMA_3_8B.num_parameters,
        device_kind=device_kind,
    )


def simulate(plan: EnginePlan, chip: Chip, lengths: Lengths, arrivals_s: Sequence[float]) -> Waste:
    """Simulates serving the requests, one dispatch after the other."""
    scheduler = Scheduler(
        max_slots=plan.max_slots,
        max_step_tokens=plan.max_step_tokens,
        page_size=plan.page_size,
        num_pages=plan.num_pages,
        max_model_len=plan.max_model_len,
    )
    coming = deque(zip(arrivals_s, lengths, strict=True))
    live: set[TokenSequence] = set()
    now = 0.0
    num_allocated = num_unfilled = num_preemptions = 0
    while coming or live:
        while coming and coming[0][0] <= now:
            num_input, num_output = coming.popleft()[1]
            sequence = TokenSequence("r", 0, [0] * num_input, num_input + num_output)
            scheduler.add(sequence)
            live.add(sequence)
        step = scheduler.plan(plan.max_decode_steps)
        if step is None:
            now = coming[0][0]
            continue
        weight_bytes = 2 * LLAMA_3_8B.num_parameters
        now += step.num_steps * chip.bound_s(weight_bytes, weight_bytes * step.num_tokens)
        num_preemptions += len(step.preempted)
        for chunk in step.chunks:
            for one in chunk.steps():
                scheduler.commit(one, 0 if one.samples else None)
        for sequence in live:
            num_cells = len(sequence.pages) * plan.page_size
            num_allocated += num_cells
            num_unfilled += max(0, num_cells - sequence.num_scheduled)
        for sequence in [s for s in live if s.num_tokens == s.max_length]:
            scheduler.finish(sequence)
            live.remove(sequence)
    return Waste(
        num_allocated=num_allocated, num_unfilled=num_unfilled, num_preemptions=num_preemptions
    )


def main() -> None:
    """Prints one line for each case."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("trace", help="a CSV of the Azure LLM inference traces")
    parser.add_argument("--requests", type=int, default=1000, help="read at most; default: 1000")
    args = parser.parse_args()
    lengths, arrivals_s = read_trace(args.trace, args.requests, 1.0)
    lines = []
    for name, device_kind, kv_cache_dtype in CASES:
        plan = plan_for(CHIPS[name], device_kind, kv_cache_dtype)
        waste = simulate(plan, CHIPS[name], fitted(lengths, plan.max_model_len)[0], arrivals_s)
        lines.append(
            (
                name,
                plan.kv_dtype,
                str(plan.page_size),
                str(plan.max_decode_steps),
                f"{waste.share:.2%}",
                str(waste.num_preemptions),
            )
        )
    header = ("chip", "KV pages of", "tokens a page", "steps ahead", "KV waste", "preempted")
    print(table(header, lines))


if __name__ == "__main__":
    main()
