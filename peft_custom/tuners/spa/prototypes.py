"""ΔW = Σ_k B_k ⊗ P_k, P_k = C_k R_k: blocks that are mixtures of K prototypes (SPLoPA).

Block (a, b) of ΔW is Σ_k B[k, a, b]·P_k, so all blocks are one product of B as (o/p·i/q, K) and P
as (K, p·q). Prototypes may serve all layers of a model, and positions all layers of one shape; the
parameters are then registered in the first of these layers, and the others hold the module.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .config import SplopaConfig


class Prototypes(nn.Module):
    """C (K, p, r) and R (K, r, q)."""

    def __init__(self, config: SplopaConfig, device: torch.device) -> None:
        super().__init__()
        K, r = config.num_prototypes, config.prototype_rank
        p, q = config.mask_block_rows, config.mask_block_cols
        self.prototype_cols = nn.Parameter(torch.empty(K, p, r, device=device))
        self.prototype_rows = nn.Parameter(torch.empty(K, r, q, device=device))
        draw_low_rank(self.prototype_cols, self.prototype_rows, config.init_range)

    def forward(self) -> Tensor:
        """P (K, p, q)."""
        return self.prototype_cols @ self.prototype_rows


class Positions(nn.Module):
    """B (K, o/p, i/q)."""

    def __init__(self, K: int, grid: tuple[int, int], device: torch.device) -> None:
        super().__init__()
        self.position_weights = nn.Parameter(torch.empty(K, *grid, device=device))
        bound = 1.0 / math.sqrt(grid[0] * grid[1])
        nn.init.uniform_(self.position_weights, -bound, bound)


def draw_low_rank(cols: nn.Parameter, rows: nn.Parameter, init_range: float) -> None:
    """R ~ U(±1/√(r·in)), C ~ U(±init_range), or ±1/√(r·out) where that is 0."""
    r, inputs = rows.shape[-2:]
    outputs = cols.shape[-2]
    nn.init.uniform_(rows, -1.0 / math.sqrt(r * inputs), 1.0 / math.sqrt(r * inputs))
    bound = init_range or 1.0 / math.sqrt(r * outputs)
    nn.init.uniform_(cols, -bound, bound)
