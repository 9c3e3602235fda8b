"""`--compile`: torch.compile, and whether the run is long enough to pay for it."""

from __future__ import annotations

import time
from collections.abc import Callable

from torch import nn


def compile_and_compare(model: nn.Module, run_passes: Callable[[], object], steps: int) -> str:
    """Compiles `model` in place and reports what that costs and gains.

    `run_passes` is called before and after, twice each: a first call warms up, or compiles; the
    second is timed. Compiling pays after cost / (gain per step) steps.

    Args:
        model: compiled with dynamic shapes, for batches differ in length.
        run_passes: forward and backward passes of one optimiser step, without the update.
        steps: optimiser steps the run still has.

    Returns:
        One line for the user.
    """

    def seconds() -> float:
        started = time.perf_counter()
        run_passes()
        return time.perf_counter() - started

    seconds()
    plain = seconds()
    model.compile(dynamic=True)
    first = seconds()
    compiled = seconds()
    return verdict(plain, compiled, first - compiled, steps)


def verdict(plain: float, compiled: float, cost: float, steps: int) -> str:
    """One line on times of a step (s) and the cost of compiling (s)."""
    facts = (
        f"compiling took {cost:.1f} s; a step takes {1e3 * compiled:.1f} ms instead of "
        f"{1e3 * plain:.1f} ms"
    )
    if compiled >= plain:
        return f"warning: {facts}, so --compile does not pay here: leave it out"
    break_even = cost / (plain - compiled)
    if break_even > steps:
        return (
            f"warning: {facts}, which pays after {break_even:,.0f} steps, but this run has "
            f"{steps:,}: leave --compile out"
        )
    return f"{facts}, which pays after {break_even:,.0f} of {steps:,} steps"
