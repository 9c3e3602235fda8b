"""What a few seeds tell: means, 95 % intervals, differences within a seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence


def half_interval(values: Sequence[float]) -> float:
    """Half of the 95 % interval of the mean, t·s/√n with n seeds; 0 of a single value.

    t is the 97.5 % quantile of Student's distribution with n − 1 degrees of freedom, to the three
    decimals of the printed tables.
    """
    from scipy.stats import t  # a second to import, and reading rows does not need it

    n = len(values)
    if n < 2:
        return 0.0
    return round(float(t.ppf(0.975, n - 1)), 3) * statistics.stdev(values) / math.sqrt(n)


def mean_and_interval(values: Sequence[float], digits: int = 4) -> str:
    """Mean and 95 % interval."""
    if len(values) < 2:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.mean(values):.{digits}f} ± {half_interval(values):.{digits}f}"


def paired_gaps(values: Mapping[int, float], reference: Mapping[int, float]) -> list[float]:
    """values − reference of every seed that both have."""
    return [values[seed] - reference[seed] for seed in sorted(values.keys() & reference.keys())]


def paired_difference(values: dict[int, float], reference: dict[int, float]) -> str:
    """Mean and 95 % interval of values − reference over the seeds both have; "" without any.

    Runs of one seed share the order of their rows and the head they start from, so the interval
    of differences is often narrower than those of the two means suggest.
    """
    gaps = paired_gaps(values, reference)
    if not gaps:
        return ""
    interval = f" ± {half_interval(gaps):.4f}" if len(gaps) > 1 else ""
    return f"{statistics.mean(gaps):+.4f}{interval}"
