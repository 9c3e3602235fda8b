"""What keeps scores small: a penalty on every matrix's scores, and its gradient in closed form.

    l1:  mean σ(S)                    l0:  mean σ(S - β ln(-γ/ζ)), the probability of an open gate

averaged over the matrices, each of which counts the same whatever its size.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .criteria import HIGH, LOW


def shift(kind: str, beta: float) -> float:
    """c in σ(S + c)."""
    return -beta * math.log(-LOW / HIGH) if kind == "l0" else 0.0


def penalty(stacks: list[Tensor], kind: str, beta: float) -> Tensor:
    """The value, a scalar on the scores' device.

    Args:
        stacks: scores (G, N) of all matrices, stacked by size.
        kind: `"l0"` or `"l1"`.
        beta: temperature of the gates.
    """
    c = shift(kind, beta)
    rows = torch.cat([torch.sigmoid(S + c).mean(1) for S in stacks])  # (matrices,)
    return rows.mean()


def gradients(stacks: list[Tensor], kind: str, beta: float, weight: float) -> list[Tensor]:
    """λ·∂penalty/∂S = λ·σ(1 − σ)/(N·matrices), for every stack; `weight` is λ."""
    c, matrices = shift(kind, beta), sum(len(S) for S in stacks)
    found = []
    for S in stacks:
        s = torch.sigmoid(S + c)
        found.append(s * (1.0 - s) * (weight / (S.shape[1] * matrices)))
    return found
