"""Values of a few seeds in a picture."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from .statistics import half_interval


def dots(
    axes: Any, groups: dict[str, Sequence[float]], colour: str = "tab:blue", shift: float = 0.0
) -> None:
    """Draws every group's values as dots, beside them the mean and, of three or more, its interval.

    Args:
        axes: matplotlib's.
        groups: label -> one value per seed; empty ones leave a gap.
        colour: of the dots and the interval.
        shift: moves the dots along the axis, for several calls on the same labels.
    """
    for place, values in enumerate(groups.values()):
        if values:
            axes.plot([place + shift] * len(values), values, "o", ms=4, color=colour, alpha=0.6)
            mean = statistics.mean(values)
            half = half_interval(values) if len(values) > 2 else 0.0  # of two it hides the rest
            axes.errorbar(place + shift + 0.14, mean, half, fmt="_", capsize=3, color=colour)
    axes.set_xticks(range(len(groups)), list(groups), rotation=25, ha="right", fontsize="small")
    axes.grid(alpha=0.25, axis="y")
