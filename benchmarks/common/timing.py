"""Timing: sides take turns, because machines drift, and are compared within a round."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

from benchmarks.common.devices import synchronize


def seconds(
    work: Callable[[], object], device: str = "cpu", clock: Callable[[], float] | None = None
) -> float:
    """Seconds that `work` takes.

    Args:
        work: what is timed.
        device: where it computes.
        clock: read before and after; unless given, this process's CPU time on a CPU, which
            neighbours disturb less, and wall-clock time on a GPU.
    """
    clock = clock or (time.process_time if device == "cpu" else time.perf_counter)
    synchronize(device)
    started = clock()
    work()
    synchronize(device)
    return clock() - started


def in_turn(
    sides: Mapping[str, Callable[[], float]], rounds: int, warm_up: int = 1
) -> dict[str, list[float]]:
    """Every side's figures, one per round; in a round each side has its turn.

    Args:
        sides: name -> measures once.
        rounds: that count.
        warm_up: rounds before them.
    """
    found: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(warm_up + rounds):
        for name, measure in sides.items():
            figure = measure()
            if turn >= warm_up:
                found[name].append(figure)
    return found


def ratio(values: Sequence[float], reference: Sequence[float]) -> float:
    """The median of values / reference over the rounds."""
    return statistics.median(a / b for a, b in zip(values, reference, strict=True))
