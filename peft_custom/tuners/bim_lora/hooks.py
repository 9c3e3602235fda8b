"""BIM-LoRA's schedule: the first mask before training, τ in every step, the mask's histogram."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ...hooks import TrainingHooks
from . import masks
from .config import BimLoraConfig
from .features import Features, block_table
from .importance import ImplicitMLP
from .layer import BIMLoRALinear
from .prepare import Preparation, random_scores, set_first_masks

MOST_STEPS, SHARE = 300, 0.05  # of the run, for collecting
BINS, SNAPSHOTS = 20, 50  # of the mask's histogram over time
BatchT = TypeVar("BatchT")


@dataclass
class MaskRecords:
    """What a tuner remembers of its adapters' masks, by adapter; not part of their files.

    Attributes:
        initialised: adapters whose mask has been set.
        mask_history: the mask's histogram over training, see `BimLoraHooks.history`.
        features: what was collected in this process.
        read: what the caller has read -> a key of its content; kept in the file of features, which
            is refused where it is of something else.
    """

    initialised: set[str] = field(default_factory=set)
    mask_history: dict[str, dict[str, Any]] = field(default_factory=dict)
    features: dict[str, Features] = field(default_factory=dict)
    read: dict[str, str] = field(default_factory=dict)


class BimLoraHooks(TrainingHooks):
    """Sets Z before the first step, from data where `mask_init` asks for it, and τ in every step.

    Everything but τ is a parameter that the optimiser trains, so a resumed run needs the step
    alone; a mask that is not trained is in the state as well.

    Args:
        model: the injected model.
        layers: its layers with this adapter, by name.
        config: the adapter's options.
        adapter: its name.
        records: of the tuner; what becomes of the mask is noted there.
        total_steps: T.
        seed: of what is drawn.

    Attributes:
        features: raw features of all blocks, once they have been collected or read.
        mlp: the trained network, with `mask_init="mlp"`.
        scores: ŝ of all blocks.
        history: the mask's histogram over time: `steps`, and `counts` (snapshots, bins).
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, BIMLoRALinear],
        config: BimLoraConfig,
        adapter: str,
        records: MaskRecords,
        total_steps: int | None,
        seed: int,
    ) -> None:
        super().__init__(total_steps, seed=seed)
        self.model, self.layers, self.config = model, layers, config
        self.adapter, self.records = adapter, records
        self.factors = {name: layer.bim[adapter] for name, layer in layers.items()}
        uses_table = config.enable_masking and config.temperature_schedule == "table"
        self.table = masks.resolve_table(config, self) if uses_table else []
        self.requires_prepare = config.looks_at_data
        if self.requires_prepare:
            self.collection_steps()  # a fraction becomes a number once, and is saved
        self.features: Features | None = None
        self.mlp: ImplicitMLP | None = None
        self.scores: Tensor | None = None
        self.history: dict[str, Any] = {"steps": [], "counts": []}
        self._temperature: float | None = None  # what the layers have; None: to be set again
        if adapter in records.initialised:
            self.prepared = True
        elif config.mask_init == "random" and config.enable_masking:
            last = block_table(layers, config.block_size)[-1]
            self._initialise(random_scores(last.rows.stop, seed), None)

    @property
    def finished(self) -> bool:
        """Whether the mask has been initialised: from then on every state is one to use."""
        return self.prepared or not self.requires_prepare

    # --- the first mask -------------------------------------------------------------------------
    def prepare(
        self, dataloader: Iterable[BatchT], forward_loss: Callable[[BatchT], Tensor]
    ) -> None:
        """Collects features (or reads them), scores the blocks, sets Z."""
        what = self.model, self.layers, self.factors, self.config, self.seed
        preparation = Preparation(*what, self.records.read)
        found = preparation.run(dataloader, forward_loss, self.collection_steps())
        self.features, self.mlp = found.features, found.mlp
        self.records.features[self.adapter] = found.features
        self._temperature = None
        self._initialise(found.scores, found.gradients)

    def collection_steps(self) -> int:
        """How many gradients the features come from."""
        asked = self.config.collection_steps
        if asked is None:
            return max(1, min(MOST_STEPS, math.ceil(SHARE * self.total_steps)))
        if isinstance(asked, float):
            return self.steps("collection_steps", asked, least=1)
        return asked

    def _initialise(self, scores: Tensor, gradients: Mapping[str, float] | None) -> None:
        self.scores = scores
        tau = masks.temperature_at(0, self.config, self.table)
        set_first_masks(self.layers, self.factors, self.config, scores, gradients, tau)
        self.records.initialised.add(self.adapter)

    # --- every step -----------------------------------------------------------------------------
    def begin_step(self) -> None:
        """τ of step t."""
        if not self.config.enable_masking:
            return
        tau = self._scheduled_temperature()
        if tau != self._temperature:
            temperatures = [f.temperature for f in self.factors.values()]
            torch._foreach_zero_(temperatures)
            torch._foreach_add_(temperatures, tau)
            self._temperature = tau
        if self.t % max(1, self.total_steps // SNAPSHOTS) == 0:
            self._snapshot()

    def _scheduled_temperature(self) -> float:
        return masks.temperature_at(min(self.t, self.total_steps - 1), self.config, self.table)

    def _snapshot(self) -> None:
        if self.history["steps"] and self.history["steps"][-1] >= self.t:
            return  # begin_step runs again after a state is loaded
        self.history["steps"].append(self.t)
        self.history["counts"].append(torch.histc(self._all_masks(), BINS, 0.0, 1.0).cpu())
        self.records.mask_history[self.adapter] = self.history

    @torch.no_grad()
    def _all_masks(self) -> Tensor:
        """m of all blocks, (n,)."""
        Z = torch.cat([f.block_scores.flatten() for f in self.factors.values()])
        return torch.sigmoid(Z / next(iter(self.factors.values())).temperature)

    def log(self) -> dict[str, float]:
        """τ, and of all blocks the mean mask, its spread and the share above a half."""
        if not self.config.enable_masking:
            return {}
        m = self._all_masks()
        values = torch.stack([m.mean(), m.std(correction=0), (m > 0.5).float().mean()]).tolist()
        names = ("mask_mean", "mask_std", "mask_open")
        tau = self._scheduled_temperature()
        return {"temperature": tau, **dict(zip(names, values, strict=True))}

    # --- resuming -------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """The histogram so far, and a mask that is not trained."""
        frozen = {n: f.block_scores for n, f in self.factors.items() if not f.trains_mask}
        return {"history": self.history, "frozen": frozen}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes both back; τ follows from the step."""
        self.history = {name: list(values) for name, values in state["history"].items()}
        self.records.mask_history[self.adapter] = self.history
        for name, Z in state["frozen"].items():
            self.factors[name].block_scores.copy_(Z)
        self._temperature = None
        self.records.initialised.add(self.adapter)
