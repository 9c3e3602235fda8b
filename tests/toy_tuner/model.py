"""The toy tuner and its hooks: scores before a step, a new mask after every k-th."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from peft_custom import BaseTuner, BaseTunerLayer, register_tuner
from peft_custom.distributed import reduce_mean
from peft_custom.hooks import TrainingHooks, refuse_if_attached
from peft_custom.rng import generator

from .config import ToyConfig
from .layer import Factors, ToyLayer


class ToyHooks(TrainingHooks):
    """Keeps the half of the components with the largest score + noise; score: EMA of ‖∇A_k‖²."""

    def __init__(self, tuner: ToyModel, total_steps: int | None, seed: int) -> None:
        super().__init__(total_steps, seed=seed)
        config = tuner.peft_config[tuner.active_adapters[0]]
        self.requires_prepare = config.look_first
        self.penalty = config.penalty
        self.steps("every", config.every, least=1)
        self.steps("until", config.until)
        self.factors: list[Factors] = [
            factors
            for layer in tuner.model.modules()
            if isinstance(layer, ToyLayer)
            for factors in layer.toy.values()
        ]
        self.scores = torch.zeros(sum(f.mask.numel() for f in self.factors))
        self.looked = torch.zeros(())

    def prepare(self, dataloader: Iterable[Any], forward_loss: Callable[[Any], Tensor]) -> None:
        with torch.no_grad():
            losses = torch.stack([forward_loss(batch) for batch in dataloader])
        [self.looked] = reduce_mean([losses.mean()])

    def before_step(self) -> None:
        squares = [f.A.grad.square().sum(1) for f in self.factors]
        self.scores = 0.9 * self.scores + 0.1 * torch.cat(reduce_mean(squares)).cpu()
        for f in self.factors:
            f.A.grad.add_(f.A, alpha=self.penalty)

    def after_step(self) -> None:
        if (self.t + 1) % self.schedule["every"] == 0 and self.t + 1 < self.schedule["until"]:
            self.draw(self.t + 1)

    def begin_step(self) -> None:
        if self.t == 0:
            self.draw(0)

    def draw(self, step: int) -> None:
        noise = torch.rand(self.scores.shape, generator=generator(self.seed, step))
        scale = self.scores.max().clamp(min=1e-30)
        order = (self.scores / scale + noise + self.looked).argsort(descending=True)
        masks = torch.zeros_like(self.scores)
        masks[order[: len(order) // 2]] = 1.0
        for f, mask in zip(
            self.factors, masks.split([f.mask.numel() for f in self.factors]), strict=True
        ):
            f.mask.copy_(mask)

    def losses(self) -> dict[str, float]:
        return {
            "penalty": 0.5
            * self.penalty
            * sum(float(f.A.detach().square().sum()) for f in self.factors)
        }

    def log(self) -> dict[str, float]:
        return {"density": float(torch.cat([f.mask for f in self.factors]).mean())}

    def state_dict(self) -> dict[str, Any]:
        return {
            "scores": self.scores,
            "looked": self.looked,
            "masks": [f.mask for f in self.factors],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scores = state["scores"].clone()
        self.looked = state["looked"].clone()
        for f, mask in zip(self.factors, state["masks"], strict=True):
            f.mask.copy_(mask)

    @property
    def finished(self) -> bool:
        return self.t >= self.schedule["until"]


@register_tuner("TOY", ToyConfig)
class ToyModel(BaseTuner):
    """Toy adapters on linear layers."""

    def new_layer(self, base: nn.Module, name: str, config: ToyConfig) -> BaseTunerLayer | None:
        return ToyLayer(base) if isinstance(base, nn.Linear) else None

    def add_to_layer(
        self, layer: BaseTunerLayer, adapter: str, name: str, config: ToyConfig
    ) -> None:
        layer.toy[adapter] = Factors(layer.base_layer, config.r)

    def training_hooks(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        total_steps: int | None,
        *,
        seed: int = 0,
    ) -> ToyHooks:
        return ToyHooks(self, total_steps, seed)

    def update_and_allocate(self, step: int) -> None:
        """PEFT's manual way: after the optimiser's step, before the gradients are cleared."""
        refuse_if_attached(self)
        if step == 0:
            self._manual = ToyHooks(self, total_steps=100, seed=0)
        with torch.no_grad():
            self._manual.t = step
            self._manual.before_step()
            self._manual.after_step()
