"""Predicts the time of a step from the steps that ran."""

_WEIGHT = 0.1  # of a new time in the running mean of its size: about the last dozen count


class StepTimes:
    """Seconds of a step as a line: a + b * tokens, padding included.

    Least squares fits the line to one running mean per size. All sizes have equal weight, so a
    thousand decode steps do not outweigh a few large steps. `b` is never negative; it is 0 until
    two sizes have been observed.
    """

    def __init__(self) -> None:
        self._mean_s: dict[int, float] = {}
        self._intercept_s = self._slope_s = 0.0

    def observe(self, size: int, elapsed_s: float) -> None:
        """Adds the time of one step of `size` tokens."""
        before = self._mean_s.get(size, elapsed_s)
        self._mean_s[size] = before + _WEIGHT * (elapsed_s - before)
        num_sizes = len(self._mean_s)
        middle = sum(self._mean_s) / num_sizes
        middle_s = sum(self._mean_s.values()) / num_sizes
        spread = sum((size - middle) ** 2 for size in self._mean_s)
        rise = sum((size - middle) * (s - middle_s) for size, s in self._mean_s.items())
        self._slope_s = max(0.0, rise / spread) if spread else 0.0
        self._intercept_s = middle_s - self._slope_s * middle

    def predict(self, size: int) -> float:
        """Predicted seconds of a step of `size` tokens; 0 before any observation."""
        return max(0.0, self._intercept_s + self._slope_s * size)
