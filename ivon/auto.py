"""Sampling for loops that know nothing of it.

    forward (training)   weights ← m + noise, the draw of this step
    backward             gradients arrive; then noise·gradient is taken and weights ← m
    … more micro-batches of the step: the same draw, the same two changes …
    clipping, step       as always

The gradients of a step's micro-batches add up in `p.grad`, all at one draw, and the statistic is
computed anew from their sum after every backward pass. So clipping that follows does not touch it,
and nobody has to say which micro-batch was the last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable

if TYPE_CHECKING:
    from .optimizer import IVON


class AutoSampling:
    """Hooks on a model that sample an IVON's weights around forward and backward; see `IVON`."""

    def __init__(self, optimizer: IVON, model: nn.Module) -> None:
        self.optimizer, self.model = optimizer, model
        self._drawn = False  # this step's noise exists
        self._noisy = False  # the parameters are sampled now
        self._pending: set[object] = set()  # forward passes whose backward pass has not ended
        self._handles = [
            model.register_forward_pre_hook(self._before_forward),
            model.register_forward_hook(self._after_forward),
            model.register_state_dict_pre_hook(self._before_state_dict),
        ]

    def remove(self) -> None:
        """Leaves the weights at the mean and the model without hooks."""
        self.to_mean()
        for handle in self._handles:
            handle.remove()
        self.optimizer._auto = None

    def __deepcopy__(self, memo: dict[int, Any]) -> AutoSampling:
        return self  # a copy of the model is not sampled, and carries no copy of the optimiser

    @torch.no_grad()
    def to_mean(self) -> None:
        """Puts the mean into the parameters if they are sampled."""
        if self._noisy:
            for bucket in self.optimizer._buckets:
                bucket.restore()
            self._noisy = False

    def noise(self) -> list[Tensor]:
        """Copies of this step's noise, which another draw is about to overwrite."""
        return [b.noise.vector.clone() for b in self.optimizer._buckets] if self._drawn else []

    def forget(self) -> None:
        """The next forward pass begins a new step, with a new draw."""
        self.to_mean()
        self._drawn = False
        self._pending.clear()

    # --- forward --------------------------------------------------------------------------------
    @torch.compiler.disable
    def _before_forward(self, module: nn.Module, inputs: Any) -> None:
        training = module.training and torch.is_grad_enabled()
        if module is not self.model:
            if training:
                raise RuntimeError(
                    "auto_sample: a copy of the model is being trained (DataParallel, deepcopy); "
                    "use one process per device, or call auto_sample on the model that is trained"
                )
            return
        if self.optimizer._sampling:
            return  # a context of the caller's rules
        if not training:
            self.to_mean()
        elif not self._noisy:
            self._to_sample()

    @torch.no_grad()
    def _to_sample(self) -> None:
        optimizer = self.optimizer
        if optimizer._count and all(p.grad is None for p in optimizer._known):
            optimizer.zero_grad()  # model.zero_grad() has dropped the step
        buckets = optimizer._ready()
        if not self._drawn:
            optimizer._open_sample()
            optimizer._draw()
            self._drawn = True
        else:
            for bucket in buckets:
                bucket.read_mean()
        self._noisy = True
        for bucket in buckets:
            bucket.perturb()

    @torch.compiler.disable
    def _after_forward(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if not self._noisy or not torch.is_grad_enabled() or module is not self.model:
            return
        tensors = [t for t in _tensors(output) if t.requires_grad]
        if not tensors:
            self.to_mean()
            raise TypeError(
                f"auto_sample finds no tensor with a gradient in the model's output, a "
                f"{type(output).__name__}; open optimizer.sampled_params(train=True) in the loop"
            )
        seen_by = self._watcher()
        for tensor in tensors:
            tensor.register_hook(seen_by)

    def _before_state_dict(self, *unused: Any) -> None:
        self.to_mean()

    # --- backward -------------------------------------------------------------------------------
    def _watcher(self) -> Callable[[Tensor], None]:
        """A gradient hook for one forward pass's outputs, which notices the end of backward."""
        token = object()
        self._pending.add(token)
        queued = False

        def ended() -> None:
            nonlocal queued
            queued = False
            self._pending.discard(token)
            self._after_backward()

        def seen(gradient: Tensor) -> None:
            nonlocal queued
            if queued:
                return
            queued = True
            # DDP hands out averaged gradients in such a callback as well, queued later in the
            # backward pass than this one: queueing once more, from it, comes after.
            engine = Variable._execution_engine
            engine.queue_callback(lambda: engine.queue_callback(ended))

        return seen

    @torch.no_grad()
    def _after_backward(self) -> None:
        optimizer = self.optimizer
        if not self._drawn or optimizer._sampling:
            return
        approx = optimizer.hess_approx
        found = [b.collect(approx, 1, keep_noise=True) for b in optimizer._buckets]
        if any(found):
            optimizer._count = 1
        if not self._pending:
            self.to_mean()


def _tensors(output: Any) -> Iterator[Tensor]:
    """All tensors of a model's output: in tuples, lists, mappings, dataclasses."""
    if isinstance(output, Tensor):
        yield output
        return
    if isinstance(output, Mapping):
        parts: Any = output.values()
    elif isinstance(output, (list, tuple)):
        parts = output
    else:
        parts = getattr(output, "__dict__", {}).values()
    for part in parts:
        yield from _tensors(part)
