"""IVON: a Gaussian over the weights, by variational inference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from examples.cli.fields import option
from examples.methods.registry import BuiltOptimizer, RunInfo, register_optimizer

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class IvonOptions:
    """σ = 1/√(ess·(h + weight_decay)) for every trained weight; h starts at hess_init."""

    ivon_ess: float = option(
        0, "effective number of training rows; 0: all rows, of texts their tokens", low=0
    )
    ivon_hess_init: float = option(1.0, "h at the start", low=0)
    ivon_beta1: float = option(0.9, "decay of the mean gradient", low=0, high=1)
    ivon_beta2: float = option(0.99999, "decay of h", low=0, high=1)
    ivon_weight_decay: float = option(1e-8, "precision of the prior over ess", low=0)
    ivon_train_mc_samples: int = option(1, "samples of the weights per step", low=1)
    ivon_infer_mc_samples: int = option(
        0, "predictions are averaged over so many samples of the weights; 0: at their mean", low=0
    )
    ivon_clip_radius: float = option(
        1e-3, "no weight moves by more than this times the rate", low=0
    )


def build(groups: list[dict[str, Any]], options: IvonOptions, run: RunInfo) -> BuiltOptimizer:
    """IVON over all groups; without a stated ess, its posterior is that of the run's N rows."""
    from examples.optimizers.ivon_posterior import PosteriorFile, PosteriorPredictor
    from ivon import IVON

    if run.fp16:
        raise ValueError(
            "--optimizer ivon needs gradients as they are, and fp16 scales them: use "
            "--mixed_precision bf16 or no"
        )
    if any(group.pop("weight_decay", 0) for group in groups):
        raise ValueError(
            "--weight_decay is adamw's; the prior of --optimizer ivon is --ivon_weight_decay"
        )
    optimizer = IVON(
        _merged(groups),
        lr=groups[0]["lr"],
        ess=options.ivon_ess or run.rows or 1,
        hess_init=options.ivon_hess_init,
        beta1=options.ivon_beta1,
        beta2=options.ivon_beta2,
        weight_decay=options.ivon_weight_decay,
        mc_samples=options.ivon_train_mc_samples,
        clip_radius=options.ivon_clip_radius,
        generator=_shared_noise(run),
    )
    built = BuiltOptimizer(optimizer, sampler=optimizer)
    built.posterior = PosteriorFile(optimizer, any_ess=not (options.ivon_ess or run.rows))
    if samples := options.ivon_infer_mc_samples:
        built.predictor = lambda inner: PosteriorPredictor(optimizer, samples, run.seed, inner)
    return built


def _shared_noise(run: RunInfo) -> torch.Generator | None:
    """Several processes average gradients at one and the same draw of the weights.

    It comes from torch's own generator in any case, which the trainer seeds alike on all of them
    before every draw; IVON wants to be told that they share one.
    """
    if run.processes == 1:
        return None
    import torch

    device = torch.device(run.device)
    if device.type == "cuda":
        return torch.cuda.default_generators[device.index or 0]
    return torch.default_generator


def _merged(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Groups that differ only in name as one: its vectors are longer, its operators fewer."""
    found: dict[tuple, dict[str, Any]] = {}
    for group in groups:
        own = {k: v for k, v in group.items() if k not in ("name", "params")}
        merged = found.setdefault(tuple(sorted(own.items())), {**own, "params": []})
        merged["params"] += group["params"]
    return list(found.values())


register_optimizer(
    "ivon",
    IvonOptions,
    build,
    "a Gaussian over the weights, by variational inference",
    has_posterior=True,
)
