"""The merged weight that evaluation uses, kept while nothing that it is made of has changed.

What tells of a change: the version and the address of every part, for ordinary writes. A *fused*
optimiser's step raises no version, so every step of any optimiser counts as a change. A write
through `.data` leaves no trace at all: layers drop the weight in every forward pass that records
gradients, in `train` and `eval`, in moves and in loads. A loop that writes through `.data` and does
none of these between two evaluations calls `train()` or `eval()` itself.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook


class _Steps:
    """Marks the time between two optimiser steps; listens from the first weight kept on."""

    def __init__(self) -> None:
        self.mark = object()  # another one after every step
        self._listening = False

    def listen(self) -> None:
        if not self._listening:
            register_optimizer_step_post_hook(self._stepped)
            self._listening = True

    def _stepped(self, *unused: object) -> None:
        self.mark = object()


_steps = _Steps()


Kept = tuple[tuple[Hashable, ...], Any]  # the state that the weight is of, the weight


def kept_weight(
    kept: Kept | None,
    parts: Sequence[Tensor],
    options: Hashable,
    form: Callable[[], Any],
) -> Kept | None:
    """The weight of this state of `parts`: `kept` where it is that, else formed anew.

    Args:
        kept: what the last call returned; None after something has dropped it.
        parts: the tensors that the weight is made of.
        options: what else it depends on.
        form: makes it, or whatever follows from it.

    Returns:
        None where changes of the parts cannot be told: compiled code, inference tensors.
    """
    if torch.compiler.is_compiling() or any(t.is_inference() for t in parts):
        return None
    _steps.listen()
    tensors = tuple((t.data_ptr(), t._version, t.dtype, t.device) for t in parts)
    state = (options, _steps.mark, tensors)
    return kept if kept is not None and kept[0] == state else (state, form())
