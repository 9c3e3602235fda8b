"""How an adaptive method rides on the optimiser: attached once, driven by every applied step.

    hooks = peft_custom.attach(model, optimizer, total_steps=T)
    hooks.prepare(loader, lambda batch: model(**batch).loss)   # methods that look at data first
    for batch in loader:
        model(**batch).loss.backward()
        optimizer.step()                                       # before_step, the update, after_step
        optimizer.zero_grad()

Rules every loop can rely on:

* One applied optimiser step is one step t = 0, 1, … of the schedule, however many micro-batches
  made its gradient. The counter is the hooks' own. A step that a GradScaler skips is no step.
* Hooks sit on the innermost `torch.optim.Optimizer`, so they survive `accelerator.prepare` and
  `load_state_dict`. A copy of an optimiser has no hooks: stepping one raises.
* All trainable adapter parameters of `model` belong to that one optimiser. Where several optimisers
  train parts of a model, attach each part to its own. Attaching again starts a new schedule.
* Past `total_steps` training goes on with the schedule's end state (`fraction` stays 1), after a
  warning.
* The loss the model returns stays the task loss: regularisers add their gradient in `before_step`.
"""

from __future__ import annotations

import copy
import math
import operator
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .step_driver import StepDriver, unwrap_optimizer
from .tuners.base import BaseTuner, iter_adapters, iter_tuners

__all__ = [
    "TrainingHooks",
    "attach",
    "attached_hooks",
    "set_finished",
    "warn_if_unfinished",
    "refuse_if_attached",
    "schedule_finished",
]


class TrainingHooks:
    """What a tuner does around every applied optimiser step; the base class does nothing.

    A tuner overrides what it needs and returns an instance from `BaseTuner.training_hooks`. The
    order in step t: `begin_step`, forward and backward passes, `before_step`, the optimiser's
    update, `after_step`; then t grows by one. All three hooks run without gradient recording.

    Attributes:
        t: index of the current step, 0-based; in `after_step` still that of the step just applied.
        total_steps: T, the length of the schedule in applied steps.
        schedule: lengths resolved by `steps`, by name; saved and restored.
        prepared: `prepare` has run; saved and restored.
        seed: for draws from `peft_custom.rng` with t as the counter.
    """

    requires_prepare: ClassVar[bool] = False
    adapts: bool = True  # False for the hooks of a model in which nothing does

    def __init__(self, total_steps: int | None, *, seed: int = 0) -> None:
        self.total_steps = _whole_steps(total_steps)
        self.t = 0
        self.seed = seed
        self.schedule: dict[str, int] = {}
        self.prepared = False

    # --- what a method implements ---------------------------------------------------------------
    def prepare(self, dataloader: Iterable[Any], forward_loss: Callable[[Any], Tensor]) -> None:
        """Looks at data before the first step (with `requires_prepare = True`); not after a resume.

        Args:
            dataloader: batches, this process's share of them; can be gone through again.
            forward_loss: batch → scalar task loss, with a graph.
        """

    def begin_step(self) -> None:
        """Sets up the forward passes of step t, as a function of t and the state alone.

        Called on attaching, after every applied step and after loading a state: a rank drawn from
        (seed, t), a temperature. Calling it twice must be the same as once.
        """

    def before_step(self) -> None:
        """Gradients are final (reduced, unscaled, clipped): take statistics, add gradients."""

    def after_step(self) -> None:
        """Parameters have moved: masks, rank allocation, rows to put back."""

    def losses(self) -> dict[str, float]:
        """Values of the extra loss terms, for logs."""
        return {}

    def log(self) -> dict[str, float]:
        """Budget, ranks, density, temperature and the like, for logs."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs beside the model and the optimiser: tensors and JSON values.

        `t`, `schedule` and `prepared` are saved without being listed here.
        """
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` returned; copies tensors it goes on writing to."""

    def remove(self) -> None:
        """Leaves the model as it is and stops adapting."""

    @property
    def finished(self) -> bool:
        """Whether the adapter has its final form; before that, what is saved is unfinished."""
        return self.t >= self.total_steps

    # --- what a method uses ---------------------------------------------------------------------
    @property
    def fraction(self) -> float:
        """t/T, at most 1."""
        return min(self.t / self.total_steps, 1.0)

    def steps(self, name: str, length: int | float) -> int:
        """Resolves a length of the schedule once: a float is a fraction of T, an int counts steps.

        Args:
            name: the option's name, for errors and for `schedule[name]`.
            length: 0.1 for a tenth of training, 100 for a hundred steps.
        """
        if isinstance(length, bool) or not isinstance(length, (int, float)):
            raise TypeError(f"{name}={length!r}: give steps (100) or a fraction of training (0.1)")
        if isinstance(length, float):
            if not 0.0 <= length <= 1.0:
                raise ValueError(
                    f"{name}={length!r}: a fraction of training is from 0.0 to 1.0; a number of "
                    f"steps is a whole number, such as {name}=100"
                )
            length = math.floor(length * self.total_steps + 0.5)
        elif not 0 <= length <= self.total_steps:
            raise ValueError(
                f"{name}={length!r}: must be from 0 to total_steps={self.total_steps}, or a "
                "fraction of training such as 0.1"
            )
        self.schedule[name] = length
        return length

    def __enter__(self) -> TrainingHooks:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()


def _whole_steps(total_steps: Any) -> int:
    """`total_steps` as a positive int, or the error that says what it is for."""
    try:
        steps = operator.index(total_steps)
    except TypeError:
        steps = 0
    if steps <= 0 or isinstance(total_steps, bool):
        raise ValueError(
            f"total_steps={total_steps!r}: this adapter adapts while it trains, so it must know "
            "how many optimiser steps there will be: epochs × ⌈batches / accumulation⌉, say"
        )
    return steps


class _Again:
    """What a function that returns iterators iterates over, as often as asked."""

    def __init__(self, start: Callable[[], Iterator[Any]]) -> None:
        self.start = start

    def __iter__(self) -> Iterator[Any]:
        return self.start()


class AttachedHooks(TrainingHooks):
    """The hooks of all tuners in one model, driven by one optimiser; none of them costs nothing."""

    def __init__(
        self,
        optimizer: Optimizer,
        parts: list[tuple[Any, TrainingHooks]],
        watched: Iterable[nn.Parameter],
    ) -> None:
        self.t = 0
        self.adapts = bool(parts)
        self.owners = [owner for owner, _ in parts]
        self.parts = [part for _, part in parts]
        self.total_steps = self.parts[0].total_steps if parts else 0
        self._driver: StepDriver | None = None
        if not parts:
            return
        self._driver = StepDriver(
            optimizer, self.before_step, self.after_step, self._rewind, watched
        )
        for owner in self.owners:
            _attached[owner] = weakref.ref(self)
        self._begin()

    # --- driven by the optimiser ----------------------------------------------------------------
    @torch.no_grad()
    def before_step(self) -> None:
        """Every part's `before_step`, in the order of the tuners in the model."""
        self._refuse_unprepared()
        if self.parts and self.t == self.total_steps:
            warnings.warn(
                f"training goes on past total_steps={self.total_steps}: the schedule has ended "
                "and its end state stays; attach with the real number of steps",
                stacklevel=2,
            )
        for part in self.parts:
            part.before_step()

    @torch.no_grad()
    def after_step(self) -> None:
        """Every part's `after_step`; t grows; every part's `begin_step`."""
        for part in self.parts:
            part.after_step()
        self._move_to(self.t + 1)
        self._begin()

    def _move_to(self, t: int) -> None:
        self.t = t
        for part in self.parts:
            part.t = t

    @torch.no_grad()
    def _begin(self) -> None:
        for owner, part in zip(self.owners, self.parts, strict=True):
            if part.prepared or not part.requires_prepare:
                part.begin_step()
            set_finished(owner, part.finished)

    def _rewind(self) -> Callable[[], None]:
        state = copy.deepcopy(self.state_dict())
        return lambda: self._load(state)

    # --- preparation ----------------------------------------------------------------------------
    @property
    def requires_prepare(self) -> bool:  # type: ignore[override]
        """Whether `prepare` has work to do."""
        return any(part.requires_prepare and not part.prepared for part in self.parts)

    @property
    def prepared(self) -> bool:  # type: ignore[override]
        """Whether a step may be taken."""
        return not self.requires_prepare

    def prepare(
        self,
        dataloader: Iterable[Any] | Callable[[], Iterator[Any]],
        forward_loss: Callable[[Any], Tensor],
    ) -> None:
        """Lets the tuners that ask for it look at data; does nothing where none does, or again.

        Args:
            dataloader: batches, as the training loop sees them: something that can be gone through
                several times, or a function that returns an iterator.
            forward_loss: batch → scalar task loss: `lambda batch: model(**batch).loss`.
        """
        if not self.requires_prepare:
            return
        if isinstance(dataloader, Iterator):
            raise TypeError(
                f"prepare may go through the data several times, but a {type(dataloader).__name__} "
                "is used up after once: give the DataLoader, a list, or a function that returns "
                "the iterator"
            )
        if not isinstance(dataloader, Iterable):
            dataloader = _Again(dataloader)
        for part in self.parts:
            if part.requires_prepare and not part.prepared:
                part.prepare(dataloader, forward_loss)
                part.prepared = True
        self._begin()

    def _refuse_unprepared(self) -> None:
        if self.requires_prepare:
            waiting = ", ".join(
                type(owner).__name__
                for owner, part in zip(self.owners, self.parts, strict=True)
                if part.requires_prepare and not part.prepared
            )
            raise RuntimeError(
                f"{waiting} looks at data before its first step: call hooks.prepare(dataloader, "
                "lambda batch: model(**batch).loss) after attach"
            )

    # --- reports ----------------------------------------------------------------------------------
    def _merged(self, reports: list[dict[str, float]]) -> dict[str, float]:
        if len(reports) == 1:
            return dict(reports[0])
        return {
            f"{i}.{key}": value for i, report in enumerate(reports) for key, value in report.items()
        }

    def losses(self) -> dict[str, float]:
        """Values of the extra loss terms; names get a tuner number where there are several."""
        return self._merged([part.losses() for part in self.parts])

    def log(self) -> dict[str, float]:
        """What the tuners report; names get a tuner number where there are several."""
        return self._merged([part.log() for part in self.parts])

    @property
    def finished(self) -> bool:
        """Whether every adapter has its final form; true where nothing adapts."""
        return all(part.finished for part in self.parts)

    # --- resuming -------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs: tensors and JSON values (`hook_files` writes them)."""
        return {
            "step": self.t,
            "total_steps": self.total_steps,
            "finished": self.finished,
            "parts": [
                {
                    "tuner": type(owner).__name__,
                    "schedule": dict(part.schedule),
                    "prepared": part.prepared,
                    "state": part.state_dict(),
                }
                for owner, part in zip(self.owners, self.parts, strict=True)
            ],
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where the saved hooks were; load the model's and the optimiser's state as well.

        Raises:
            ValueError: the state is of other tuners, or of a schedule of another length.
        """
        tuners = [type(owner).__name__ for owner in self.owners]
        saved = [part["tuner"] for part in state["parts"]]
        if tuners != saved:
            raise ValueError(
                f"the saved hooks are those of {saved or 'a model in which nothing adapts'}, but "
                f"this model has {tuners or 'nothing that adapts'}"
            )
        if state["total_steps"] != self.total_steps:
            raise ValueError(
                f"the saved schedule is one of total_steps={state['total_steps']}, but these hooks "
                f"were attached with {self.total_steps}: attach with the saved number (training "
                "may go on past it), or start a new schedule by not loading the hooks"
            )
        for part, values in zip(self.parts, state["parts"], strict=True):
            if part.schedule != values["schedule"]:
                raise ValueError(
                    f"the saved schedule has {values['schedule']}, but the options given now make "
                    f"{part.schedule} of total_steps={self.total_steps}: resume with the same "
                    "options"
                )
        self._load(state)
        self._begin()

    def _load(self, state: dict[str, Any]) -> None:
        self._move_to(int(state["step"]))
        for part, values in zip(self.parts, state["parts"], strict=True):
            part.prepared = values["prepared"]
            part.load_state_dict(values["state"])

    def remove(self) -> None:
        """Detaches from the optimiser; the model stays as it is. May be called again."""
        if self._driver is None:
            return
        self._driver.remove()
        self._driver = None
        for owner, part in zip(self.owners, self.parts, strict=True):
            set_finished(owner, part.finished)
            _attached.pop(owner, None)
            part.remove()


# --- which tuner is attached ----------------------------------------------------------------------
# Beside the modules rather than on them: a deep copy of a model is not driven by the optimiser.
_attached: weakref.WeakKeyDictionary[Any, weakref.ref[AttachedHooks]] = weakref.WeakKeyDictionary()


# Functions from a model to owners of layers that no tuner injected; equal calls give equal owners.
owner_finders: list[Callable[[nn.Module], Iterable[Any]]] = []


def _owners(model: nn.Module) -> Iterator[Any]:
    """Tuners in `model`, then other modules whose class brings `training_hooks`, then the found."""
    tuners = list(iter_tuners(model))
    yield from tuners
    for module in model.modules():
        if callable(getattr(type(module), "training_hooks", None)) and module not in tuners:
            yield module
    for find in owner_finders:
        yield from find(model)


def attached_hooks(model: nn.Module) -> TrainingHooks | None:
    """The live hooks that drive a tuner (or the first driven tuner in a model); None without."""
    return next((hooks for hooks in map(_driving, _owners(model)) if hooks is not None), None)


def _driving(owner: Any) -> AttachedHooks | None:
    reference = _attached.get(owner)
    return None if reference is None else reference()


def refuse_if_attached(tuner: nn.Module, call: str = "update_and_allocate") -> None:
    """Raises where an optimiser drives the tuner: a manual call would adapt twice per step."""
    if attached_hooks(tuner) is not None:
        raise RuntimeError(
            f"{call} was called, but the optimiser this {type(tuner).__name__} is attached to does "
            f"that at every step; take the call out of the loop, or call hooks.remove() first"
        )


def set_finished(tuner: Any, finished: bool) -> None:
    """Notes on a tuner whether its adapter has its final form, as a file says it does."""
    if getattr(tuner, "_schedule_finished", None) is not finished:
        tuner._schedule_finished = finished


def schedule_finished(tuner: Any) -> bool:
    """Whether the tuner's adapter has its final form; for `save_pretrained` and export.

    True for a tuner that does not adapt. Else what the attached hooks say, or said when they were
    removed; False for an adapting tuner that was never driven.
    """
    if getattr(type(tuner), "training_hooks", None) is BaseTuner.training_hooks:
        return True
    hooks = attached_hooks(tuner)
    if isinstance(hooks, AttachedHooks) and tuner in hooks.owners:
        return hooks.parts[hooks.owners.index(tuner)].finished
    return bool(getattr(tuner, "_schedule_finished", False))


def warn_if_unfinished(tuner: Any, config: Any) -> None:
    """Before an adapter is written: an unfinished one warns and gets `finished: false`.

    Args:
        tuner: whose adapter is saved.
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


def attach(
    model: nn.Module,
    optimizer: Any,
    total_steps: int | None = None,
    *,
    seed: int = 0,
    **schedule: Any,
) -> TrainingHooks:
    """Lets the optimiser drive every tuner of `model` that adapts during training.

    Args:
        model: any module: ours, PEFT-style, Hugging Face's, wrapped in DDP or compiled.
        optimizer: a `torch.optim.Optimizer`, or accelerate's wrapper around one.
        total_steps: applied optimiser steps of the whole training, for tuners that adapt.
        seed: of the draws made while training; the same on all processes.
        schedule: options that the tuner's `training_hooks` takes.

    Returns:
        The hooks; where nothing adapts, an object of the same interface on which nothing happens.

    Raises:
        ValueError: a trainable adapter parameter is not the optimiser's; total_steps is missing.
    """
    inner = unwrap_optimizer(optimizer)
    owners = list(_owners(model))
    watched = _adapter_parameters(model, owners, inner)
    for owner in owners:
        earlier = _driving(owner)
        if earlier is not None:
            earlier.remove()
    parts = []
    for owner in owners:
        part = owner.training_hooks(model, inner, total_steps, seed=seed, **schedule)
        if part is None:
            set_finished(owner, True)
        else:
            parts.append((owner, part))
    if schedule and not parts:
        raise TypeError(
            f"attach: {', '.join(schedule)} given, but nothing in this {type(model).__name__} "
            "adapts during training"
        )
    return AttachedHooks(inner, parts, watched)


def _adapter_parameters(
    model: nn.Module, owners: list[Any], optimizer: Optimizer
) -> list[nn.Parameter]:
    """The model's trainable adapter parameters, all of which must be the optimiser's."""
    holders = [layer for _, layer in iter_adapters(model)]
    holders += [owner for owner in owners if "adapter_parameters" in vars(type(owner))]
    adapters = {
        id(parameter)
        for holder in holders
        for parameter in holder.adapter_parameters()
        if parameter.requires_grad
    }
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    found = [(name, p) for name, p in model.named_parameters() if id(p) in adapters]
    missing = [name for name, p in found if id(p) not in known]
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise ValueError(
            f"the optimiser does not have these adapter parameters: {', '.join(missing[:5])}{more}"
            "; create it after the adapter, from model.parameter_groups(lr, weight_decay) or from "
            "all parameters that require gradients"
        )
    return [p for _, p in found]
