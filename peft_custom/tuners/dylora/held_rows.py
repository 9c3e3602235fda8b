"""Rows of factors that an optimiser step must leave as they are, kept aside and put back.

An optimiser moves a whole tensor: rows without a gradient too, by momentum and weight decay. So
the rows that a step does not train are put back after it, in the factors and in every state tensor
of the optimiser that has a factor's shape (Adam's moments, SGD's momentum). Tensors of one shape
are stacked, so that a step costs a few operations however many layers there are.

What an optimiser counts for the whole tensor (Adam's step, for its bias correction) goes on, and
states of other shapes (Adafactor's, IVON's flat ones) are its own affair.
"""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from loralib.dylora import NestedRank


class Factor(NamedTuple):
    """A parameter whose dimension `dim` runs over the R components, or several times over them."""

    parameter: nn.Parameter
    dim: int
    nested: NestedRank


class HeldRows:
    """Holds the rows that a step at the drawn rank does not train.

    Args:
        optimizer: whose states count.
        factors: of all layers.
    """

    def __init__(self, optimizer: Optimizer, factors: list[Factor]) -> None:
        self.optimizer, self.factors = optimizer, factors
        self._held: dict[tuple, tuple[list, Tensor]] = {}

    def keep(self) -> None:
        """Before the step: copies the tensors."""
        self._held = {
            key: (names, torch.stack(tensors)) for key, (names, tensors) in self._groups().items()
        }

    def put_back(self) -> None:
        """After the step: what the step made of other rows stays, these are put back.

        A state that the step has created starts from 0 in them.
        """
        for key, (names, tensors) in self._groups().items():
            dim, largest, idle = key[:3]
            new = torch.stack(tensors)
            old = self._old(key, names, new)
            for first, last in idle:
                _components(new, dim, largest, first, last).copy_(
                    _components(old, dim, largest, first, last)
                )
            torch._foreach_copy_(tensors, list(new.unbind()))
        self._held = {}

    def _groups(self) -> dict[tuple, tuple[list, list[Tensor]]]:
        """Tensors that can be stacked, with their names: (number of the factor, state or "")."""
        groups: dict[tuple, tuple[list, list[Tensor]]] = defaultdict(lambda: ([], []))
        states = self.optimizer.state
        for number, (parameter, dim, nested) in enumerate(self.factors):
            assert nested.sampled is not None
            (i, b), largest = nested.sampled, nested.largest
            idle = tuple(pair for pair in ((0, i), (b, largest)) if pair[0] < pair[1])
            if not idle or not parameter.requires_grad:
                continue
            shape = parameter.shape
            own = states[parameter] if parameter in states else {}
            for name, tensor in (("", parameter), *own.items()):
                if isinstance(tensor, Tensor) and tensor.shape == shape:
                    key = dim, largest, idle, shape, tensor.dtype, tensor.device
                    names, tensors = groups[key]
                    names.append((number, name))
                    tensors.append(tensor)
        return groups

    def _old(self, key: tuple, names: list, new: Tensor) -> Tensor:
        """The kept stack, in the order of `names`."""
        kept, stack = self._held.get(key, ([], None))
        if kept == names:
            assert stack is not None
            return stack
        place = {name: index for index, name in enumerate(names)}
        old = torch.zeros_like(new)
        for index, name in enumerate(kept):
            if name in place:
                old[place[name]] = stack[index]
        return old


def _components(stack: Tensor, dim: int, largest: int, first: int, last: int) -> Tensor:
    """The components first … last along dimension `dim` of every tensor in the stack, a view."""
    blocks = stack.unflatten(dim + 1, (-1, largest))  # several where segments have their own A
    return blocks.narrow(dim + 2, first, last - first)
