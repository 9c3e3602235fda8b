"""A new LoRA adapter out of several: exact sums, truncated sums, and pruned or voted merges.

With ΔWᵢ = sᵢ Bᵢ Aᵢ and weights wᵢ, the new adapter (α = r, so s = 1) is

| type | increment |
|---|---|
| `cat` | Σ wᵢ ΔWᵢ exactly; rank Σ rᵢ |
| `svd` | the best rank-`svd_rank` approximation of Σ wᵢ ΔWᵢ |
| `<rule>_svd` | the same of rule(w, ΔW); rules: ties, dare_linear, dare_ties, magnitude_prune |
| `linear` | (Σ √\\|wᵢsᵢ\\| Bᵢ)(Σ ±√\\|wᵢsᵢ\\| Aᵢ): needs equal ranks, and has cross terms BᵢAⱼ |
| `<rule>` | as `linear`, the rule in place of the sum over A's and over B's |

magnitude_prune keeps the `density` largest entries of each tensor; dare drops entries at random
and divides the rest by `density` (Yu et al. 2024); ties prunes by magnitude, elects a sign per
entry and averages the entries that have it (Yadav et al. 2023).
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .config import LoraConfig
from .layer import LoraLayer

RULES = ("ties", "dare_linear", "dare_ties", "magnitude_prune")
TYPES = ("svd", "linear", "cat", *RULES, *(f"{rule}_svd" for rule in RULES))

Factors = tuple[Tensor, Tensor]  # A (r, …) and B (…, r) as matrices


@dataclass(frozen=True)
class Combination:
    """How adapters are combined.

    Attributes:
        kind: see the table at the top of the module.
        svd_rank: rank of an SVD result; default: the largest source rank.
        svd_clamp: quantile at which the SVD's factors are clamped.
        svd_driver: cuSOLVER's driver.
        density: part of the entries that pruning rules keep.
        majority_sign_method: "total" or "frequency", for the ties rules.
    """

    kind: str
    svd_rank: int | None = None
    svd_clamp: float | None = None
    svd_driver: str | None = None
    density: float | None = None
    majority_sign_method: str = "total"

    def __post_init__(self) -> None:
        if self.majority_sign_method not in ("total", "frequency"):
            raise ValueError(
                f"majority_sign_method={self.majority_sign_method!r}: 'total' or 'frequency'"
            )
        if self.kind not in TYPES:
            raise ValueError(f"combination_type={self.kind!r}: use one of {', '.join(TYPES)}")
        prunes = any(rule in self.kind for rule in RULES)
        if prunes and not (self.density is not None and 0 < self.density <= 1):
            raise ValueError(
                f"density={self.density!r}: the part of the entries that {self.kind} keeps, above "
                "0 to 1"
            )

    @property
    def truncates(self) -> bool:
        """Whether the result is an SVD of the summed increments."""
        return self.kind.endswith("svd")


def prune_by_magnitude(tensor: Tensor, density: float) -> Tensor:
    """Zeroes all but the `density` part of largest absolute value."""
    keep = int(density * tensor.numel())
    flat = tensor.flatten()
    mask = torch.zeros_like(flat)
    mask[flat.abs().topk(keep).indices] = 1.0
    return (flat * mask).view_as(tensor)


def drop_at_random(tensor: Tensor, density: float) -> Tensor:
    """Zeroes each entry with probability 1 − density and divides the others by density."""
    return tensor * torch.bernoulli(torch.full_like(tensor, density)) / density


def vote(tensors: Tensor, weights: Tensor, method: str) -> Tensor:
    """TIES: weighted mean, entry by entry, of those tensors that have the majority's sign.

    Args:
        tensors: (n, …).
        weights: (n,).
        method: the majority of the summed values ("total") or of the signs ("frequency").
    """
    ballots = tensors.sign() if method == "frequency" else tensors
    majority = torch.where(ballots.sum(0) >= 0, 1.0, -1.0)
    agree = (tensors.sign() == majority).to(tensors)
    weighted = weights.view(-1, *[1] * (tensors.dim() - 1)) * tensors * agree
    return weighted.sum(0) / agree.sum(0).clamp(min=1.0)


def combine(
    tensors: Sequence[Tensor], weights: Sequence[float], rule: str, density: float, method: str
) -> Tensor:
    """One tensor out of several by `rule` ("linear" is the weighted sum)."""
    if rule == "dare_linear" or rule == "dare_ties":
        tensors = [drop_at_random(t, density) for t in tensors]
    elif rule != "linear":
        tensors = [prune_by_magnitude(t, density) for t in tensors]
    stacked = torch.stack(list(tensors))
    factors = torch.tensor(weights, dtype=stacked.dtype, device=stacked.device)
    if rule in ("ties", "dare_ties"):
        return vote(stacked, factors, method)
    return torch.tensordot(factors, stacked, dims=1)


def truncate(
    delta: Tensor, rank: int, clamp: float | None, driver: str | None
) -> tuple[Tensor, Tensor]:
    """A (rank, in) and B (out, rank) with B A the best rank-`rank` approximation of `delta`."""
    left, values, right = torch.linalg.svd(delta, full_matrices=False, driver=driver)
    rank_here = min(rank, len(values))
    A, B = right[:rank_here], left[:, :rank_here] * values[:rank_here]
    if clamp is not None:
        top = torch.quantile(torch.cat([A.flatten(), B.flatten()]), clamp)
        A, B = A.clamp(-top, top), B.clamp(-top, top)
    if rank_here < rank:  # a small layer: the remaining ranks stay zero
        A = torch.cat([A, A.new_zeros(rank - rank_here, A.shape[1])])
        B = torch.cat([B, B.new_zeros(B.shape[0], rank - rank_here)], dim=1)
    return A, B


@torch.no_grad()
def combined_factors(
    layer: LoraLayer, sources: list[tuple[str, float]], how: Combination
) -> Factors:
    """A and B, as matrices, of the combination of `sources` (adapter, weight) in one layer."""
    parts = [
        (A.flatten(1), B.flatten(1), weight * layer.scaling[name])
        for name, weight in sources
        for A, B in [layer.factors(name)]
    ]
    if how.kind == "cat":
        return torch.cat([s * A for A, _, s in parts]), torch.cat([B for _, B, _ in parts], dim=1)
    density, method = how.density, how.majority_sign_method
    if how.truncates:
        rule = "linear" if how.kind == "svd" else how.kind.removesuffix("_svd")
        factors = [(layer.factors(name), layer.scaling[name]) for name, _ in sources]
        deltas = [s * (B.flatten(1) @ A.flatten(1)) for (A, B), s in factors]  # (out, in) each
        total = combine(deltas, [w for _, w in sources], rule, density, method)
        rank = how.svd_rank or max(layer.r[name] for name, _ in sources)
        return truncate(total, rank, how.svd_clamp, how.svd_driver)
    # √|s| goes into each factor, the sign into A alone, so that the product has s
    roots = [math.sqrt(abs(s)) for _, _, s in parts]
    signed = [math.copysign(root, s) for root, (_, _, s) in zip(roots, parts, strict=True)]
    A = combine([A for A, _, _ in parts], signed, how.kind, density, method)
    return A, combine([B for _, B, _ in parts], roots, how.kind, density, method)


def combined_adapter(
    layers: Iterable[tuple[str, LoraLayer]],
    sources: list[tuple[str, float]],
    configs: list[LoraConfig],
    how: Combination,
) -> tuple[LoraConfig, dict[str, Factors]]:
    """Configuration and factors of a new adapter, combined from others.

    Args:
        layers: names and layers of the model.
        sources: (adapter, weight), at least one; negative weights subtract.
        configs: the sources' configurations.
        how: the kind of combination and its options.

    Returns:
        The configuration, and by layer name A and B as matrices.

    Raises:
        ValueError: ranks that differ where they must not, or a PiSSA source.
    """
    if len(sources) == 1 and how.kind == "cat":
        how = dataclasses.replace(how, kind="linear")
    results: dict[str, Factors] = {}
    for name, layer in layers:
        if any(source in layer.magnitudes for source, _ in sources):
            raise ValueError("a DoRA adapter is no increment of W alone: it cannot be combined")
        if any(source in layer.taken_out for source, _ in sources):
            raise ValueError(
                "a PiSSA or OLoRA adapter counts from a base of its own; save it with "
                "convert_pissa_to_lora=True, load that, and combine it then"
            )
        here = [(source, weight) for source, weight in sources if source in layer.adapters]
        if not here:
            continue
        ranks = [layer.r[source] for source, _ in here]
        if not how.truncates and how.kind != "cat" and len(set(ranks)) > 1:
            raise ValueError(f"{how.kind} needs equal ranks; {name} has {ranks} (use cat or svd)")
        results[name] = combined_factors(layer, here, how)
    return _combined_config(configs, results), results


def _combined_config(sources: list[LoraConfig], results: dict[str, Factors]) -> LoraConfig:
    """The first source's configuration with the result's ranks, α = r and full module names."""
    config = copy.deepcopy(sources[0])
    ranks = {name: A.shape[0] for name, (A, _) in results.items()}
    config.r = max(ranks.values())
    config.lora_alpha = config.r
    config.rank_pattern = {name: rank for name, rank in ranks.items() if rank != config.r}
    config.alpha_pattern = dict(config.rank_pattern)
    config.target_modules = sorted(results)
    config.layers_to_transform = config.layers_pattern = config.exclude_modules = None
    config.use_rslora, config.bias, config.init_lora_weights = False, "none", True
    heads = {entry for source in sources for entry in source.modules_to_save or []}
    config.modules_to_save = sorted(heads) or None
    return config
