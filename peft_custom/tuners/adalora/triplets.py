"""All A, E and B of one adapter as a few stacked tensors, so that a step costs a few operators.

Parameters and gradients stay ordinary tensors; those of one shape are gathered by one `torch.cat`:

    A of n matrices (r, in)  →  (n, r, in)      B  →  (n, out, r)      all E (r, 1)  →  (1, Σr, 1)

What is kept for every scalar is one *flat* vector, in which each stack has its part. Component k of
matrix i is the triplet (A[k, :], E[k], B[:, k]); triplets are numbered by matrix, in the order of
the model, then by k.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .layer import SVDLinear


class Stack(NamedTuple):
    """Parameters that are one tensor when gathered.

    Attributes:
        parameters: one below the other along their first dimension.
        shape: (n, rows, columns) of the whole.
        start: where its part of a flat vector begins.
        axis: over which a component's scalars lie: 2 for A and E, 1 for B.
    """

    parameters: list[nn.Parameter]
    shape: tuple[int, int, int]
    start: int
    axis: int

    @property
    def numel(self) -> int:
        """Number of scalars."""
        return math.prod(self.shape)

    def of(self, flat: Tensor) -> Tensor:
        """This stack's part of a flat vector, (n, rows, columns)."""
        return flat[self.start : self.start + self.numel].view(self.shape)

    @torch.no_grad()
    def gather(self, tensors: Sequence[Tensor], out: Tensor) -> Tensor:
        """One tensor per parameter, copied to the head of `out`: (n, rows, columns)."""
        filled = out[: self.numel].view(self.shape)
        torch.cat(list(tensors), out=filled.flatten(0, 1))
        return filled

    def gather_values(self, out: Tensor) -> Tensor:
        """The parameters, (n, rows, columns)."""
        return self.gather(self.parameters, out)

    def gather_gradients(self, out: Tensor) -> Tensor:
        """Their gradients; a parameter that the loss did not reach gets one of zeros."""
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return self.gather([p.grad for p in self.parameters], out)

    def put_gradients(self, gradients: Tensor) -> None:
        """Copies (n, rows, columns) back into the gradients of A or B."""
        torch._foreach_copy_([p.grad for p in self.parameters], gradients.unbind())


class Triplets:
    """The triplets of adapter `adapter` in `layers`.

    Attributes:
        names: of the n matrices, in the order of the model.
        ranks: their ranks.
        A, B: stacks of matrices of one shape; those of rank 0 are left out.
        E: the stack of all E.
        stacks: all of them.
        numel: length of a flat vector.
        matrices: 2n, the number of A and B.
        largest: number of scalars of the largest stack.
    """

    def __init__(self, layers: Sequence[tuple[str, SVDLinear]], adapter: str) -> None:
        self.names = [name for name, _ in layers]
        self.layers = [layer for _, layer in layers]
        self.adapter = adapter
        found = [layer.triplets(adapter) for layer in self.layers]
        self.ranks = [len(E) for _, E, _ in found]
        self.numel = 0
        self.A, order_A = self._by_shape([A for A, _, _ in found], axis=2)
        self.B, order_B = self._by_shape([B for _, _, B in found], axis=1)
        self.E = self._stack([E for _, E, _ in found], (1, sum(self.ranks), 1), axis=2)
        self.stacks = [*self.A, *self.B, self.E]
        self.matrices = sum(stack.shape[0] for stack in (*self.A, *self.B))
        self.largest = max(stack.numel for stack in self.stacks)
        device = self.E.parameters[0].device
        if any(p.device != device for p in self.parameters()):
            raise NotImplementedError(
                "AdaLoRA ranks all components together, which needs its adapters on one device"
            )
        self._order = torch.tensor([order_A, order_B], device=device)

    def _stack(self, parameters: list[nn.Parameter], shape: tuple, axis: int) -> Stack:
        stack = Stack(parameters, shape, self.numel, axis)
        self.numel += stack.numel
        return stack

    def _by_shape(self, matrices: list[nn.Parameter], axis: int) -> tuple[list[Stack], list[int]]:
        """Stacks by shape; for every triplet in order its position among those of the stacks."""
        members: dict[tuple[int, ...], list[int]] = {}
        for i, matrix in enumerate(matrices):
            if self.ranks[i]:
                members.setdefault(tuple(matrix.shape), []).append(i)
        stacks, firsts, seen = [], {}, 0
        for shape, own in members.items():
            stacks.append(self._stack([matrices[i] for i in own], (len(own), *shape), axis))
            for i in own:
                firsts[i] = seen
                seen += self.ranks[i]
        order = [firsts[i] + k for i, rank in enumerate(self.ranks) for k in range(rank)]
        return stacks, order

    def parameters(self) -> list[nn.Parameter]:
        """All parameters, in the order of a flat vector."""
        return [p for stack in self.stacks for p in stack.parameters]

    def pool(self, scores: Iterable[Tensor]) -> Tensor:
        """One score per triplet, S = s(E) + mean s(A[k, :]) + mean s(B[:, k]), (Σr,) in order.

        Args:
            scores: of every scalar, one tensor (n, rows, columns) per stack.
        """
        means = [
            score.mean(stack.axis).flatten()
            for stack, score in zip(self.stacks, scores, strict=True)
        ]
        rows, columns = torch.cat(means[: len(self.A)]), torch.cat(means[len(self.A) : -1])
        return means[-1] + rows[self._order[0]] + columns[self._order[1]]

    def split(self, values: Tensor) -> list[Tensor]:
        """One value per triplet (Σr,) → per matrix, shaped as its E (r, 1)."""
        return list(values[:, None].split(self.ranks))
