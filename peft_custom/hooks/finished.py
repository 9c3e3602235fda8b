"""Whether an adapter has its final form; within its schedule it is unfinished."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

from ..config import PeftConfig
from ..protocols import HookOwner
from ..tuners.base import BaseTuner
from .base import TrainingHooks
from .owners import own_hooks


def set_finished(owner: HookOwner, finished: bool, adapters: Iterable[str] | None = None) -> None:
    """Records on a tuner which adapters have their final form, or have it no more.

    Args:
        owner: the tuner; of anything else nothing is recorded.
        finished: whether they have.
        adapters: their names; None takes the active ones.
    """
    if isinstance(owner, BaseTuner):
        names = owner.active_adapters if adapters is None else adapters
        owner.finished_adapters.update(dict.fromkeys(names, finished))


def schedule_finished(tuner: BaseTuner, adapter: str | None = None) -> bool:
    """Whether an adapter (default: every active one) has its final form; for saving and export.

    True for a tuner that does not adapt. Else the answer of the hooks that drive the adapter, or
    did last; False for an adapter that was never driven.
    """
    if getattr(type(tuner), "training_hooks", None) is BaseTuner.training_hooks:
        return True
    if adapter is None:
        return all(schedule_finished(tuner, name) for name in tuner.active_adapters)
    if hasattr(type(tuner), "adapts") and not tuner.adapts(adapter):
        return True  # a method that adapts by some options only
    hooks = _hooks_of(tuner, adapter)
    return tuner.finished_adapters.get(adapter, False) if hooks is None else hooks.finished


def _hooks_of(tuner: BaseTuner, adapter: str) -> TrainingHooks | None:
    """The tuner's part of live hooks, where it drives this adapter."""
    hooks = own_hooks(tuner)
    driven = hooks is not None and hooks.adapters.get(adapter) is tuner.peft_config[adapter]
    return hooks if driven else None


def warn_if_unfinished(tuner: BaseTuner, config: PeftConfig, adapter: str) -> None:
    """Warns before an unfinished adapter is written, and records its state in the configuration.

    Args:
        tuner: the tuner of the saved adapter.
        config: what goes into the file; `finished` is set where it has that field.
        adapter: its name.
    """
    finished = schedule_finished(tuner, adapter)
    if hasattr(config, "finished"):
        config.finished = finished
    if not finished:
        hooks = _hooks_of(tuner, adapter)
        how = (
            f"its schedule is at step {hooks.t} of {hooks.total_steps}"
            if hooks is not None
            else "no optimiser has driven it to its end: attach(model, optimizer, total_steps=…)"
        )
        warnings.warn(
            f"saving an adapter of {type(tuner).__name__} that has not its final form: {how}",
            stacklevel=3,
        )
