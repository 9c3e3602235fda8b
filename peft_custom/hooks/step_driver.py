"""Calls a function before and one after every applied step of a `torch.optim.Optimizer`.

What stands between `optimizer.step()` and "one applied step with final gradients":

* GradScaler and an ordinary optimiser: an overflowing step is never called.
* GradScaler and `fused=True`: the step is called, skips itself when it overflows, and gets scaled
  gradients. `found_inf` is read here, and the gradients are unscaled before the hooks see them.
* A closure: gradients appear within the step. `before` runs after every evaluation; all but the
  last are undone.
* A subclass that calls `super().step()`: torch fires both steps' hooks; the outer call counts.
* A copied or second optimiser would step the same parameters without hooks: it raises.
"""

from __future__ import annotations

import sys
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ..protocols import AnyOptimizer

Action = Callable[[], None]


def unwrap_optimizer(optimizer: AnyOptimizer) -> Optimizer:
    """The innermost `torch.optim.Optimizer`: accelerate and its like keep it in `.optimizer`."""
    while isinstance(getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"attach needs a torch.optim.Optimizer (or a wrapper with one in `.optimizer`), not a "
            f"{type(optimizer).__name__}"
        )
    return optimizer


class StepDriver:
    """Drives `before` and `after` from an optimiser's own step hooks, until `remove`.

    Args:
        optimizer: the innermost optimiser.
        enter: called once per step, before the optimiser and its closure do anything.
        before: called when the gradients are final (unscaled, clipped).
        after: called when the parameters have moved; not for skipped steps.
        rewind: returns a function that undoes a call of `before` made after it.
        watched: parameters that no other optimiser may step meanwhile.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        enter: Action,
        before: Action,
        after: Action,
        rewind: Callable[[], Action],
        watched: Iterable[nn.Parameter],
    ) -> None:
        self.optimizer = optimizer
        self.watched = {id(parameter): parameter for parameter in watched}
        self._enter, self._before, self._after, self._rewind = enter, before, after, rewind
        self._frame: FrameType | None = None  # the outermost step call under way
        self._skipped = False
        self._ready = False  # `before` has run for the step under way
        self._handles = [
            optimizer.register_step_pre_hook(self._pre),
            optimizer.register_step_post_hook(self._post),
        ]
        _watch(self)

    def remove(self) -> None:
        """Takes the hooks off the optimiser."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        _unwatch(self)

    def _pre(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self._frame is not None and _running(self._frame):
            return None  # a subclass's step has called its parent's
        self._frame = sys._getframe(1)
        self._ready = False
        self._skipped = _skips_itself(optimizer, kwargs)
        if self._skipped:
            return None
        self._enter()
        closure = args[1] if len(args) > 1 else kwargs.get("closure")  # args[0] is the optimiser
        if not callable(closure):
            self._before()
            self._ready = True
            return None
        closure = self._wrapped(closure)
        if len(args) > 1:
            return (args[0], closure, *args[2:]), kwargs
        return args, {**kwargs, "closure": closure}

    def _wrapped(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """The closure, then `before`; an evaluation that was not the last leaves no trace."""
        undo: Action | None = None

        def evaluate() -> Any:
            nonlocal undo
            if undo is not None:
                undo()
            loss = closure()
            undo = self._rewind()
            self._before()
            self._ready = True
            return loss

        return evaluate

    def _post(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if sys._getframe(1) is not self._frame:
            return
        self._frame = None
        if self._skipped:
            return
        if not self._ready:
            raise RuntimeError(
                f"{type(optimizer).__name__}.step did not evaluate the closure it was given, so "
                "the attached hooks never saw gradients; compute them before and call step() alone"
            )
        self._after()


def _running(frame: FrameType) -> bool:
    """Whether `frame` is on the current call stack; it is not when its step has raised."""
    caller: FrameType | None = sys._getframe(1)
    while caller is not None and caller is not frame:
        caller = caller.f_back
    return caller is not None


@torch.no_grad()
def _skips_itself(optimizer: Optimizer, kwargs: dict[str, Any]) -> bool:
    """Whether a fused optimiser will find inf or NaN and do nothing; else unscales its gradients.

    A GradScaler leaves `found_inf` and, for gradients still multiplied by the scale, `grad_scale`
    on an optimiser that does the unscaling within its step.
    """
    if kwargs.get("grad_scaler") is not None:
        raise RuntimeError(
            f"{type(optimizer).__name__} unscales gradients within its own step and does not say "
            "whether it skips, so hooks cannot follow it under a GradScaler; train in bfloat16, or "
            "use an optimiser of torch.optim"
        )
    found = getattr(optimizer, "found_inf", None)
    if found is None:
        return False
    if bool(found):
        return True
    scale = getattr(optimizer, "grad_scale", None)
    if scale is not None:
        by_device: dict[torch.device, list[Tensor]] = defaultdict(list)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_device[parameter.grad.device].append(parameter.grad)
        inverse = torch.as_tensor(scale).double().reciprocal().float()
        for device, gradients in by_device.items():
            torch._foreach_mul_(gradients, inverse.to(device))
        optimizer.grad_scale = None  # type: ignore[attr-defined]  # the kernel must not repeat it
    return False


# --- no other optimiser may step what a driver watches --------------------------------------------
_drivers: weakref.WeakSet[StepDriver] = weakref.WeakSet()
_handles: list[Any] = []  # the one hook common to all optimisers, while anything is driven


def _watch(driver: StepDriver) -> None:
    _drivers.add(driver)
    if not _handles:
        _handles.append(register_optimizer_step_pre_hook(_refuse_strangers))


def _unwatch(driver: StepDriver) -> None:
    _drivers.discard(driver)
    if not _drivers:
        while _handles:
            _handles.pop().remove()


def _refuse_strangers(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for driver in _drivers:
        if driver.optimizer is optimizer:
            continue
        # Looked at in every step: groups and parameters may be added to an optimiser at any time.
        if any(
            id(p) in driver.watched for group in optimizer.param_groups for p in group["params"]
        ):
            raise RuntimeError(
                f"this {type(optimizer).__name__} steps adapter parameters whose hooks are "
                "attached to another optimiser (a copy of an optimiser has no hooks): the adapter "
                "would not adapt. Call attach(model, optimizer, …) with the optimiser you step, "
                "or hooks.remove() first"
            )
