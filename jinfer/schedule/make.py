"""Makes the scheduler of an engine's plan."""

from jinfer.config import EnginePlan
from jinfer.schedule.pace import Pace
from jinfer.schedule.scheduler import Scheduler


def make_scheduler(
    plan: EnginePlan, pace: Pace, *, prefix_caching: bool, min_restored_pages: int | None = None
) -> Scheduler:
    """Makes the scheduler of a plan; `min_restored_pages` None = no pages in host memory."""
    return Scheduler(
        max_slots=plan.max_slots,
        max_step_tokens=plan.max_step_tokens,
        page_size=plan.page_size,
        num_pages=plan.num_pages,
        max_model_len=plan.max_model_len,
        max_chunk_tokens=plan.max_chunk_tokens,
        prefix_caching=prefix_caching,
        num_host_pages=plan.num_host_pages if min_restored_pages else 0,
        min_restored_pages=min_restored_pages or 1,
        pace=pace,
    )
