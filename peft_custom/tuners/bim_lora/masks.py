"""Where the mask starts, and how its temperature falls.

P = clip(lo + (hi - lo)·ŝ, 0.01, 0.99)     lo += β/2, hi += β,  β = 0.12·I of the layer
Z = τ₀ ln(P/(1 - P)),  so that σ(Z/τ₀) = P  (the original leaves τ₀ out, and so misses P)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import reference
from .config import BimLoraConfig
from .features import KINDS, kinds_of

if TYPE_CHECKING:
    from ...hooks import TrainingHooks

BOOST = 0.12
CLIP = (0.01, 0.99)


def mask_range(kind: str, importance: float | None) -> tuple[float, float]:
    """(lo, hi) of the first masks of a kind of matrix, lifted by its layer's importance in [0, 1].

    Without an importance: (0.05, 0.55).
    """
    if importance is None:
        return 0.05, 0.55
    _, _, low, high = KINDS[kind]
    boost = BOOST * importance
    return min(0.95, low + boost / 2.0), min(0.99, high + boost)


def initial_probabilities(name: str, scores: Tensor, importance: float | None) -> Tensor:
    """P of a matrix's blocks, (p, q), from their scores ŝ; fused q, k, v by segments of rows."""
    kinds, p = kinds_of(name), scores.shape[0]
    ranges = [mask_range(kind, importance) for kind in kinds]
    segment = torch.arange(p, device=scores.device) * len(kinds) // p
    low, high = (scores.new_tensor(side)[segment][:, None] for side in zip(*ranges, strict=True))
    return (low + (high - low) * scores).clamp(*CLIP)


def logits(P: Tensor, temperature: float = 1.0) -> Tensor:
    """Z with σ(Z/τ) = P."""
    return temperature * torch.logit(P)


def relative_importance(gradients: Mapping[str, float]) -> dict[str, float]:
    """I of every layer in [0, 1]: its mean |∇W| between the smallest and the largest one's.

    On a logarithmic scale, so that one layer's large gradients do not make all others equal.
    """
    logs = {name: math.log(max(value, 1e-30)) for name, value in gradients.items()}
    low, high = min(logs.values()), max(logs.values())
    return {
        name: (value - low) / (high - low) if high > low else 0.5 for name, value in logs.items()
    }


def resolve_table(config: BimLoraConfig, hooks: TrainingHooks) -> list[tuple[int, float]]:
    """The rows (first step, τ) of a table, its fractions turned into steps."""
    if config.reference_compat:
        return reference.temperature_table(config.num_train_epochs, hooks.total_steps)
    rows = []
    for i, (start, tau) in enumerate(config.temperature_table):
        step = start
        if isinstance(start, float):
            step = hooks.steps(f"temperature_table[{i}]", start)
        rows.append((step, tau))
    if any(a[0] > b[0] for a, b in zip(rows, rows[1:], strict=False)):
        raise ValueError(f"temperature_table={config.temperature_table!r}: starts must ascend")
    return rows


def temperature_at(step: int, config: BimLoraConfig, table: list[tuple[int, float]]) -> float:
    """τ in step 0, 1, …, by the configured schedule."""
    if config.temperature_schedule == "constant":
        return float(config.mask_temperature)
    if config.temperature_schedule == "exponential":
        power = step // config.temperature_decay_steps
        fallen = config.mask_temperature * config.temperature_decay_rate**power
        return float(max(config.min_temperature, fallen))
    return float(next(tau for start, tau in reversed(table) if step >= start))
