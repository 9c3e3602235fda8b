"""All A, E and B of one adapter as a few stacked tensors, so that a step costs a few operators.

Parameters and gradients stay ordinary tensors. A *flat* vector holds a value for every scalar of
all of them, matrices of one shape one above the other; it is filled by one `torch.cat` per shape
and seen through as stacks:

    A of n matrices (r, in)  →  (n, r, in)        B  →  (n, out, r)        all E  →  (Σr,)

Component k of matrix i is the triplet (A[k, :], E[k], B[:, k]); triplets are numbered by matrix,
in the order of the model, then by k.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .layer import SVDLinear


class Stack(NamedTuple):
    """Parameters of one shape and where they are in a flat vector."""

    parameters: list[nn.Parameter]
    start: int
    shape: tuple[int, int, int]  # (n, rows, columns)

    @property
    def numel(self) -> int:
        """Number of scalars."""
        return self.shape[0] * self.shape[1] * self.shape[2]

    def of(self, flat: Tensor) -> Tensor:
        """This stack's part of a flat vector, (n, rows, columns)."""
        return flat[self.start : self.start + self.numel].view(self.shape)


class Triplets:
    """The triplets of adapter `adapter` in `layers`.

    Attributes:
        names: of the n matrices, in the order of the model.
        ranks: their ranks.
        A, B: stacks of matrices of one shape; those of rank 0 are left out.
        E: the parameters E (r, 1).
        numel: length of a flat vector.
    """

    def __init__(self, layers: Sequence[tuple[str, SVDLinear]], adapter: str) -> None:
        self.names = [name for name, _ in layers]
        self.layers = [layer for _, layer in layers]
        self.adapter = adapter
        found = [layer.triplets(adapter) for layer in self.layers]
        self.ranks = [len(E) for _, E, _ in found]
        self.E = [E for _, E, _ in found]
        self.numel = 0
        self.A, order_A = self._stacks([A for A, _, _ in found])
        self.B, order_B = self._stacks([B for _, _, B in found])
        self._e_start = self.numel
        self.numel += sum(self.ranks)
        device = self.E[0].device
        if any(p.device != device for p in self.parameters()):
            raise NotImplementedError(
                "AdaLoRA ranks all components together, which needs its adapters on one device"
            )
        self._order = torch.tensor([order_A, order_B], device=device)

    def _stacks(self, matrices: list[nn.Parameter]) -> tuple[list[Stack], list[int]]:
        """Stacks by shape; for every triplet in order its position among those of the stacks."""
        by_shape: dict[tuple[int, int], list[int]] = {}
        for i, matrix in enumerate(matrices):
            if self.ranks[i]:
                by_shape.setdefault((matrix.shape[0], matrix.shape[1]), []).append(i)
        stacks, firsts, seen = [], {}, 0
        for shape, members in by_shape.items():
            stacks.append(Stack([matrices[i] for i in members], self.numel, (len(members), *shape)))
            self.numel += stacks[-1].numel
            for i in members:
                firsts[i] = seen
                seen += self.ranks[i]
        order = [firsts[i] + k for i, rank in enumerate(self.ranks) for k in range(rank)]
        return stacks, order

    def parameters(self) -> list[nn.Parameter]:
        """All parameters of rank above 0, in the order of a flat vector, E last."""
        stacked = [p for stack in (*self.A, *self.B) for p in stack.parameters]
        return [*stacked, *self.E]

    def gather(self, of: Callable[[nn.Parameter], Tensor], out: Tensor) -> Tensor:
        """Fills the flat vector `out` with `of(parameter)` of every parameter."""
        for stack in (*self.A, *self.B):
            values = [of(p) for p in stack.parameters]
            torch.cat(values, out=stack.of(out).flatten(0, 1))
        torch.cat([of(E) for E in self.E], out=self.e_of(out)[:, None])
        return out

    def e_of(self, flat: Tensor) -> Tensor:
        """E's part of a flat vector, (Σr,)."""
        return flat[self._e_start :]

    def pool(self, scores: Tensor) -> Tensor:
        """One score per triplet, S = s(E) + mean s(A[k, :]) + mean s(B[:, k]), (Σr,) in order.

        Args:
            scores: flat vector of every scalar's score.
        """
        rows = torch.cat([stack.of(scores).mean(2).flatten() for stack in self.A])
        columns = torch.cat([stack.of(scores).mean(1).flatten() for stack in self.B])
        return self.e_of(scores) + rows[self._order[0]] + columns[self._order[1]]

    def split(self, values: Tensor) -> list[Tensor]:
        """One value per triplet (Σr,) → per matrix, shaped as its E (r, 1)."""
        return list(values[:, None].split(self.ranks))
