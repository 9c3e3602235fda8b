"""The training side of DyLoRA: a rank for every step, and rows that a step leaves alone."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn
from torch.optim import Optimizer

from loralib.dylora import NestedRank

from ...hooks import TrainingHooks
from .draws import RankDraws
from .held_rows import Factor, HeldRows


class Nest(NamedTuple):
    """Factors that follow the same draws."""

    draws: RankDraws
    layers: list[tuple[NestedRank, nn.Parameter, nn.Parameter]]  # ranks, A, B


class DyLoraHooks(TrainingHooks):
    """Draws b from f(seed, step) before the step's first forward pass, for all layers.

    Rows that a step does not train (above b; in mode "frozen" also below) keep their values and the
    optimiser's state, bit for bit; `dylora_dense` leaves them to the optimiser. There is nothing to
    save: step and seed say the rank. The adapter has its final form at any time.
    """

    def __init__(
        self, nests: list[Nest], optimizer: Optimizer, total_steps: int | None, seed: int
    ) -> None:
        super().__init__(total_steps, seed=seed)
        self.nests = nests
        self.rank = 0  # of the last step
        factors = [
            Factor(parameter, dim, nested)
            for nest in nests
            if not nest.draws.dylora_dense
            for nested, A, B in nest.layers
            for dim, parameter in enumerate((A, B))
        ]
        self.held = HeldRows(optimizer, factors)

    def begin_step(self) -> None:
        for draws, layers in self.nests:
            rank = draws.rank(self.seed, self.t)
            for nested, _, _ in layers:
                nested.sampled = nested.active_rank(rank, draws.frozen)

    def before_step(self) -> None:
        self.held.keep()

    def after_step(self) -> None:
        self.held.put_back()
        self.rank = self.nests[0].draws.rank(self.seed, self.t)

    def log(self) -> dict[str, float]:
        """The last step's rank."""
        return {"rank": float(self.rank)}

    def remove(self) -> None:
        for _, layers in self.nests:
            for nested, _, _ in layers:
                nested.sampled = None

    @property
    def finished(self) -> bool:
        return True
