"""From scores to masks, for many matrices at once: (G, N) scores, G matrices of N blocks each."""

from __future__ import annotations

import math

import torch
from torch import Tensor

LOW, HIGH = -0.1, 1.1  # γ and ζ, to which the hard concrete distribution is stretched
FLOOR = 0.005  # of the blocks of a matrix are kept whatever the scores


def least(n: int) -> int:
    """How many of n blocks are kept at least: 3 of 576, 12 of 2304."""
    return int(FLOOR * n) + 1


def count_to_keep(share: float, n: int, compat: bool = False) -> int:
    """⌊share·n⌋, which rounding does not push below a whole number, and at least `least(n)`.

    Args:
        share: τ.
        n: number of scores.
        compat: int(share·n) in floating point, as the originals have it: 28 of 0.29·100, or none.
    """
    if compat:
        return int(share * n)
    return min(n, max(least(n), math.floor(share * n + 1e-9)))


def keep_largest(scores: Tensor, k: int) -> Tensor:
    """1 for the k largest of every row, else 0; of equal scores those that come first."""
    order = scores.argsort(dim=1, descending=True, stable=True)[:, :k]  # (G, k)
    return torch.zeros_like(scores).scatter_(1, order, 1.0)


def above(scores: Tensor, cut: float) -> Tensor:
    """1 where S > cut, and for the `least` largest of every row."""
    return torch.maximum((scores > cut).to(scores), keep_largest(scores, least(scores.shape[1])))


def logit(share: float) -> float:
    """S with σ(S) = share; ±∞ at the ends."""
    if share <= 0.0 or share >= 1.0:
        return -math.inf if share <= 0.0 else math.inf
    return math.log(share / (1.0 - share))


def gates(scores: Tensor, beta: float = 1.0, uniform: Tensor | None = None) -> Tensor:
    """Hard-concrete gates clamp(s·(ζ − γ) + γ, 0, 1).

    Args:
        scores: S, of any shape.
        beta: temperature of a random gate, s = σ((ln u − ln(1 − u) + S)/β).
        uniform: u in (0, 1), of the same shape; None: s = σ(S), the gate of evaluation.
    """
    if uniform is not None:
        scores = (torch.logit(uniform, eps=1e-4) + scores) / beta
    return (torch.sigmoid(scores) * (HIGH - LOW) + LOW).clamp(0.0, 1.0)


def gate_slope(gate: Tensor, beta: float) -> Tensor:
    """∂gate/∂S, from the gate itself: (ζ − γ)·s(1 − s)/β where it is not clamped."""
    s = (gate - LOW) / (HIGH - LOW)
    return (HIGH - LOW) / beta * s * (1.0 - s) * ((gate > 0.0) & (gate < 1.0))
