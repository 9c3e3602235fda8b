"""What each method adds to a weight: low rank, prototypes, a full matrix, or other weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .config import SplopaConfig, SploraConfig, SpparaConfig
from .functional import apply_blocks, masked_mixture, mixture
from .prototypes import Positions, Prototypes, draw_low_rank


class Increment(nn.Module):
    """One adapter's part of one layer: W' = W + ΔW, both as a matrix (out, in).

    For convolutions the matrix is the centre of the kernel, and in is that of one group.
    """

    def forward(self, weight: Tensor) -> Tensor:
        """W', fp32 or wider."""
        return weight.to(torch.promote_types(weight.dtype, torch.float32)) + self.delta()

    def delta(self) -> Tensor:
        """ΔW."""
        raise NotImplementedError

    def masked(self, weight: Tensor, mask: Tensor) -> Tensor:
        """E(M) ∘ W', M (out/p, in/q)."""
        return apply_blocks(self(weight), mask)

    def tensors(self) -> list[Tensor]:
        """What ΔW is made of, parameters of other layers included."""
        return list(self.parameters())


class LowRank(Increment):
    """ΔW = C R, C (out, r) and R (r, in) (SPLoRA)."""

    def __init__(
        self, outputs: int, inputs: int, config: SploraConfig, device: torch.device
    ) -> None:
        super().__init__()
        r = config.rank(outputs)
        self.cols = nn.Parameter(torch.empty(outputs, r, device=device))
        self.rows = nn.Parameter(torch.empty(r, inputs, device=device))
        draw_low_rank(self.cols, self.rows, config.init_range)

    def delta(self) -> Tensor:
        return self.cols @ self.rows

    def update(self, x: Tensor) -> Tensor:
        """x ΔWᵀ without forming ΔW."""
        return nn.functional.linear(nn.functional.linear(x, self.rows), self.cols)


class Parallel(Increment):
    """ΔW = A, a full matrix (SPPaRA)."""

    def __init__(
        self, outputs: int, inputs: int, config: SpparaConfig, device: torch.device
    ) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.empty(outputs, inputs, device=device))
        nn.init.uniform_(self.matrix, -config.init_range, config.init_range)

    def delta(self) -> Tensor:
        return self.matrix


class Mixture(Increment):
    """ΔW = Σ_k B_k ⊗ P_k (SPLoPA).

    Args:
        positions, prototypes: modules.
        owns: whether each of them is registered here, and not in an earlier layer.
    """

    def __init__(
        self, positions: Positions, prototypes: Prototypes, owns: tuple[bool, bool]
    ) -> None:
        super().__init__()
        self._parts = (positions, prototypes)  # a tuple: not registered
        if owns[0]:
            self.positions = positions
        if owns[1]:
            self.prototypes = prototypes

    def delta(self) -> Tensor:
        positions, prototypes = self._parts
        return mixture(positions.position_weights, prototypes())

    def masked(self, weight: Tensor, mask: Tensor) -> Tensor:
        positions, prototypes = self._parts
        return masked_mixture(weight, positions.position_weights, prototypes(), mask)

    def tensors(self) -> list[Tensor]:
        return [p for part in self._parts for p in part.parameters()]


class Dense(Increment):
    """W' itself is the parameter (block fine-pruning)."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        wide = torch.promote_types(weight.dtype, torch.float32)
        self.weight = nn.Parameter(
            weight.detach().to(wide).clone(memory_format=torch.contiguous_format)
        )

    def forward(self, weight: Tensor) -> Tensor:
        return self.weight


class Shared:
    """Prototypes and positions that layers of one adapter share, made when first asked for."""

    def __init__(self, config: SplopaConfig) -> None:
        self.config = config
        self.prototypes: Prototypes | None = None
        self.positions: dict[tuple[int, int], Positions] = {}

    def mixture(self, outputs: int, inputs: int, device: torch.device) -> Mixture:
        """The increment of one more layer."""
        config = self.config
        grid = outputs // config.mask_block_rows, inputs // config.mask_block_cols
        prototypes = self.prototypes if config.share_prototypes else None
        positions = self.positions.get(grid) if config.share_position_weights else None
        owns = positions is None, prototypes is None
        if positions is None:
            positions = Positions(config.num_prototypes, grid, device)
        if prototypes is None:
            prototypes = Prototypes(config, device)
        self.prototypes, self.positions[grid] = prototypes, positions
        return Mixture(positions, prototypes, owns)
