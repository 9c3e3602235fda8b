"""What a saved adapter tells about ranks, about σ, and about the criteria that rank by them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from scipy.stats import spearmanr
from torch import Tensor

from examples.optimizers.ivon_posterior import HESSIAN
from examples.sweeps.records import Row
from ivon.posterior import KEY
from ivon.rule import std
from peft_custom.tuners.adalora.criteria import CRITERIA, inputs

FACTORS = ("lora_A", "lora_E", "lora_B")
POSTERIOR = [name for name, score in CRITERIA.items() if {*inputs(score)} <= {"mu", "sigma"}]
KEPT = 2 / 3  # of all triplets: what a budget of 4 keeps of 6


def adapter_figures(folder: Path) -> Row:
    """`ranks`: module -> rank; `posterior`: σ's spread and the criteria's likeness, if any."""
    row: Row = {}
    config = folder / "adapter_config.json"
    if not config.is_file():
        return row
    pattern = json.loads(config.read_text()).get("rank_pattern") or {}
    row["ranks"] = {
        name.removesuffix(".lora_E"): sum(kept)
        for name, kept in pattern.items()
        if isinstance(kept, list)
    }
    if (folder / HESSIAN).is_file() and row["ranks"]:
        row["posterior"] = _posterior(folder)
    return row


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def _posterior(folder: Path) -> Row:
    mu, _ = _read(folder / "adapter_model.safetensors")
    hess, facts = _read(folder / HESSIAN)
    group = json.loads(facts[KEY])[0]
    sigma = {name: std(h, group["ess"], group["weight_decay"]) for name, h in hess.items()}
    kinds = {kind: [s for name, s in sigma.items() if name.endswith(kind)] for kind in FACTORS}
    kinds["all"] = [s for kind in FACTORS for s in kinds[kind]]
    scores = {name: _scores(name, mu, sigma) for name in POSTERIOR}
    best = {name: _best(score) for name, score in scores.items()}
    modules = sorted(name.removesuffix(".lora_E") for name in sigma if name.endswith(".lora_E"))
    return {
        "sigma": {kind: _spread(own) for kind, own in kinds.items()},
        "spearman": {a: {b: _alike(scores[a], scores[b]) for b in scores} for a in scores},
        "kept_like_mean": {
            name: len(kept & best["mean"]) / len(kept) for name, kept in best.items()
        },
        "precision_of_modules": [_precision(sigma, module) for module in modules],
    }


def _precision(sigma: dict[str, Tensor], module: str) -> float | None:
    """The mean 1/σ of a module's weights; None where no triplet is left."""
    own = torch.cat([(1 / sigma[f"{module}.{kind}"]).flatten() for kind in FACTORS])
    return float(own.mean()) if len(own) else None


def _spread(sigmas: Sequence[Tensor]) -> Row:
    """Mean, and relative to it the extremes, the median and the standard deviation."""
    sigma = torch.cat([s.flatten() for s in sigmas]).double()
    mean = sigma.mean()
    relative = sigma / mean
    return {
        "mean": float(mean),
        "min": float(relative.min()),
        "median": float(relative.median()),
        "max": float(relative.max()),
        "variation": float(relative.std()),
    }


def _scores(name: str, mu: dict[str, Tensor], sigma: dict[str, Tensor]) -> Tensor:
    """S = s(E) + mean s(A row) + mean s(B column) of every triplet that is there."""
    score, found = CRITERIA[name], []
    for key in sorted(key for key in sigma if key.endswith(".lora_E")):
        part = {}
        for kind in FACTORS:
            own = key.removesuffix("lora_E") + kind
            given = {"mu": mu[own].double(), "sigma": sigma[own].double()}
            part[kind] = score(**{what: given[what] for what in inputs(score)})
        found.append(part["lora_E"][:, 0] + part["lora_A"].mean(1) + part["lora_B"].mean(0))
    return torch.cat(found)


def _best(scores: Tensor) -> set[int]:
    return set(scores.argsort(descending=True, stable=True)[: round(KEPT * len(scores))].tolist())


def _alike(a: Tensor, b: Tensor) -> float:
    """Spearman's correlation; 0 where one of them ranks nothing."""
    if bool((a == a[0]).all()) or bool((b == b[0]).all()):
        return 0.0
    return float(spearmanr(a.numpy(), b.numpy()).statistic)


def agreement(posteriors: Sequence[Row]) -> float:
    """Spearman's correlation, between the first two seeds, of the mean 1/σ of modules both have.

    Triplets of two seeds have nothing in common but their modules: where σ follows the data the
    modules' precisions agree, where it follows IVON's noise they do not.
    """
    pairs = zip(*(p["precision_of_modules"] for p in posteriors[:2]), strict=True)
    both = torch.tensor([pair for pair in pairs if None not in pair])
    return _alike(both[:, 0], both[:, 1])
