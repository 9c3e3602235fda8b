"""Pruning around an optimiser's step: the masks of every step, and the regulariser's gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...hooks import TrainingHooks
from .masks import Masks
from .regularise import gradients, penalty
from .schedule import Cubic


class SpaHooks(TrainingHooks):
    """Step t = 0, 1, … trains with the threshold τ(t + 1) of the schedule.

    The regulariser's gradient is added to gradients that are final, so it is not clipped with them;
    with `clip_regularization` it is added before, by loops that call `before_clipping`.

    Attributes:
        masks: of the adapter.
        cubic: the schedule.
        threshold: τ of the current step.
    """

    def __init__(self, masks: Masks, total_steps: int | None, seed: int) -> None:
        super().__init__(total_steps, seed=seed)
        config = masks.config
        self.masks, self.config = masks, config
        warmup = self.steps("warmup_steps", config.warmup_steps)
        ends = config.initial_warmup, config.final_warmup
        self.cubic = Cubic.of(self.total_steps, warmup, *ends)
        self.threshold = config.initial_threshold
        self._restored: int | None = None  # the step whose masks came from a saved state
        self._added = False  # the regulariser's gradient of this step
        masks.driven = True

    def _at(self, start: float, end: float) -> float:
        return self.cubic.value(min(self.t, self.total_steps - 1) + 1, start, end)

    @property
    def penalty_weight(self) -> float:
        """λ of the current step: λ_final·τ/τ_final."""
        end = self.config.final_threshold
        ratio = self.threshold / end if end else 1.0
        return self.config.final_lambda * ratio if self.config.regularization else 0.0

    def begin_step(self) -> None:
        """Masks of step t, from scores and τ; of `l0` random gates."""
        config, masks = self.config, self.masks
        masks.driven = True
        self.threshold = self._at(config.initial_threshold, config.final_threshold)
        masks.beta = self._at(config.initial_temperature, config.final_temperature)
        if self._restored == self.t:
            return
        l0 = config.pruning_method == "l0"
        found = masks.draw(self.seed, self.t) if l0 else masks.compute(self.threshold)
        masks.write("mask", found)

    def before_clipping(self) -> None:
        """Adds λ·∂penalty/∂S where it is to be clipped with the gradients of the loss."""
        if self.config.clip_regularization:
            self._add_penalty()
            self._added = True

    def before_step(self) -> None:
        """Adds λ·∂penalty/∂S to the scores' gradients, unless it is there already."""
        if not self._added:
            self._add_penalty()
        self._added = False

    def _add_penalty(self) -> None:
        if not self.penalty_weight or not self.config.trains_scores:
            return
        kind = str(self.config.regularization)
        found = gradients(self.masks.scores(), kind, self.masks.beta, self.penalty_weight)
        grads = [m.mask_scores.grad for m in self.masks]
        pairs = [
            (g, d) for g, d in zip(grads, self.masks.unstacked(found), strict=True) if g is not None
        ]
        torch._foreach_add_(*(list(side) for side in zip(*pairs, strict=True)))

    def read_between_passes(self) -> list[Tensor]:
        """The masked weights, where their magnitudes decide."""
        return [] if self.config.trains_scores else self.masks.adapted_parameters()

    @property
    def finished(self) -> bool:
        """Whether τ has arrived: from then on every state is one to use."""
        return self.cubic.ended(self.t)

    def losses(self) -> dict[str, float]:
        """The regulariser's value, λ included."""
        if not self.penalty_weight:
            return {}
        kind = str(self.config.regularization)
        with torch.no_grad():
            value = penalty(self.masks.scores(), kind, self.masks.beta)
        return {"sparsity": self.penalty_weight * float(value)}

    def log(self) -> dict[str, float]:
        """Share of the masked weights that are in use, τ, and λ where there is one."""
        values = {"density": self.masks.density(), "threshold": self.threshold}
        return values | ({"lambda": self.penalty_weight} if self.config.regularization else {})

    def state_dict(self) -> dict[str, Any]:
        """The masks in force."""
        return {"masks": [m.mask for m in self.masks]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes them back; they stay until the next step."""
        self.masks.write("mask", state["masks"])
        self._restored = self.t

    def remove(self) -> None:
        """The final masks act from now on."""
        self.masks.driven = False
