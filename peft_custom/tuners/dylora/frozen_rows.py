"""Rows of factors that an optimiser step must leave as they are, saved before and restored after.

An optimiser moves a whole tensor: rows without a gradient too, by momentum and weight decay. So
the rows that a step does not train are restored after it, in the factors and in every state tensor
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

Names = list[tuple[int, str]]  # (number of the parameter, its state, or "" for the value itself)


class NestedParameter(NamedTuple):
    """A factor whose dimension `dim` runs over the R components, or several times over them.

    Attributes:
        parameter: A (n R, in) or B (out, R).
        dim: 0 for A, 1 for B.
        nested: says which components a step trains.
    """

    parameter: nn.Parameter
    dim: int
    nested: NestedRank


class Kind(NamedTuple):
    """What tensors have in common that are stacked.

    Attributes:
        dim, largest: the dimension of the components, and R.
        frozen: ranges (first, last + 1) of components that the step does not train.
    """

    dim: int
    largest: int
    frozen: tuple[tuple[int, int], ...]
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


class FrozenRows:
    """Keeps the rows that a step at the sampled rank does not train.

    Args:
        optimizer: whose states count.
        parameters: the factors of all layers.
    """

    def __init__(self, optimizer: Optimizer, parameters: list[NestedParameter]) -> None:
        self.optimizer, self.parameters = optimizer, parameters
        self._saved: dict[Kind, tuple[Names, Tensor]] = {}

    def save(self) -> None:
        """Before the optimiser moves anything: copies the tensors."""
        self._saved = {
            kind: (names, torch.stack(tensors)) for kind, (names, tensors) in self._groups().items()
        }

    def restore(self) -> None:
        """After the step: trained rows stay as the step made them, frozen ones are put back.

        A state that the step has created starts from 0 in them.
        """
        for kind, (names, tensors) in self._groups().items():
            new = torch.stack(tensors)  # (k, *shape)
            old = self._before(kind, names, new)
            for first, end in kind.frozen:
                _components(new, kind, first, end).copy_(_components(old, kind, first, end))
            torch._foreach_copy_(tensors, list(new.unbind()))
        self._saved = {}

    def _groups(self) -> dict[Kind, tuple[Names, list[Tensor]]]:
        """Tensors with frozen rows, by what they have in common, with their names."""
        groups: dict[Kind, tuple[Names, list[Tensor]]] = defaultdict(lambda: ([], []))
        states = self.optimizer.state
        for number, (parameter, dim, nested) in enumerate(self.parameters):
            assert nested.sampled is not None
            (i, b), largest = nested.sampled, nested.largest
            frozen = tuple(pair for pair in ((0, i), (b, largest)) if pair[0] < pair[1])
            if not frozen or not parameter.requires_grad:
                continue
            shape = parameter.shape
            own = states[parameter] if parameter in states else {}
            for name, tensor in (("", parameter), *own.items()):
                if isinstance(tensor, Tensor) and tensor.shape == shape:
                    kind = Kind(dim, largest, frozen, shape, tensor.dtype, tensor.device)
                    names, tensors = groups[kind]
                    names.append((number, name))
                    tensors.append(tensor)
        return groups

    def _before(self, kind: Kind, names: Names, new: Tensor) -> Tensor:
        """The saved stack in the order of `names`, 0 for a tensor that was not there."""
        saved_names, stack = self._saved.get(kind, ([], None))
        if saved_names == names:
            assert stack is not None
            return stack
        place = {name: index for index, name in enumerate(names)}
        old = torch.zeros_like(new)
        for index, name in enumerate(saved_names):
            if name in place:
                old[place[name]] = stack[index]
        return old


def _components(stack: Tensor, kind: Kind, first: int, end: int) -> Tensor:
    """The components first … end - 1 of every tensor in the stack (k, *shape), a view."""
    # A has R rows for each of n segments: n blocks of R along its dimension; B has one.
    blocks = stack.unflatten(kind.dim + 1, (-1, kind.largest))
    return blocks.narrow(kind.dim + 2, first, end - first)
