"""Whether an adapter has its final form; within its schedule it is unfinished."""

from __future__ import annotations

import warnings

from ..config import PeftConfig
from ..protocols import HookOwner
from ..tuners.base import BaseTuner
from .owners import attached_hooks, own_hooks


def set_finished(owner: HookOwner, finished: bool) -> None:
    """Records on a tuner whether its adapter has its final form."""
    # the comparison first: setting an attribute of a module is slow, and this runs at every step
    if getattr(owner, "_schedule_finished", None) is not finished:
        owner._schedule_finished = finished


def schedule_finished(tuner: BaseTuner) -> bool:
    """Whether the tuner's adapter has its final form; for `save_pretrained` and export.

    True for a tuner that does not adapt. Else the answer of the attached hooks, or of those
    attached last; False for an adapting tuner that was never driven.
    """
    if getattr(type(tuner), "training_hooks", None) is BaseTuner.training_hooks:
        return True
    hooks = own_hooks(tuner)
    if hooks is not None:
        return hooks.finished
    return bool(getattr(tuner, "_schedule_finished", False))


def warn_if_unfinished(tuner: BaseTuner, config: PeftConfig) -> None:
    """Warns before an unfinished adapter is written, and records its state in the configuration.

    Args:
        tuner: the tuner of the saved adapter.
        config: what goes into the file; `finished` is set where it has that field.
    """
    finished = schedule_finished(tuner)
    if hasattr(config, "finished"):
        config.finished = finished
    if not finished:
        hooks = attached_hooks(tuner)
        how = (
            f"its schedule is at step {hooks.t} of {hooks.total_steps}"
            if hooks is not None
            else "no optimiser has driven it to its end: attach(model, optimizer, total_steps=…)"
        )
        warnings.warn(
            f"saving an adapter of {type(tuner).__name__} that has not its final form: {how}",
            stacklevel=3,
        )
