"""Times a call inside one compiled loop, so that its dispatch does not count."""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

MOST_CALLS = 10_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """Seconds of one call: the median over loops of `num_calls` calls, and the extremes."""

    median_s: float
    fastest_s: float
    slowest_s: float
    num_calls: int  # in each loop
    num_loops: int

    def of_each(self, num: int) -> "Timing":
        """The same timing, if each call made `num` calls."""
        return Timing(
            median_s=self.median_s / num,
            fastest_s=self.fastest_s / num,
            slowest_s=self.slowest_s / num,
            num_calls=self.num_calls * num,
            num_loops=self.num_loops,
        )


def time_loop(run: Callable[[int], None], *, num_loops: int = 5, loop_s: float = 0.1) -> Timing:
    """Times a compiled loop whose length makes it take about `loop_s`.

    Subtracts the time of a loop of no calls, which is the dispatch and the wait.

    Args:
      run: runs the loop for a number of calls and returns when the device is done; 0 is allowed.
      num_loops: number of loops to take the median of.
      loop_s: the least time of a loop; a single call may take longer.
    """
    run(1)  # pays one-time costs
    empty_s = statistics.median(_elapsed_s(run, 0) for _ in range(5))
    one_s = max(_elapsed_s(run, 1) - empty_s, 1e-7)
    num_calls = min(max(1, math.ceil(loop_s / one_s)), MOST_CALLS)
    each_s = [max(_elapsed_s(run, num_calls) - empty_s, 1e-9) / num_calls for _ in range(num_loops)]
    return Timing(
        median_s=statistics.median(each_s),
        fastest_s=min(each_s),
        slowest_s=max(each_s),
        num_calls=num_calls,
        num_loops=num_loops,
    )


def _elapsed_s(run: Callable[[int], None], num_calls: int) -> float:
    start_s = time.perf_counter()
    run(num_calls)
    return time.perf_counter() - start_s
