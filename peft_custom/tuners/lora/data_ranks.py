"""LoRA's ranks and the start of A from some batches, before the first step (`rank_from`).

| `rank_from` | a module's share of the components | A starts as |
|---|---|---|
| `activations` | by the variance that each component explains (EVA, arXiv 2410.07170) | the principal directions of its inputs |
| `gradients` | in proportion to mean \\|W ∘ G\\| (GoRA's importance, arXiv 2502.12171) | the first right singular vectors of G |

G is the gradient of W over all batches together. B starts at 0, so training starts from the base
model. All modules share Σ r components, each has at most ρ·r; s = α/r stays, whatever the rank.

While it trains a module has room for ρ·r components and a mask says which there are: shapes, and
with them the optimiser's state, stay. Files have an ordinary `rank_pattern` (`cut_to_masks`).
"""  # noqa: E501  the table

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...distributed import reduce_mean, take_from_first, world_size
from ...hooks import MicroBatch, TrainingHooks
from .config import LoraConfig
from .input_moments import InputMoments, principal_directions
from .layer import Linear, LoraLayer


class DataRankHooks(TrainingHooks):
    """Sets ranks and starts of one adapter; a training step changes nothing.

    Args:
        model: whose training it is.
        layers: with the adapter, by name.
        adapter: its name.
        config: its options.
        ranks: the rank that each module had of its own.
        total_steps, seed: see `TrainingHooks`.
    """

    requires_prepare = True

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, Linear],
        adapter: str,
        config: LoraConfig,
        ranks: Mapping[str, int],
        total_steps: int | None,
        seed: int,
    ) -> None:
        super().__init__(total_steps, seed=seed)
        self.model, self.layers, self.adapter = model, layers, adapter
        self.config, self.ranks = config, ranks

    @property
    def finished(self) -> bool:
        """Whether the ranks have been set."""
        return self.prepared

    # --- before the first step -------------------------------------------------------------------
    def prepare(self, dataloader: Iterable[Any], forward_loss: Callable[[Any], Tensor]) -> None:
        """Looks at `rank_batches` steps' batches, in evaluation mode; sets A and the ranks."""
        most = {name: layer.r[self.adapter] for name, layer in self.layers.items()}
        modes = {module: module.training for module in self.model.modules()}
        look = _input_starts if self.config.rank_from == "activations" else _gradient_starts
        try:
            self.model.eval()
            batches = list(_first(dataloader, self.config.rank_batches))
            starts, worths = look(self.layers, batches, forward_loss, most)
        finally:
            for module, mode in modes.items():
                module.training = mode
            self.model.zero_grad(set_to_none=True)
        total = sum(self.ranks.values())
        if self.config.rank_from == "activations":
            kept = largest_components(worths, total)
        else:
            kept = shared_in_proportion({n: float(w) for n, w in worths.items()}, most, total)
        for name, layer in self.layers.items():
            layer.set_components(self.adapter, starts[name][: kept[name]])
        factors = [x.factors(self.adapter)[0] for x in self.layers.values()]
        take_from_first([*factors, *self._masks().values()])

    # --- reports and resuming --------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """The masks."""
        return {"masks": self._masks()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes them back."""
        for name, mask in self._masks().items():
            mask.copy_(state["masks"][name])

    def _masks(self) -> dict[str, Tensor]:
        return {name: x.lora_ranks[self.adapter].keep for name, x in self.layers.items()}


def most_components(layer: LoraLayer, r: int, rho: float) -> int:
    """Room for components in a layer whose rank would be r: ρ·r, or all that its sides allow."""
    weight = layer.weight
    return max(r, min(round(rho * r), weight.shape[0], weight.shape[1]))


def _first(dataloader: Iterable[Any], steps: int) -> Iterator[Any]:
    """The batches of the first optimiser steps."""
    for batch in dataloader:
        yield batch
        steps -= bool(getattr(batch, "last", True))
        if not steps:
            return


Looked = tuple[dict[str, Tensor], dict[str, Tensor]]  # A's rows and worths by module


def _input_starts(
    layers: Mapping[str, Linear],
    batches: list[Any],
    forward_loss: Callable[[Any], Tensor],
    most: Mapping[str, int],
) -> Looked:
    """The principal directions of every module's inputs, and the share of variance of each."""
    with torch.no_grad(), InputMoments(layers) as moments:
        for batch in batches:
            moments.counts = getattr(batch, "weight", 1.0) > 0
            moments.begin(batch)
            forward_loss(batch)
        scatters = moments.scatters()
    found = {n: principal_directions(scatters[n], most[n]) for n in layers}
    return {n: rows for n, (_, rows) in found.items()}, {
        n: share for n, (share, _) in found.items()
    }


def _gradient_starts(
    layers: Mapping[str, Linear],
    batches: list[Any],
    forward_loss: Callable[[Any], Tensor],
    most: Mapping[str, int],
) -> Looked:
    """The first right singular vectors of every G, and mean |W ∘ G|."""
    weights = {name: layer.base_layer.weight for name, layer in layers.items()}
    for weight in weights.values():
        weight.requires_grad_(True)
    try:
        with torch.enable_grad():
            for batch in batches:
                # of a step with several batches and processes the gradients are summed by weight
                share = batch.weight * world_size() if isinstance(batch, MicroBatch) else 1.0
                (forward_loss(batch) * share).backward()
        silent = [name for name, weight in weights.items() if weight.grad is None]
        if silent:
            raise ValueError(f"rank_from: {', '.join(silent[:3])} got no gradient in the batches")
        names, grads = list(weights), [w.grad for w in weights.values()]
    finally:
        for weight in weights.values():
            weight.requires_grad_(False)
            weight.grad = None
    starts, worths = {}, {}
    for name, grad in zip(names, reduce_mean(grads), strict=True):
        W = weights[name].detach()
        worths[name] = (W * grad).abs().mean(dtype=torch.float64)
        G = grad.T if layers[name].fan_in_fan_out else grad  # (out, in)
        starts[name] = principal_directions(G.double().T @ G.double(), most[name])[1]
    return starts, worths


# --- sharing the components out ------------------------------------------------------------------
def largest_components(worths: Mapping[str, Tensor], total: int) -> dict[str, int]:
    """The `total` components of largest worth; of equal ones the first module's.

    Args:
        worths: module -> (k,), descending.
        total: of all modules together.
    """
    found = [(-float(w), name) for name, own in worths.items() for w in own]
    ranks = dict.fromkeys(worths, 0)
    for _, name in sorted(found, key=lambda pair: pair[0])[:total]:
        ranks[name] += 1
    return ranks


def shared_in_proportion(
    weights: Mapping[str, float], most: Mapping[str, int], total: int
) -> dict[str, int]:
    """Ranks in proportion to weights (Sainte-Laguë), from 1 to `most`, `total` together."""
    ranks = dict.fromkeys(weights, 1)
    queue = [(-w / 3.0, i, name) for i, (name, w) in enumerate(weights.items()) if most[name] > 1]
    heapq.heapify(queue)
    for _ in range(total - len(ranks)):
        if not queue:
            break
        _, i, name = heapq.heappop(queue)
        ranks[name] += 1
        if ranks[name] < most[name]:
            heapq.heappush(queue, (-weights[name] / (2 * ranks[name] + 1), i, name))
    return ranks


# --- files ---------------------------------------------------------------------------------------
def cut_to_masks(
    layers: Mapping[str, Linear], adapter: str, config: LoraConfig, tensors: dict[str, Tensor]
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """The adapter as files have it: the components that there are, `rank_pattern`, the same s.

    A module without any is no target. Changes `config`.
    """
    result, ranks = dict(tensors), {}
    alphas: dict[str, float] = {}
    for name, layer in layers.items():
        kept = layer.lora_ranks[adapter].keep != 0
        keys = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
        A, B = (result.pop(key) for key in keys)
        rank = int(kept.sum())
        if rank:
            ranks[name] = rank
            alpha = layer.scaling[adapter] * rank
            alphas[name] = round(alpha) if abs(alpha - round(alpha)) < 1e-9 * alpha else alpha
            result.update(zip(keys, (A[kept], B[:, kept]), strict=True))
    if len(ranks) < len(layers):
        config.target_modules = sorted(ranks)
        config.layers_to_transform = config.layers_pattern = config.exclude_modules = None
    config.rank_pattern = {name: rank for name, rank in ranks.items() if rank != config.r}
    own = config.lora_alpha
    config.alpha_pattern = {name: alpha for name, alpha in alphas.items() if alpha != own}
    return config, result
