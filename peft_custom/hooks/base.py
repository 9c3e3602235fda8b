"""`TrainingHooks`: what an adaptive method does around an applied optimiser step."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Any, ClassVar

from torch import Tensor

from ..config import PeftConfig


class MicroBatch(dict[str, Any]):
    """A model's arguments for one of the batches that make an optimiser step's gradient together.

    `prepare` takes any other batch for the whole of a step.

    Attributes:
        weight: its share of the step's loss, Σ weight = 1 over the step's batches of all processes;
            0 for a batch that only keeps a process in step with the others.
        last: the step ends with it.
    """

    def __init__(self, arguments: Mapping[str, Any], *, weight: float, last: bool) -> None:
        super().__init__(arguments)
        self.weight, self.last = weight, last


class TrainingHooks:
    """What a tuner does around every applied optimiser step; the base class does nothing.

    A tuner overrides what it needs and returns an instance from `BaseTuner.training_hooks`. The
    order in step t: `begin_step`, forward and backward passes, `before_clipping` where the loop
    calls it, `enter_step`, `before_step`, the optimiser's update, `after_step`; then t grows by
    one. All of them run without gradient recording.

    Attributes:
        t: index of the current step, 0-based; in `after_step` still that of the step just applied.
        total_steps: T, the length of the schedule in applied steps.
        schedule: lengths resolved by `steps`, by name; saved and restored.
        prepared: `prepare` has run; saved and restored.
        adapters: the adapters whose training this is and their configurations; set by `attach`.
        seed: for draws from `peft_custom.rng` with t as the counter.
    """

    requires_prepare: ClassVar[bool] = False
    adapts: bool = True  # False for the hooks of a model in which nothing does

    def __init__(self, total_steps: int | None, *, seed: int = 0) -> None:
        self.total_steps = _whole_steps(total_steps)
        self.t = 0
        self.seed = seed
        self.schedule: dict[str, int] = {}
        self.prepared = False
        self.adapters: dict[str, PeftConfig] = {}

    # --- what a method implements ---------------------------------------------------------------
    def prepare(self, dataloader: Iterable[Any], forward_loss: Callable[[Any], Tensor]) -> None:
        """Looks at data before the first step (with `requires_prepare = True`); not after a resume.

        Args:
            dataloader: batches, this process's share of them; can be gone through again. Where a
                step has several, they are `MicroBatch`es.
            forward_loss: batch → scalar task loss, with a graph.
        """

    def begin_step(self) -> None:
        """Sets up the forward passes of step t, as a function of t and the state alone.

        Called on attaching, after every applied step and after loading a state: a rank drawn from
        (seed, t), a temperature. Calling it twice must be the same as once.
        """

    def before_clipping(self) -> None:
        """Gradients are reduced and unscaled: add those that are to be clipped with them.

        An optimiser knows no such moment, so a loop calls this itself, after the last backward pass
        of a step; again where the step is repeated. Where it does not, `before_step` adds them.
        """

    def enter_step(self) -> None:
        """The optimiser has moved nothing yet: the moment to copy what it must leave alone.

        With a closure there may be no gradients yet, and `before_step` follows after every
        evaluation, between which the optimiser moves parameters.
        """

    def before_step(self) -> None:
        """Gradients are final (reduced, unscaled, clipped): take statistics, add gradients."""

    def after_step(self) -> None:
        """Parameters have moved: masks, rank allocation, rows to put back."""

    def losses(self) -> dict[str, float]:
        """Values of the extra loss terms, for logs."""
        return {}

    def log(self) -> dict[str, float]:
        """Budget, ranks, density, temperature and the like, for logs."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs beyond model and optimiser: tensors and JSON values.

        `t`, `schedule` and `prepared` are saved without being listed here.
        """
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` returned; copies tensors it goes on writing to."""

    def read_between_passes(self) -> list[Tensor]:
        """Frozen weights that steps read outside forward passes: a loop that shards the others over
        processes leaves these whole."""
        return []

    def remove(self) -> None:
        """Leaves the model as it is and stops adapting."""

    @property
    def finished(self) -> bool:
        """Whether the adapter has its final form; before that, what is saved is unfinished."""
        return self.t >= self.total_steps

    # --- what a method uses ---------------------------------------------------------------------
    @property
    def fraction(self) -> float:
        """t/T, at most 1."""
        return min(self.t / self.total_steps, 1.0)

    def steps(self, name: str, length: int | float, least: int = 0) -> int:
        """Resolves a length of the schedule once: a float is a fraction of T, an int counts steps.

        Args:
            name: the option's name, for errors and for `schedule[name]`.
            length: 0.1 for a tenth of training, 100 for a hundred steps.
            least: what a small fraction makes; 1 for a period, or a number of batches.
        """
        if isinstance(length, bool) or not isinstance(length, (int, float)):
            raise TypeError(f"{name}={length!r}: give steps (100) or a fraction of training (0.1)")
        if isinstance(length, float):
            if not 0.0 <= length <= 1.0:
                raise ValueError(
                    f"{name}={length!r}: a fraction of training is from 0.0 to 1.0; a number of "
                    f"steps is a whole number, such as {name}=100"
                )
            length = max(least, math.floor(length * self.total_steps + 0.5))
        elif not least <= length <= self.total_steps:
            raise ValueError(
                f"{name}={length!r}: must be from {least} to total_steps={self.total_steps}, or a "
                "fraction of training such as 0.1"
            )
        self.schedule[name] = length
        return length

    def __enter__(self) -> TrainingHooks:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()


def _whole_steps(total_steps: int | None) -> int:
    """`total_steps` as a positive int.

    Raises:
        ValueError: it is missing, or not a positive whole number.
    """
    try:
        steps = 0 if total_steps is None else operator.index(total_steps)
    except TypeError:
        steps = 0
    if steps <= 0 or isinstance(total_steps, bool):
        raise ValueError(
            f"total_steps={total_steps!r}: this adapter adapts while it trains, so it must know "
            "how many optimiser steps there will be: epochs × ⌈batches / accumulation⌉, say"
        )
    return steps
