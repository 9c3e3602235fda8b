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
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..modules_to_save import ModulesToSaveWrapper
from .layer import LoraLayer

if TYPE_CHECKING:
    from .model import LoraModel

RULES = ("ties", "dare_linear", "dare_ties", "magnitude_prune")
TYPES = ("svd", "linear", "cat", *RULES, *(f"{rule}_svd" for rule in RULES))


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
    layer: LoraLayer,
    sources: list[tuple[str, float]],
    kind: str,
    rank: int,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """A and B, as matrices, of the combination of `sources` (adapter, weight) in one layer."""
    parts = [
        (A.flatten(1), B.flatten(1), weight * layer.scaling[name])
        for name, weight in sources
        for A, B in [layer.factors(name)]
    ]
    if kind == "cat":
        return torch.cat([s * A for A, _, s in parts]), torch.cat([B for _, B, _ in parts], dim=1)
    density, method = options["density"], options["majority_sign_method"]
    if kind.endswith("svd"):
        rule = "linear" if kind == "svd" else kind.removesuffix("_svd")
        factors = [(layer.factors(name), layer.scaling[name]) for name, _ in sources]
        deltas = [s * (B.flatten(1) @ A.flatten(1)) for (A, B), s in factors]
        total = combine(deltas, [w for _, w in sources], rule, density, method)
        return truncate(total, rank, options["svd_clamp"], options["svd_driver"])
    roots = [math.sqrt(abs(s)) for _, _, s in parts]
    signed = [math.copysign(root, s) for root, (_, _, s) in zip(roots, parts, strict=True)]
    A = combine([A for A, _, _ in parts], signed, kind, density, method)
    return A, combine([B for _, B, _ in parts], roots, kind, density, method)


def _checked(
    tuner: LoraModel, adapters: list[str], weights: list[float], kind: str, density: float | None
) -> None:
    if kind not in TYPES:
        raise ValueError(f"combination_type={kind!r}: use one of {', '.join(TYPES)}")
    if not adapters or len(adapters) != len(weights):
        raise ValueError(f"{len(adapters)} adapters and {len(weights)} weights: one weight each")
    for name in adapters:
        tuner.adapter_config(name)
    if any(rule in kind for rule in RULES) and not (density is not None and 0 < density <= 1):
        raise ValueError(
            f"density={density!r}: the part of the entries that {kind} keeps, above 0 to 1"
        )
    for module in tuner.model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            having = [name for name in adapters if name in module.modules_to_save]
            if len(having) > 1:
                raise ValueError(
                    f"adapters {having} each saved the same module in full; there is "
                    "no one head for their combination"
                )
        if isinstance(module, LoraLayer):
            if any(name in module.pissa_initial for name in adapters):
                raise ValueError(
                    "a PiSSA adapter counts from a base of its own; save it with "
                    "convert_pissa_to_lora=True, load that, and combine it then"
                )


def add_weighted_adapter(
    tuner: LoraModel,
    adapters: list[str],
    weights: list[float],
    adapter_name: str,
    combination_type: str = "svd",
    svd_rank: int | None = None,
    svd_clamp: float | None = None,
    svd_full_matrices: bool = True,
    svd_driver: str | None = None,
    density: float | None = None,
    majority_sign_method: str = "total",
) -> None:
    """Adds adapter `adapter_name`, combined from `adapters` by `weights`; it is not activated.

    Args:
        tuner: the LoRA tuner that has the adapters.
        adapters: names of the sources.
        weights: one weight each; negative ones subtract.
        adapter_name: name of the result.
        combination_type: see the table at the top of the module.
        svd_rank: rank of an SVD result; default: the largest source rank.
        svd_clamp: quantile at which the SVD's factors are clamped.
        svd_full_matrices: accepted for PEFT's sake; the result is the same.
        svd_driver: cuSOLVER's driver.
        density: part of the entries that pruning rules keep.
        majority_sign_method: "total" or "frequency", for the ties rules.
    """
    del svd_full_matrices
    if majority_sign_method not in ("total", "frequency"):
        raise ValueError(f"majority_sign_method={majority_sign_method!r}: 'total' or 'frequency'")
    kind = "linear" if len(adapters) == 1 and combination_type == "cat" else combination_type
    _checked(tuner, adapters, weights, kind, density)
    options = {
        "density": density,
        "majority_sign_method": majority_sign_method,
        "svd_clamp": svd_clamp,
        "svd_driver": svd_driver,
    }
    results: dict[str, tuple[Tensor, Tensor]] = {}
    for name, layer in tuner.lora_layers():
        sources = [(a, w) for a, w in zip(adapters, weights, strict=True) if a in layer.adapters]
        if not sources:
            continue
        ranks = [layer.r[a] for a, _ in sources]
        if not kind.endswith("svd") and kind != "cat" and len(set(ranks)) > 1:
            raise ValueError(f"{kind} needs equal ranks; {name} has {ranks} (use cat or svd)")
        results[name] = combined_factors(layer, sources, kind, svd_rank or max(ranks), options)
    tuner.add_adapter(adapter_name, _combined_config(tuner, adapters, results))
    for name, layer in tuner.lora_layers():
        if name in results:
            for target, value in zip(layer.factors(adapter_name), results[name], strict=True):
                target.data.copy_(value.view_as(target))
    for module in tuner.model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            for source in adapters:
                if source in module.modules_to_save and adapter_name in module.modules_to_save:
                    weights_of = module.modules_to_save[source].state_dict()
                    module.modules_to_save[adapter_name].load_state_dict(weights_of)


def _combined_config(
    tuner: LoraModel, adapters: list[str], results: dict[str, tuple[Tensor, Tensor]]
) -> Any:
    """The first source's configuration with the result's ranks, α = r and full module names."""
    config = copy.deepcopy(tuner.peft_config[adapters[0]])
    ranks = {name: A.shape[0] for name, (A, _) in results.items()}
    config.r = max(ranks.values())
    config.lora_alpha = config.r
    config.rank_pattern = {name: rank for name, rank in ranks.items() if rank != config.r}
    config.alpha_pattern = dict(config.rank_pattern)
    config.target_modules = sorted(results)
    config.layers_to_transform = config.layers_pattern = config.exclude_modules = None
    config.use_rslora, config.bias, config.init_lora_weights = False, "none", True
    heads = {e for name in adapters for e in tuner.peft_config[name].modules_to_save or []}
    config.modules_to_save = sorted(heads) or None
    return config
