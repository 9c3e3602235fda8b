"""The training side of DyLoRA: a rank for every step, and rows that a step leaves alone."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn
from torch.optim import Optimizer

from loralib.dylora import NestedRank

from ...hooks import TrainingHooks
from .frozen_rows import FrozenRows, NestedParameter
from .sampling import RankSampling


class NestedFactors(NamedTuple):
    """One layer's ranks, and its factors A (n R, in) and B (out, R)."""

    nested: NestedRank
    A: nn.Parameter
    B: nn.Parameter


class NestedGroup(NamedTuple):
    """Layers that share one sampled rank per step."""

    sampling: RankSampling
    layers: list[NestedFactors]


class DyLoraHooks(TrainingHooks):
    """Samples b from f(seed, step) before the step's first forward pass, for all layers.

    Rows that a step does not train (above b; in mode "frozen" also below) keep their values and the
    optimiser's state, bit for bit; `dylora_dense` leaves them to the optimiser. There is nothing to
    save: step and seed say the rank. The adapter has its final form at any time.
    """

    def __init__(
        self, groups: list[NestedGroup], optimizer: Optimizer, total_steps: int | None, seed: int
    ) -> None:
        super().__init__(total_steps, seed=seed)
        self.groups = groups
        self.rank = 0  # of the last step
        parameters = [
            NestedParameter(parameter, dim, nested)
            for sampling, layers in groups
            if not sampling.dylora_dense
            for nested, A, B in layers
            for dim, parameter in enumerate((A, B))
        ]
        self.frozen_rows = FrozenRows(optimizer, parameters)

    def begin_step(self) -> None:
        for sampling, layers in self.groups:
            rank = sampling.rank(self.seed, self.t)
            for nested, _, _ in layers:
                nested.sampled = nested.active_rank(rank, sampling.frozen)

    def enter_step(self) -> None:
        self.frozen_rows.save()

    def after_step(self) -> None:
        self.frozen_rows.restore()
        self.rank = self.groups[0].sampling.rank(self.seed, self.t)

    def log(self) -> dict[str, float]:
        """The last step's rank."""
        return {"rank": float(self.rank)}

    def remove(self) -> None:
        for _, layers in self.groups:
            for nested, _, _ in layers:
                nested.sampled = None

    @property
    def finished(self) -> bool:
        return True
