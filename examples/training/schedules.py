"""Learning-rate schedules: λ(k) multiplies every group's own rate in optimiser step k = 0, 1, ….

With w warm-up steps of T in all, λ(k) = k/w for k < w; after that, with p = (k − w)/(T − w):

    linear                 1 − p
    cosine                 ½(1 + cos πp)
    cosine_with_restarts   ½(1 + cos π(cp mod 1)) with c cycles, 0 at the end
    polynomial             the straight line from the peak rate to 1e-7
    constant               1, without warm-up
    constant_with_warmup   1
    inverse_sqrt           √(t/(k − w + t)) with t = w, or 10,000 without warm-up
    clr, cycle             (below) the rate itself; the base rate is 1

They are functions of k, so there is no scheduler state to save.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

from examples.cli.groups import SCHEDULES

POLYNOMIAL_END = 1e-7


def schedule(
    name: str, total: int, warmup: int = 0, *, peak: float = 1.0, cycles: int = 1
) -> Callable[[int], float]:
    """λ of one of `SCHEDULES` other than clr and cycle.

    Args:
        name: which.
        total: T.
        warmup: w.
        peak: the base rate; needed by `polynomial` alone, which ends at an absolute rate.
        cycles: c.
    """

    def after(k: int) -> float:
        p = min((k - warmup) / max(1, total - warmup), 1.0)
        if name == "linear":
            return max(0.0, (total - k) / max(1, total - warmup))
        if name == "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * p))
        if name == "cosine_with_restarts":
            return 0.0 if p >= 1.0 else 0.5 * (1.0 + math.cos(math.pi * (cycles * p % 1.0)))
        if name == "polynomial":
            end = POLYNOMIAL_END / peak if peak else 0.0
            return (1.0 - end) * (1.0 - p) + end
        if name == "inverse_sqrt":
            scale = warmup or 10_000
            return math.sqrt(scale / (k - warmup + scale))
        return 1.0

    if name not in SCHEDULES or name in ("clr", "cycle"):
        raise ValueError(f"there is no schedule {name!r}")
    if name == "constant":
        return lambda k: 1.0
    return lambda k: k / warmup if k < warmup else after(k)


def clr(
    total: int,
    steps_per_epoch: int,
    warmup: int = 0,
    *,
    first: float = 2.0,
    const_epochs: float = 1.0,
    second: float = 0.2,
    end: float = 0.0,
) -> Callable[[int], float]:
    """Warm-up to `first`, held until step C, then a jump to `second` and a line to `end`.

        λ(k) = first·k/w                                     k < w
               first                                         w ≤ k < C
               max(second − (second − end)(k − C)/(T − C), end)   k ≥ C

    C counts from the start of training: `const_epochs` epochs, or steps where it is above 100.
    """
    hold = const_epochs if const_epochs > 100 else const_epochs * steps_per_epoch

    def rate(k: int) -> float:
        if k < warmup:
            return first * k / warmup
        if k < hold:
            return first
        return max(second - (second - end) * (k - hold) / max(1, total - hold), end)

    return rate


def cycle(steps: Sequence[int], rates: Sequence[float]) -> Callable[[int], float]:
    """Straight lines through (steps[i], rates[i]); after the last one its rate stays.

    Args:
        steps: rising, the first is 0.
        rates: as many.
    """
    lines = list(pairwise(zip(steps, rates, strict=True)))

    def rate(k: int) -> float:
        for (start, first), (end, last) in lines:
            if k < end:
                return first + (last - first) * (k - start) / (end - start)
        return rates[-1]

    return rate
