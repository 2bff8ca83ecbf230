"""The lines that start-up writes to the logger: in words for every user, the details at DEBUG."""

from jinfer.compile.programs import CompileReport
from jinfer.config import EngineConfig, EnginePlan, ModelConfig
from jinfer.log import LOGGER
from jinfer.weights.load import LoadReport

_CHIPS = {"cpu": "CPU", "gpu": "GPU", "tpu": "TPU"}


class StartLines:
    """Writes the lines of one start; with shown=False, none."""

    def __init__(self, *, shown: bool) -> None:
        self._shown = shown

    def plan(self, config: EngineConfig, model: ModelConfig, plan: EnginePlan) -> None:
        """The model, where it runs, and its memory for requests."""
        on = _CHIPS[plan.platform]
        if plan.tensor_parallel_size > 1:
            on = f"{plan.tensor_parallel_size} {on}s"
        self._info(
            f"{config.model}: {_millions(model.num_parameters)} parameters in {plan.dtype} on {on}"
        )
        pool_gib = plan.num_pages * plan.page_bytes * plan.tensor_parallel_size / 2**30
        self._info(
            f"up to {_requests(plan.max_slots)} at once; KV cache of {pool_gib:.2f} GiB for "
            f"{plan.kv_capacity:,} tokens; at most {plan.max_model_len:,} per request"
        )
        rows = ", ".join(map(str, plan.decode_buckets))
        self._debug(
            f"{plan.attention} attention, layer loop {plan.layer_loop}, {plan.weight_layout} "
            f"weight layout, {plan.num_pages:,} pages of {plan.page_size} tokens in "
            f"{plan.kv_dtype}; steps of {', '.join(map(str, plan.token_buckets))} tokens"
            + (f", decodes of {rows} rows, up to {plan.max_decode_steps} at once" if rows else "")
        )

    def weights(self, report: LoadReport | None) -> None:
        """The time of loading; None = random weights."""
        self._info("weights are random" if report is None else str(report))

    def programs(self, report: CompileReport) -> None:
        """The number of programs, and the time that they took."""
        self._info(str(report))
        slowest = report.slowest
        self._debug(
            f"longest program: {slowest}, {report.program_s[slowest]:.1f} s; "
            f"{report.num_untraced} programs were loaded without tracing"
        )

    def host_pages(self, plan: EnginePlan, min_restored_pages: int | None) -> None:
        """The use of host memory for the KV cache."""
        host_gib = plan.num_host_pages * plan.page_bytes * plan.tensor_parallel_size / 2**30
        if min_restored_pages is None:
            self._info(
                "kv_offloading_size is not used: computing tokens again is faster here than "
                "fetching them from host memory"
            )
            return
        self._info(
            f"host memory keeps {plan.num_host_pages * plan.page_size:,} more tokens of the KV "
            f"cache, {host_gib:.2f} GiB"
        )
        self._debug(f"prefixes of {min_restored_pages} pages or more are fetched from the host")

    def _info(self, text: str) -> None:
        if self._shown:
            LOGGER.info(text)

    def _debug(self, text: str) -> None:
        if self._shown:
            LOGGER.debug(text)


def _millions(number: int) -> str:
    """ "5.3 million", "8.0 billion" """
    if number < 10**5:
        return f"{number:,}"
    return f"{number / 1e6:.1f} million" if number < 10**9 else f"{number / 1e9:.1f} billion"


def _requests(number: int) -> str:
    return "1 request" if number == 1 else f"{number} requests"
