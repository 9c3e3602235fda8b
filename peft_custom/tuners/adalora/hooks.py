"""AdaLoRA around an optimiser's step: the regulariser's gradient, the sensitivity, the cuts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...hooks import TrainingHooks
from ...protocols import AnyOptimizer
from .allocator import RankAllocator, Schedule, check_posterior
from .config import AdaLoraConfig
from .orthogonality import add_gradient
from .triplets import Triplets


class AdaLoraHooks(TrainingHooks):
    """Steps t = 0 … T − 1: ranks are cut as `Schedule` says and final after step T − tfinal.

    The gradient of the regulariser is added to gradients that are final, so it is not clipped, and
    the sensitivity is that of task loss and regulariser together, as in PEFT.
    """

    def __init__(
        self,
        triplets: Triplets,
        config: AdaLoraConfig,
        optimizer: AnyOptimizer | None,
        total_steps: int | None,
        seed: int = 0,
    ) -> None:
        super().__init__(config.total_step if total_steps is None else total_steps, seed=seed)
        if not sum(triplets.ranks):
            raise ValueError("this adapter has no component left to train; start a fresh one")
        schedule = Schedule(
            initial=sum(triplets.ranks),
            target=min(config.target_r * len(triplets.ranks), sum(triplets.ranks)),
            total=self.total_steps,
            tinit=self.steps("tinit", config.tinit),
            tfinal=self.steps("tfinal", config.tfinal),
            deltaT=self.steps("deltaT", min(config.deltaT, self.total_steps), least=1),
        )
        self.triplets = triplets
        self.weight = config.orth_reg_weight
        self.timing = config.sensitivity_timing
        self.allocator = RankAllocator(triplets, config, schedule, optimizer)
        self.regulariser: Tensor | None = None  # its value in the last step, on the device
        if "sigma" in self.allocator.needs:
            check_posterior(optimizer, config.criterion)

    def before_step(self) -> None:
        """Adds the regulariser's gradient, then takes the sensitivity of the sum."""
        sees = self.timing == "before" and self.allocator.sees(self.t)
        stacks = self.triplets.stacks if sees or self.weight > 0 else []
        factor = self.weight / self.triplets.matrices
        norms = []
        for stack in stacks:
            values, gradients = self.allocator.read(stack)
            if self.weight > 0 and stack is not self.triplets.E:
                norms.append(add_gradient(stack, factor, values, gradients))
            if sees:
                self.allocator.observe(stack, values, gradients)
        if norms:
            self.regulariser = torch.cat(norms).sum() * factor

    def after_step(self) -> None:
        """Takes the sensitivity where it is wanted at the updated weights, then cuts."""
        if self.timing == "after" and self.allocator.sees(self.t):
            for stack in self.triplets.stacks:
                self.allocator.observe(stack, *self.allocator.read(stack))
        self.allocator.allocate(self.t)

    def losses(self) -> dict[str, float]:
        """The regulariser's value in the last step, γ and mean included."""
        return {} if self.regulariser is None else {"orthogonality": float(self.regulariser)}

    def log(self) -> dict[str, float]:
        """The scheduled number of components, and per matrix."""
        budget = self.allocator.budget
        return {"budget": float(budget), "mean_rank": budget / len(self.triplets.ranks)}

    def history(self) -> list[dict[str, Any]]:
        """`{"step", "budget", "ranks": {module: rank}}` at cuts, the last one included."""
        return self.allocator.history()

    def state_dict(self) -> dict[str, Any]:
        """The allocator's state."""
        return self.allocator.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from the allocator's saved state."""
        self.allocator.load_state_dict(state)

    @property
    def finished(self) -> bool:
        """Whether the ranks are final."""
        return self.allocator.finalised
