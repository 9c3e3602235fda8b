"""The masks of a model: scores in the layers, computed together, kept as buffers.

`Masks` belongs to one adapter. It stacks all scores by shape, so that a step's masks are a few
tensor operations however many matrices there are, and writes the results into the buffers of every
`Mask`. In training, driven by hooks, the mask is that of the last applied step; everywhere else it
is the final one, formed again when a score has changed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from loralib.weight_cache import Kept, kept_weight

from ...rng import generator
from . import criteria
from .config import SpaConfig


class MaskedLayer(Protocol):
    """What a mask asks of the layers it acts on."""

    matrix_size: int

    def adapted_weight(self, adapter: str) -> Tensor:
        """W' as a matrix."""
        ...

    def weight_parts(self, adapter: str) -> list[Tensor]:
        """What W' is made of."""
        ...


class Member(NamedTuple):
    """A matrix under a mask.

    Attributes:
        layer: the adapted layer.
        adapter: of the mask.
        axis: `"blocks"`, `"rows"` or `"columns"`.
        segments: matrices fused in the rows, each with all the units: 3 of GPT-2's q, k and v.
    """

    layer: MaskedLayer
    adapter: str
    axis: str
    segments: int = 1

    def absolute_sum(self, shape: torch.Size) -> Tensor:
        """Sums of abs(W') over blocks or units, in the mask's shape."""
        W = self.layer.adapted_weight(self.adapter).abs()  # (out, in)
        if self.axis == "blocks":
            a, b = shape
            return W.unflatten(1, (b, -1)).unflatten(0, (a, -1)).sum((1, 3))
        [n] = shape
        if self.axis == "rows":
            return W.unflatten(0, (self.segments, n, -1)).flatten(2).sum((0, 2))
        return W.unflatten(1, (n, -1)).sum((0, 2))


class Mask(nn.Module):
    """Scores S and masks of the blocks of a matrix (rows, columns), or of units (n,).

    Attributes:
        mask_scores: S, fp32.
        mask: what training computes with, in S's shape.
        final: what evaluation computes with.
        size: of a block (p, q), or of a unit (rows or columns of one matrix).
        masks: all masks of the adapter.
        members: where the mask acts.
    """

    def __init__(
        self, shape: tuple[int, ...], size: tuple[int, ...], masks: Masks, device: torch.device
    ) -> None:
        super().__init__()
        fp32 = {"dtype": torch.float32, "device": device}
        self.mask_scores = nn.Parameter(torch.empty(shape, **fp32))
        self.register_buffer("mask", torch.ones(shape, **fp32), persistent=False)
        self.register_buffer("final", torch.ones(shape, **fp32), persistent=False)
        self.size, self.masks = size, masks
        self.members: list[Member] = []
        config = masks.config
        if config.mask_init == "constant":
            nn.init.constant_(self.mask_scores, config.mask_scale)
        else:
            kaiming = 1.0 / math.sqrt(shape[-1])
            bound = kaiming if config.mask_init == "kaiming" else config.mask_scale
            nn.init.uniform_(self.mask_scores, -bound, bound)

    def now(self, training: bool) -> Tensor:
        """The mask in force; its gradient reaches the scores past the cut (straight-through)."""
        driven = training and self.masks.driven
        m, S = (self.mask if driven else self.final), self.mask_scores
        if not (torch.is_grad_enabled() and S.requires_grad):
            return m
        step = S - S.detach()  # 0, with a gradient
        if self.masks.config.pruning_method == "l0":
            step = criteria.gate_slope(m, self.masks.beta if driven else 1.0) * step
        return m + step

    def units(self, training: bool) -> Tensor:
        """The mask in force of every row or column that the units have, (n·size,)."""
        return self.now(training).repeat_interleave(self.size[0])

    @torch.no_grad()
    def magnitude(self) -> Tensor:
        """Mean of abs(W') over every block, or over all that a unit has in all its matrices."""
        sums = [member.absolute_sum(self.mask.shape) for member in self.members]
        return torch.stack(sums).sum(0) / self.weights()

    def weights(self) -> int:
        """How many weights an entry of the mask governs."""
        total = sum(member.layer.matrix_size for member in self.members)
        return total // self.mask.numel()

    def extra_repr(self) -> str:
        return f"{tuple(self.mask_scores.shape)} of {self.size}"


class Masks:
    """All masks of one adapter.

    Attributes:
        config: the adapter's options.
        items: the masks.
        driven: hooks set the masks of training.
        beta: temperature of the gates in training.
    """

    def __init__(self, config: SpaConfig) -> None:
        self.config = config
        self.items: list[Mask] = []
        self.driven, self.beta = False, config.initial_temperature
        self._kept: Kept | None = None

    def add(self, shape: tuple[int, ...], size: tuple[int, ...], device: torch.device) -> Mask:
        """One more mask; see `Mask`."""
        self.items.append(Mask(shape, size, self, device))
        return self.items[-1]

    # --- stacks of equal shapes -----------------------------------------------------------------
    def places(self) -> list[list[int]]:
        """Indices of `items`, together where the masks have equally many entries."""
        by_size: dict[int, list[int]] = {}
        for i, item in enumerate(self.items):
            by_size.setdefault(item.mask.numel(), []).append(i)
        return list(by_size.values())

    def stacked(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """One tensor a mask → (G, N) for every size N."""
        return [torch.stack([tensors[i].reshape(-1) for i in at]) for at in self.places()]

    def unstacked(self, stacks: Sequence[Tensor]) -> list[Tensor]:
        """The reverse, in the masks' shapes."""
        found: list[Tensor] = [item.mask for item in self.items]
        for at, stack in zip(self.places(), stacks, strict=True):
            for i, row in zip(at, stack, strict=True):
                found[i] = row.view_as(found[i])
        return found

    def scores(self) -> list[Tensor]:
        """(G, N) of what decides: scores, or magnitudes of the adapted weights."""
        if self.config.trains_scores:
            return self.stacked([item.mask_scores.detach() for item in self.items])
        return self.stacked([item.magnitude() for item in self.items])

    # --- masks ----------------------------------------------------------------------------------
    @torch.no_grad()
    def compute(self, threshold: float) -> list[Tensor]:
        """Masks at τ = `threshold`, as evaluation has them; one a mask, in its shape."""
        scores, method = self.scores(), self.config.pruning_method
        if method == "l0":
            return self.unstacked([criteria.gates(S) for S in scores])
        if not self.config.ranks:
            cut = threshold if method == "threshold" else criteria.logit(threshold)
            return self.unstacked([criteria.above(S, cut) for S in scores])
        compat = self.config.reference_compat
        if self.config.global_topk:
            flat = torch.cat([S.flatten() for S in scores])[None]  # (1, all)
            kept = criteria.keep_largest(
                flat, criteria.count_to_keep(threshold, flat.shape[1], compat)
            )
            sizes = [S.numel() for S in scores]
            parts = kept[0].split(sizes)
            return self.unstacked([m.view_as(S) for m, S in zip(parts, scores, strict=True)])
        return self.unstacked([
            criteria.keep_largest(S, criteria.count_to_keep(threshold, S.shape[1], compat))
            for S in scores
        ])  # fmt: skip

    @torch.no_grad()
    def draw(self, seed: int, step: int) -> list[Tensor]:
        """Random gates of step `step` (`l0`), the same on all processes and devices."""
        stacks = self.scores()
        made = generator(seed, step)
        drawn = [torch.rand(S.shape, generator=made).to(S.device) for S in stacks]
        return self.unstacked([
            criteria.gates(S, self.beta, u) for S, u in zip(stacks, drawn, strict=True)
        ])  # fmt: skip

    def refresh(self) -> None:
        """Writes the final masks anew where anything that they depend on has changed."""
        parts: list[Tensor] = [item.mask_scores for item in self.items]
        if not self.config.trains_scores:
            parts = self.adapted_parameters()

        def form() -> Tensor:
            found = self.compute(self.config.final_threshold)
            self.write("final", found)
            return found[0]

        self._kept = kept_weight(self._kept, parts, self.config.final_threshold, form)

    def adapted_parameters(self) -> list[Tensor]:
        """What the masked weights W' are made of."""
        members = [member for item in self.items for member in item.members]
        return [t for m in members for t in m.layer.weight_parts(m.adapter)]

    def forget(self) -> None:
        """The next `refresh` computes."""
        self._kept = None

    @torch.no_grad()
    def write(self, which: str, values: Sequence[Tensor]) -> None:
        """Copies masks into the buffers `"mask"` or `"final"`."""
        buffers = [getattr(item, which) for item in self.items]
        torch._foreach_copy_(buffers, list(values))

    def density(self) -> float:
        """Share of the masked weights that training computes with; an open gate counts as one."""
        weights = torch.tensor([float(item.weights()) for item in self.items])
        kept = torch.stack([(item.mask > 0).sum() for item in self.items]).cpu()
        total = torch.tensor([item.mask.numel() for item in self.items])
        return float((kept * weights).sum() / (total * weights).sum())

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}  # copies form their own

    def __iter__(self) -> Iterator[Mask]:
        return iter(self.items)
