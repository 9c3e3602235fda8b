"""Before the first step: features from data (or a file), scores of the blocks, the first mask."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.adamw import adamw

from ...digest import digest
from ...distributed import reduce_mean, world_size
from ...hooks import MicroBatch
from ...rng import bits, generator
from . import masks, reference
from .collector import FeatureCollector
from .config import BimLoraConfig
from .features import Features, block_table, normalised
from .importance import ImplicitMLP, network_inputs, soft_labels, train_mlp
from .layer import BIMLoRALinear, BlockFactors

MOST_SKIPPED = 10  # batches whose loss is not finite
BatchT = TypeVar("BatchT")


class Scores(NamedTuple):
    """What preparing an adapter found.

    Attributes:
        features: raw features of all blocks.
        scores: ŝ of all blocks, (n,).
        mlp: the trained network, with `mask_init="mlp"`.
        gradients: mean |∇W| of every layer.
    """

    features: Features
    scores: Tensor
    mlp: ImplicitMLP | None
    gradients: dict[str, float]


class Preparation:
    """Finds the features and scores of one adapter's blocks; of the base nothing moves.

    Args:
        model: the injected model.
        layers: its layers with this adapter, by name.
        factors: the adapter in each of them.
        config: its options.
        seed: of all random numbers here.
        read: what the caller has read -> a key of its content, for the file of features.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, BIMLoRALinear],
        factors: Mapping[str, BlockFactors],
        config: BimLoraConfig,
        seed: int,
        read: Mapping[str, str] | None = None,
    ) -> None:
        self.model, self.layers, self.factors = model, layers, factors
        self.config, self.seed, self.read = config, seed, read or {}

    def run(
        self, dataloader: Iterable[BatchT], forward_loss: Callable[[BatchT], Tensor], steps: int
    ) -> Scores:
        """Collects features from `steps` gradients (or reads them) and scores the blocks.

        Modes, gradients and the global random state are left as found.
        """
        gradients = None
        with _modes_kept(self.model):
            features = self._read(steps) or self._collect(dataloader, forward_loss, steps)
            if self.config.reference_compat:
                gradients = self._analyse(dataloader, forward_loss)
        self._write(features, steps)
        values = features.values  # (n, 6)
        devices = [values.device] if values.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            scores, mlp = score_blocks(values, self.config, self.seed)
        if gradients is None:  # F1 is mean |∇W| of a block
            gradients = {part.name: float(values[part.rows, 0].mean()) for part in features.table}
        return Scores(features, scores, mlp, gradients)

    # --- features -------------------------------------------------------------------------------
    def _keys(self, steps: int) -> dict[str, str]:
        """What features of this model, data and configuration are of."""
        c = self.config
        weights = {name: layer.weight for name, layer in self.layers.items()}
        update = f"{c.collect_update} at {c.collection_lr}" if c.collect_update != "none" else ""
        pads = "pads" if c.collect_pads else ""
        compat = "reference_compat" if c.reference_compat else ""
        how = (f"{steps} of {c.collection_accumulation} batches", update, pads, compat)
        return {
            **self.read,
            "adapted weights": digest(weights),
            "collection_steps": ", ".join(word for word in how if word),
        }

    def _read(self, steps: int) -> Features | None:
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
        keys = self._keys(steps)  # what only one of them has counts for nothing
        changed = [n for n in keys if found.keys.get(n, keys[n]) != keys[n]]
        if changed:
            shown = "; ".join(
                f"{n}: {found.keys[n]:.16} there, {keys[n]:.16} here" for n in changed
            )
            raise ValueError(
                f"features_file: {path} was collected from something else ({shown}); remove it, or "
                "name another"
            )
        device = next(iter(self.factors.values())).block_scores.device
        return found._replace(values=found.values.to(device))

    def _write(self, features: Features, steps: int) -> None:
        path = self.config.features_file
        main = world_size() == 1 or dist.get_rank() == 0
        if path is not None and main and not Path(path).is_file():
            features._replace(keys=self._keys(steps)).save(path)

    def _collect(
        self, dataloader: Iterable[BatchT], forward_loss: Callable[[BatchT], Tensor], steps: int
    ) -> Features:
        updates = self.config.collect_update == "adapter+head"
        # With B = 0 the adapters add nothing; DDP however waits for every trained parameter.
        zero = not any(bool(f.lora_B.detach().any()) for f in self.factors.values())
        collector = FeatureCollector(self.model, self.config, self.layers)
        update = self._adam() if updates else None
        with self._without_masks():
            self._pass_over(
                collector, dataloader, forward_loss, steps, 1,
                bypass=zero and not updates and world_size() == 1, update=update,
            )  # fmt: skip
        return collector.collected()

    def _analyse(
        self, dataloader: Iterable[BatchT], forward_loss: Callable[[BatchT], Tensor]
    ) -> dict[str, float]:
        """The original's mean |∇W| per layer, from a second pass with the mask acting."""
        for f in self.factors.values():
            f.block_scores.data.fill_(self.config.initial_block_score)
            f.temperature.fill_(self.config.mask_temperature)
        collector = FeatureCollector(self.model, self.config, self.layers)
        self._pass_over(collector, dataloader, forward_loss, reference.ANALYSIS_STEPS, 2)
        collector.remove_hooks()
        return collector.layer_gradients()

    def _pass_over(
        self,
        collector: FeatureCollector,
        dataloader: Iterable[BatchT],
        forward_loss: Callable[[BatchT], Tensor],
        steps: int,
        number: int,
        bypass: bool = False,
        update: Callable[[], None] | None = None,
    ) -> None:
        """The gradients of `steps` optimiser steps, going round the data if need be.

        The random numbers drawn in pass `number` are a function of the seed, step and process.
        """
        model, skipped = self.model, 0
        devices = list({p.device for p in model.parameters() if p.device.type == "cuda"})
        model.train()
        collector.register_hooks(bypass)
        gradients = _gradients(dataloader, self.config.collection_accumulation)
        try:
            with torch.enable_grad(), torch.random.fork_rng(devices):
                while collector.steps < steps:
                    counters = (number, collector.steps, skipped)
                    if self._gradient(collector, next(gradients), forward_loss, counters):
                        if update is not None:
                            update()
                    else:
                        skipped += 1
                        if skipped > MOST_SKIPPED:
                            raise ValueError(
                                f"prepare: the loss of {skipped} batches is not finite before "
                                "training; look at the data and the precision"
                            )
                    model.zero_grad(set_to_none=True)
        finally:
            collector.remove_hooks()
            model.zero_grad(set_to_none=True)

    def _gradient(
        self,
        collector: FeatureCollector,
        batches: list[tuple[BatchT, float]],
        forward_loss: Callable[[BatchT], Tensor],
        counters: tuple[int, int, int],
    ) -> bool:
        """One gradient, of batches and their weights; False, and no trace, if a loss is NaN or ∞.

        Args:
            collector: takes it.
            batches: this process's; of all processes, the weights add up to 1.
            forward_loss: batch → loss.
            counters: pass over the data, step, steps skipped: what random numbers depend on.
        """
        world = world_size()
        rank = dist.get_rank() if world > 1 else 0
        number, step, skipped = counters
        collector.begin(len(batches), weighted=True)
        for i, (batch, weight) in enumerate(batches):
            torch.manual_seed(bits(self.seed, 0xB1, number, step, i, skipped, rank) % 2**63)
            collector.counts_inputs = weight > 0
            loss = forward_loss(batch)
            # All processes skip a step, or none: their gradients are reduced together.
            [agreed] = reduce_mean([loss.detach().float().reshape(1)])
            if not math.isfinite(float(agreed)):
                collector.drop()
                return False
            # Gradients are averaged over processes, not summed.
            (loss * (weight * world)).backward()
            collector.update()
        return True

    def _adam(self) -> Callable[[], None]:
        """Adam on A, B and the head at `collection_lr`, gradients clipped to norm 1.

        The function form: an optimiser object that steps these parameters would be refused.
        """
        trained = [
            p
            for p in self.model.parameters()
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
    def _without_masks(self) -> Iterator[None]:
        """Within the context the increment is that of plain LoRA."""
        before = {name: f.enabled for name, f in self.factors.items()}
        for f in self.factors.values():
            f.enabled = False
        try:
            yield
        finally:
            for name, f in self.factors.items():
                f.enabled = before[name]


# --- scores ---------------------------------------------------------------------------------------
def score_blocks(
    values: Tensor, config: BimLoraConfig, seed: int
) -> tuple[Tensor, ImplicitMLP | None]:
    """ŝ (n,) of raw features (n, 6): by the network, which is returned, or the heuristic itself."""
    hats = normalised(values)  # F̂, (n, 6)
    if config.mask_init == "features":
        return soft_labels(hats, config.feature_weights), None
    labels = soft_labels(hats, config.feature_weights, noise=0.02, seed=seed)  # (n,)
    mlp = ImplicitMLP(config)
    mlp.initialise(seed)
    mlp.to(values.device)
    inputs = hats if config.reference_compat else network_inputs(values)  # (n, 6)
    train_mlp(mlp, inputs, labels, config, seed)
    return mlp.predict_batch(inputs), mlp


def random_scores(n: int, seed: int) -> Tensor:
    """ŝ (n,) of the labels' distribution, in random places."""
    order = torch.randperm(n, generator=generator(seed, 0x3A9D)).double()
    place = order / max(1, n - 1)  # in [0, 1]
    return (0.05 + 0.9 * torch.sigmoid(8.0 * (place - 0.5))).float()


@torch.no_grad()
def set_first_masks(
    layers: Mapping[str, BIMLoRALinear],
    factors: Mapping[str, BlockFactors],
    config: BimLoraConfig,
    scores: Tensor,
    gradients: Mapping[str, float] | None,
    tau: float,
) -> None:
    """Sets Z of every layer, so that σ(Z/τ) is the probability that its scores stand for.

    Args:
        layers, factors: the adapted layers and the adapter in each.
        config: its options.
        scores: ŝ of all blocks, (n,).
        gradients: mean |∇W| of every layer; None: all alike.
        tau: τ of the first step.
    """
    if gradients is None:
        importance = dict.fromkeys(layers, 0.5)
    elif config.reference_compat:
        importance = reference.relative_importance(gradients)
    else:
        importance = masks.relative_importance(gradients)
    everything = []
    for part in block_table(layers, config.block_size):
        # (p, q)
        P = masks.initial_probabilities(part.name, part.view(scores), importance.get(part.name))
        Z = factors[part.name].block_scores
        Z.copy_(masks.logits(P, reference.FIRST_TEMPERATURE if config.reference_compat else tau))
        everything.append(Z)
    if world_size() > 1:
        for Z in everything:
            dist.broadcast(Z, 0)


def _gradients(
    dataloader: Iterable[BatchT], accumulation: int
) -> Iterator[list[tuple[BatchT, float]]]:
    """The batches of one gradient after the other, with their weights; endless.

    A gradient is that of `accumulation` optimiser steps: of so many plain batches, or of the
    `MicroBatch`es of so many steps.
    """
    found, ends = [], 0
    for batch in _endless(dataloader):
        part = isinstance(batch, MicroBatch)
        weight = batch.weight if part else 1.0 / world_size()
        found.append((batch, weight / accumulation))
        ends += not part or batch.last
        if ends == accumulation:
            yield found
            found, ends = [], 0


def _endless(dataloader: Iterable[BatchT]) -> Iterator[BatchT]:
    while True:
        empty = True
        for batch in dataloader:
            empty = False
            yield batch
        if empty:
            raise ValueError("prepare: the dataloader has no batch to collect features from")


@contextlib.contextmanager
def _modes_kept(model: nn.Module) -> Iterator[None]:
    """Every module's mode is put back."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
