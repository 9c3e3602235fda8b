"""BIM-LoRA's schedule: features and the first mask before training, τ in every step."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.adamw import adamw

from ...distributed import reduce_mean, world_size
from ...hooks import TrainingHooks
from ...rng import bits, generator
from . import masks
from .features import FeatureCollector, Features, block_table, normalised
from .importance import ImplicitMLP, network_inputs, soft_labels, train_mlp
from .layer import BIMLoRALinear

if TYPE_CHECKING:
    from .model import BimLoraModel

MOST_STEPS, SHARE = 300, 0.05  # of the run, for collecting
ANALYSIS_STEPS = 50  # the original's second pass, for the layers' importance
MOST_SKIPPED = 10  # batches whose loss is not finite
BINS, SNAPSHOTS = 20, 50  # of the mask's histogram over time


class BimLoraHooks(TrainingHooks):
    """Sets Z before the first step, from data where `mask_init` asks for it, and τ in every step.

    Everything but τ is a parameter that the optimiser trains, so a resumed run needs the step
    alone; a mask that is not trained is in the state as well.

    Attributes:
        features: raw features of all blocks, once they have been collected or read.
        mlp: the trained network, with `mask_init="mlp"`.
        scores: ŝ of all blocks.
        history: the mask's histogram over time: `steps`, and `counts` (snapshots, bins).
    """

    def __init__(self, tuner: BimLoraModel, total_steps: int | None, seed: int) -> None:
        super().__init__(total_steps, seed=seed)
        self.tuner, self.adapter = tuner, tuner.active_adapters[0]
        self.config = tuner.peft_config[self.adapter]
        self.layers: dict[str, BIMLoRALinear] = {
            name: layer for name, layer in tuner.bim_layers() if self.adapter in layer.bim
        }
        self.factors = {name: layer.bim[self.adapter] for name, layer in self.layers.items()}
        self.table = masks.resolve_table(self.config, self) if self._uses_table else []
        self.requires_prepare = self.config.looks_at_data
        self.features: Features | None = None
        self.mlp: ImplicitMLP | None = None
        self.scores: Tensor | None = None
        self.history: dict[str, Any] = {"steps": [], "counts": []}
        self._temperature: float | None = None
        if self.adapter in tuner.initialised:
            self.prepared = True
        elif self.config.mask_init == "random" and self.config.enable_masking:
            self._draw_scores()

    @property
    def _uses_table(self) -> bool:
        return self.config.enable_masking and self.config.temperature_schedule == "table"

    @property
    def finished(self) -> bool:
        """Whether the mask has been initialised: from then on every state is one to use."""
        return self.prepared or not self.requires_prepare

    # --- the first mask -------------------------------------------------------------------------
    def prepare(self, dataloader: Iterable[Any], forward_loss: Callable[[Any], Tensor]) -> None:
        """Collects features (or reads them), scores the blocks, sets Z."""
        gradients = None
        with _left_as_found(self.tuner.model):
            self.features = self._read() or self._collect(dataloader, forward_loss)
            if self.config.reference_compat:
                gradients = self._analyse(dataloader, forward_loss)
        self._write()
        self.tuner.features[self.adapter] = self.features
        values = self.features.values
        with torch.random.fork_rng(_devices(values)):
            self.scores = self._score(values)
        if gradients is None:
            gradients = {
                part.name: float(values[part.rows, 0].mean()) for part in self.features.table
            }
        self._initialise(gradients)

    def collection_steps(self) -> int:
        """How many gradients the features come from."""
        asked = self.config.collection_steps
        if asked is None:
            return max(1, min(MOST_STEPS, math.ceil(SHARE * self.total_steps)))
        if isinstance(asked, float):
            return max(1, self.steps("collection_steps", asked))
        return asked

    def _read(self) -> Features | None:
        path = self.config.features_file
        if path is None or not Path(path).is_file():
            return None
        found = Features.load(path)
        expected = block_table(self.layers, self.config.block_size)
        if found.table != expected or found.block != self.config.block_size:
            raise ValueError(
                f"features_file: {path} is of other matrices or another block size than this "
                "model with this configuration; remove it, or name another"
            )
        device = next(iter(self.factors.values())).block_scores.device
        return found._replace(values=found.values.to(device))

    def _write(self) -> None:
        path = self.config.features_file
        main = world_size() == 1 or dist.get_rank() == 0
        if path is not None and main and not Path(path).is_file():
            self.features.save(path)

    def _collect(
        self, dataloader: Iterable[Any], forward_loss: Callable[[Any], Tensor]
    ) -> Features:
        config = self.config
        updates = config.collect_update == "adapter+head"
        # With B = 0 the adapters add nothing; DDP however waits for every trained parameter.
        zero = not any(bool(f.lora_B.detach().any()) for f in self.factors.values())
        collector = FeatureCollector(self.tuner.model, config, self.layers)
        update = self._adam() if updates else None
        with self._masking(off=True):
            self._pass_over(
                collector, dataloader, forward_loss, self.collection_steps(), 1,
                bypass=zero and not updates and world_size() == 1, update=update,
            )  # fmt: skip
        return collector.collected()

    def _analyse(
        self, dataloader: Iterable[Any], forward_loss: Callable[[Any], Tensor]
    ) -> dict[str, float]:
        """The original's mean |∇W| per layer, with the mask in force."""
        for f in self.factors.values():
            f.block_scores.data.fill_(self.config.initial_block_score)
            f.temperature.fill_(self.config.mask_temperature)
        collector = FeatureCollector(self.tuner.model, self.config, self.layers)
        self._pass_over(collector, dataloader, forward_loss, ANALYSIS_STEPS, 2)
        collector.remove_hooks()
        self._temperature = None
        return collector.layer_gradients()

    def _pass_over(
        self,
        collector: FeatureCollector,
        dataloader: Iterable[Any],
        forward_loss: Callable[[Any], Tensor],
        steps: int,
        number: int,
        bypass: bool = False,
        update: Callable[[], None] | None = None,
    ) -> None:
        """Backward passes over `steps` × accumulation batches, going round the data if need be.

        The random numbers drawn in pass `number` are a function of the seed, step and process.
        """
        model, skipped = self.tuner.model, 0
        rank = dist.get_rank() if world_size() > 1 else 0
        model.train()
        collector.pending = self.config.collection_accumulation
        collector.register_hooks(bypass)
        batches = _endless(dataloader)
        try:
            with torch.enable_grad(), torch.random.fork_rng(_devices_of(model)):
                while collector.steps < steps:
                    count = (collector.steps, collector._passes, skipped)
                    torch.manual_seed(bits(self.seed, 0xB1, number, *count, rank) % 2**63)
                    loss = forward_loss(next(batches))
                    [agreed] = reduce_mean([loss.detach().float().reshape(1)])
                    if not math.isfinite(float(agreed)):
                        skipped += 1
                        if skipped > MOST_SKIPPED:
                            raise ValueError(
                                f"prepare: the loss of {skipped} batches is not finite before "
                                "training; look at the data and the precision"
                            )
                        continue
                    loss.backward()
                    collector.update()
                    if collector._passes == 0:
                        if update is not None:
                            update()
                        model.zero_grad(set_to_none=True)
        finally:
            collector.remove_hooks()
            model.zero_grad(set_to_none=True)

    def _adam(self) -> Callable[[], None]:
        """Adam on A, B and the head at `collection_lr`, gradients clipped to norm 1.

        The function form: an optimiser object that steps these parameters would be refused.
        """
        trained = [
            p
            for p in self.tuner.model.parameters()
            if p.requires_grad and all(p is not f.block_scores for f in self.factors.values())
        ]
        means = [torch.zeros_like(p) for p in trained]
        squares = [torch.zeros_like(p) for p in trained]
        counts = [torch.zeros(()) for _ in trained]
        options = {
            "lr": self.config.collection_lr, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8,
            "weight_decay": 0.0, "amsgrad": False, "maximize": False,
        }  # fmt: skip

        @torch.no_grad()
        def update() -> None:
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
            adamw(trained, gradients, means, squares, [], counts, **options)

        return update

    @contextlib.contextmanager
    def _masking(self, off: bool) -> Iterator[None]:
        before = {name: f.enabled for name, f in self.factors.items()}
        for f in self.factors.values():
            f.enabled = f.enabled and not off
        try:
            yield
        finally:
            for name, f in self.factors.items():
                f.enabled = before[name]

    def _score(self, values: Tensor) -> Tensor:
        """ŝ of all blocks by the network, or the heuristic itself."""
        config, hats = self.config, normalised(values)
        if config.mask_init == "features":
            return soft_labels(hats, config.feature_weights)
        labels = soft_labels(hats, config.feature_weights, noise=0.02, seed=self.seed)
        self.mlp = ImplicitMLP(config)
        self.mlp.initialise(self.seed)
        self.mlp.to(values.device)
        inputs = network_inputs(values, hats, config.reference_compat)
        train_mlp(self.mlp, inputs, labels, config, self.seed)
        return self.mlp.predict_batch(inputs)

    def _draw_scores(self) -> None:
        """ŝ of the labels' distribution, in random places."""
        table = block_table(self.layers, self.config.block_size)
        n = table[-1].start + table[-1].p * table[-1].q
        order = torch.randperm(n, generator=generator(self.seed, 0x3A9D)).double()
        place = order / max(1, n - 1)
        self.scores = (0.05 + 0.9 * torch.sigmoid(8.0 * (place - 0.5))).float()
        self._initialise(None)

    @torch.no_grad()
    def _initialise(self, gradients: dict[str, float] | None) -> None:
        """Z from the scores and the layers' mean gradients (None: all alike)."""
        compat = self.config.reference_compat
        relative = (
            dict.fromkeys(self.layers, 0.5)
            if gradients is None
            else masks.relative_importance(gradients, compat)
        )
        tau = 1.0 if compat else masks.temperature_at(0, self.config, self.table)
        everything = []
        for part in block_table(self.layers, self.config.block_size):
            P = masks.initial_probabilities(
                part.name, part.view(self.scores), relative.get(part.name)
            )
            Z = self.factors[part.name].block_scores
            Z.copy_(masks.logits(P, tau))
            everything.append(Z)
        if world_size() > 1:
            for Z in everything:
                dist.broadcast(Z, 0)
        self.tuner.initialised.add(self.adapter)

    # --- every step -----------------------------------------------------------------------------
    def begin_step(self) -> None:
        """τ of step t."""
        if not self.config.enable_masking:
            return
        tau = masks.temperature_at(min(self.t, self.total_steps - 1), self.config, self.table)
        if tau != self._temperature:
            torch._foreach_zero_(self._temperatures)
            torch._foreach_add_(self._temperatures, tau)
            self._temperature = tau
        if self.t % max(1, self.total_steps // SNAPSHOTS) == 0:
            self._snapshot()

    @property
    def _temperatures(self) -> list[Tensor]:
        return [f.temperature for f in self.factors.values()]

    def _snapshot(self) -> None:
        if self.history["steps"] and self.history["steps"][-1] >= self.t:
            return
        m = self._all_masks()
        self.history["steps"].append(self.t)
        self.history["counts"].append(torch.histc(m, BINS, 0.0, 1.0).cpu())
        self.tuner.mask_history[self.adapter] = self.history

    @torch.no_grad()
    def _all_masks(self) -> Tensor:
        Z = torch.cat([f.block_scores.flatten() for f in self.factors.values()])
        return torch.sigmoid(Z / next(iter(self.factors.values())).temperature)

    def log(self) -> dict[str, float]:
        """τ, and of all blocks the mean mask, its spread and the share above a half."""
        if not self.config.enable_masking:
            return {}
        m = self._all_masks()
        figures = torch.stack([m.mean(), m.std(correction=0), (m > 0.5).float().mean()]).tolist()
        tau = masks.temperature_at(min(self.t, self.total_steps - 1), self.config, self.table)
        names = ("mask_mean", "mask_std", "mask_open")
        return {"temperature": tau, **dict(zip(names, figures, strict=True))}

    # --- resuming -------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """The histogram so far, and a mask that is not trained."""
        frozen = {n: f.block_scores for n, f in self.factors.items() if not f.trains_mask}
        return {"history": self.history, "frozen": frozen}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes both back; τ follows from the step."""
        self.history = {name: list(values) for name, values in state["history"].items()}
        self.tuner.mask_history[self.adapter] = self.history
        for name, Z in state["frozen"].items():
            self.factors[name].block_scores.copy_(Z)
        self._temperature = None
        self.tuner.initialised.add(self.adapter)


def _endless(dataloader: Iterable[Any]) -> Iterator[Any]:
    while True:
        empty = True
        for batch in dataloader:
            empty = False
            yield batch
        if empty:
            raise ValueError("prepare: the dataloader has no batch to collect features from")


@contextlib.contextmanager
def _left_as_found(model: nn.Module) -> Iterator[None]:
    """Every module's mode is put back."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _devices(t: Tensor) -> list[torch.device]:
    return [t.device] if t.device.type == "cuda" else []


def _devices_of(model: nn.Module) -> list[torch.device]:
    return list({p.device for p in model.parameters() if p.device.type == "cuda"})
