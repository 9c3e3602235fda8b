"""The cubic between two flat ends (Sanh et al. 2020, eq. 8), for thresholds and whatever follows.

step s = 1 … T, w warm-up steps, a and z multiples of them:
s ≤ a·w          start
s > T - z·w      end
in between       end + (start - end)·c³,   c = 1 - (s - a·w)/(T - (a + z)·w)
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cubic:
    """The course of a schedule.

    Attributes:
        total: T.
        first: a·w, the last step of the first value.
        last: T − z·w, the last step before the end's value is there by definition.
    """

    total: int
    first: float
    last: float

    @classmethod
    def of(cls, total: int, warmup: int, initial: float, final: float) -> Cubic:
        """From T, w, a and z.

        Raises:
            ValueError: the flat ends leave no step in between.
        """
        first, last = initial * warmup, total - final * warmup
        if first >= last:
            raise ValueError(
                f"warmup_steps={warmup}: {initial} times that before pruning and {final} times "
                f"after leave none of the {total} steps to prune in; make it smaller"
            )
        return cls(total, first, last)

    def value(self, step: int, start: float, end: float) -> float:
        """The value in step 1, 2, …"""
        if step <= self.first:
            return start
        if step > self.last:
            return end
        left = 1.0 - (step - self.first) / (self.last - self.first)
        return end + (start - end) * left**3

    def ended(self, step: int) -> bool:
        """Whether step `step` and all after it have the end's value."""
        return step >= self.last
