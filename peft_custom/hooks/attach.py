"""`attach`: one optimiser drives the hooks of every tuner in a model."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..config import PeftConfig
from ..protocols import AdapterHolder, AnyOptimizer, HookOwner
from ..tuners.base import BaseTuner
from ..tuners.tuner_layer import iter_adapters
from .base import TrainingHooks
from .finished import set_finished
from .owners import hooks_driving, note_attached, note_detached, owners_in
from .step_driver import StepDriver, unwrap_optimizer


class _Iterations:
    """Makes a function that returns iterators iterable, as often as asked."""

    def __init__(self, start: Callable[[], Iterator[Any]]) -> None:
        self.start = start

    def __iter__(self) -> Iterator[Any]:
        return self.start()


class AttachedHooks(TrainingHooks):
    """The hooks of all tuners in one model, driven by one optimiser; none of them costs nothing."""

    def __init__(
        self,
        optimizer: Optimizer,
        parts: list[tuple[HookOwner, TrainingHooks]],
        watched: Iterable[nn.Parameter],
    ) -> None:
        self.t = 0
        self.adapts = bool(parts)
        self.owners = [owner for owner, _ in parts]
        self.parts = [part for _, part in parts]
        self.total_steps = self.parts[0].total_steps if parts else 0
        self._driver: StepDriver | None = None
        self._began: list[tuple[BaseTuner, TrainingHooks, dict[str, PeftConfig]]] = []
        if not parts:
            return
        self._driver = StepDriver(
            optimizer, self.enter_step, self.before_step, self.after_step, self._rewind, watched
        )
        for owner, part in parts:
            if isinstance(owner, BaseTuner):
                part.adapters = owner.trained_configs()
                self._began.append((owner, part, _switched_on(owner)))
            note_attached(owner, self, part)
        self._begin()

    # --- driven by the optimiser ----------------------------------------------------------------
    @torch.no_grad()
    def before_clipping(self) -> None:
        """Every part's `before_clipping`; a loop that clips gradients may call it just before."""
        for part in self.parts:
            part.before_clipping()

    @torch.no_grad()
    def enter_step(self) -> None:
        """Every part's `enter_step`."""
        self._refuse_unprepared()
        self._refuse_switched()
        for part in self.parts:
            part.enter_step()

    @torch.no_grad()
    def before_step(self) -> None:
        """Every part's `before_step`, in the order of the tuners in the model."""
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
            set_finished(owner, part.finished, part.adapters)

    def _rewind(self) -> Callable[[], None]:
        state = copy.deepcopy(self.state_dict())  # live tensors go on changing
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
                several times, or a function that returns an iterator. `MicroBatch`es where an
                optimiser step has several.
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
            dataloader = _Iterations(dataloader)
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

    def _refuse_switched(self) -> None:
        """A schedule is of the adapters that trained when it began; others would not adapt."""
        for tuner, part, began in self._began:
            same = list(began) == tuner.trained_adapters and all(
                tuner.peft_config[name] is config for name, config in began.items()
            )
            if not same:
                now = ", ".join(map(repr, tuner.trained_adapters)) or "none"
                raise RuntimeError(
                    f"these hooks drive adapter {', '.join(map(repr, part.adapters))}, but the "
                    f"adapters set to train are now {now}: set_adapter back, or call "
                    "attach(model, optimizer, total_steps=…) for what is to train now"
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
        """Everything a resumed run needs, for `save_hooks_state`: tensors and JSON values."""
        return {
            "step": self.t,
            "total_steps": self.total_steps,
            "finished": self.finished,
            "parts": [
                {
                    "tuner": type(owner).__name__,
                    "adapters": list(part.adapters),
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
            adapters = list(part.adapters)
            if values.get("adapters", adapters) != adapters:  # older files do not say
                raise ValueError(
                    f"the saved hooks drove adapter {', '.join(values['adapters'])}, these drive "
                    f"{', '.join(adapters)}: activate what was trained, and attach again"
                )
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

    def read_between_passes(self) -> list[Tensor]:
        """Those of all parts."""
        return [weight for part in self.parts for weight in part.read_between_passes()]

    def remove(self) -> None:
        """Detaches from the optimiser; the model stays as it is. May be called again."""
        if self._driver is None:
            return
        self._driver.remove()
        self._driver = None
        for owner, part in zip(self.owners, self.parts, strict=True):
            set_finished(owner, part.finished, part.adapters)
            note_detached(owner)
            part.remove()


def _switched_on(tuner: BaseTuner) -> dict[str, PeftConfig]:
    return {name: tuner.peft_config[name] for name in tuner.trained_adapters}


def attach(
    model: nn.Module,
    optimizer: AnyOptimizer,
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
    owners = list(owners_in(model))
    watched = _adapter_parameters(model, owners, inner)
    for owner in owners:  # before new hooks are made: they find the model as `remove` leaves it
        earlier = hooks_driving(owner)
        if earlier is not None:
            earlier.remove()
    parts = []
    for owner in owners:
        part = owner.training_hooks(model, inner, total_steps, seed=seed, **schedule)
        if part is None:
            trained = owner.trained_configs() if isinstance(owner, BaseTuner) else ()
            set_finished(owner, True, trained)
        else:
            parts.append((owner, part))
    if schedule and not parts:
        raise TypeError(
            f"attach: {', '.join(schedule)} given, but nothing in this {type(model).__name__} "
            "adapts during training"
        )
    return AttachedHooks(inner, parts, watched)


def _adapter_parameters(
    model: nn.Module, owners: list[HookOwner], optimizer: Optimizer
) -> list[nn.Parameter]:
    """The model's trainable adapter parameters, all of which must be the optimiser's."""
    holders: list[AdapterHolder] = [layer for _, layer in iter_adapters(model)]
    holders += [owner for owner in owners if hasattr(type(owner), "adapter_parameters")]
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
