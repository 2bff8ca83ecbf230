"""How long a step takes, learnt from those that ran."""

_WEIGHT = 0.1  # of a new measurement in the mean of its size: the last dozen or so count


class StepTimes:
    """Seconds of a step as a line over its size: a + b * tokens, padding included.

    The line is fitted by least squares to one running mean per size, each counting the same, so
    that a thousand decode steps do not wash out what the few large ones said. `b` is never below
    zero; until two sizes were seen the line is flat.
    """

    def __init__(self) -> None:
        self._mean_s: dict[int, float] = {}
        self._intercept_s = self._slope_s = 0.0

    def observe(self, size: int, elapsed_s: float) -> None:
        """A step of `size` tokens took so long."""
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
        """Seconds that a step of `size` tokens will take; 0 while nothing was observed."""
        return max(0.0, self._intercept_s + self._slope_s * size)
