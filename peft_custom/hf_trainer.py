"""`TunerCallback`: the Hugging Face `Trainer` drives adaptive tuners.

    from peft_custom.hf_trainer import TunerCallback
    Trainer(model=model, args=args, train_dataset=data, callbacks=[TunerCallback()]).train()

After `hf_models.patch_transformers()` every `Trainer` brings it along. `transformers` is imported
when the name is first used, never with the package.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .distributed import world_size
from .hf_adapted import adapters_of, load_trained, save_trained
from .hooks import (
    MicroBatch,
    TrainingHooks,
    attach,
    load_hooks_state,
    save_hooks_state,
    saved_token,
)
from .protocols import AnyOptimizer
from .tuners.base import iter_tuners

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

NAME = "TunerCallback"
IGNORED = -100  # a label that no loss counts


class _Callback:
    """The events; the class users see also inherits from the Trainer's own base classes.

    Args:
        seed: of the hooks' draws; None takes `TrainingArguments.seed`.
        checkpoint: the folder to resume from, needed only where it was moved after it was written.
        schedule: options for `attach`, JSON values.
    """

    def __init__(
        self, seed: int | None = None, checkpoint: str | None = None, **schedule: Any
    ) -> None:
        super().__init__()
        self.seed = seed
        self.checkpoint = None if checkpoint is None else os.fspath(checkpoint)
        self.schedule = schedule
        self.hooks: TrainingHooks | None = None
        self.saved: dict[str, str] = {}  # the token of the last save and the folder it went to
        self._output_dir = ""
        self._state: TrainerState | None = None

    def state(self) -> dict[str, Any]:
        """For `trainer_state.json`, asked just before `on_save`: where the hooks' state will be."""
        if self._state is not None:
            folder = _checkpoint(self._output_dir, self._state.global_step)
            self.saved = {"token": os.urandom(8).hex(), "folder": str(folder.resolve())}
        return {
            "args": {"seed": self.seed, "checkpoint": self.checkpoint, **self.schedule},
            "attributes": {"saved": self.saved},
        }

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: AnyOptimizer | None = None,
        train_dataloader: Iterable[Any] | None = None,
        **unused: Any,
    ) -> None:
        """Attaches; then goes on where a checkpoint was, or lets methods look at data."""
        assert model is not None and optimizer is not None
        seed = args.seed if self.seed is None else self.seed
        self._output_dir, self._state = args.output_dir, state
        self.hooks = attach(model, optimizer, state.max_steps, seed=seed, **self.schedule)
        if not self.hooks.adapts:
            return
        if state.global_step > 0:
            self.hooks.load_state_dict(load_hooks_state(self._resumed_from(args, state)))
        if self.hooks.prepared:
            return
        training = model.training
        model.train()
        data = () if train_dataloader is None else train_dataloader
        accumulation = args.gradient_accumulation_steps
        self.hooks.prepare(
            lambda: _micro_batches(data, accumulation), lambda batch: _task_loss(model, batch)
        )
        model.train(training)
        model.zero_grad()

    def _resumed_from(self, args: TrainingArguments, state: TrainerState) -> Path:
        """The folder whose hooks' state was written with the resumed `trainer_state.json`."""
        noted = state.stateful_callbacks.get(NAME, {})
        noted = noted[-1] if isinstance(noted, list) else noted
        saved = noted.get("attributes", {}).get("saved", {})
        given = args.resume_from_checkpoint
        candidates = [
            self.checkpoint,
            given if isinstance(given, (str, os.PathLike)) else None,
            saved.get("folder"),
            _checkpoint(args.output_dir, state.global_step),
        ]
        tried = list(dict.fromkeys(str(path) for path in candidates if path))
        for path in tried:
            try:
                if saved_token(path) == saved.get("token", ""):
                    return Path(path)
            except FileNotFoundError:
                continue
        raise FileNotFoundError(
            f"resuming at step {state.global_step}, but the hooks' state of that checkpoint is in "
            f"none of {', '.join(tried)}: pass TunerCallback(checkpoint=…) if the folder was "
            "moved. A checkpoint written without TunerCallback cannot be resumed: its adapter was "
            "not adapting"
        )

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **unused: Any,
    ) -> None:
        """Writes into the Trainer's checkpoint what it lacks for going on."""
        by_transformers = adapters_of(model) is not None  # which saves the adapter's files alone
        if self.hooks is None or not args.should_save:
            return
        if not self.hooks.adapts and not by_transformers:
            return
        folder = _checkpoint(args.output_dir, state.global_step)
        if not folder.is_dir():
            raise FileNotFoundError(
                f"{folder}: the Trainer's checkpoint is not where it is expected, so the hooks' "
                "state cannot be saved with it (TunerCallback does not support hyper-parameter "
                "search)"
            )
        if by_transformers:
            assert model is not None
            save_trained(model, folder)
        if self.hooks.adapts:
            save_hooks_state(folder, self.hooks.state_dict(), token=self.saved.get("token", ""))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **unused: Any,
    ) -> None:
        """Adds the hooks' figures, as `tuner/<name>`, to the training logs."""
        if self.hooks is None or logs is None or "loss" not in logs:
            return
        figures = {
            f"tuner/{name}": value
            for name, value in {**self.hooks.losses(), **self.hooks.log()}.items()
        }
        logs.update(figures)
        if state.log_history:
            state.log_history[-1].update(figures)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **unused: Any
    ) -> None:
        """Detaches. Where the best checkpoint was loaded, the schedule goes back to it as well."""
        if self.hooks is None:
            return
        best = state.best_model_checkpoint
        if self.hooks.adapts and args.load_best_model_at_end and best is not None:
            self.hooks.load_state_dict(load_hooks_state(best))
        self.hooks.remove()


def _checkpoint(output_dir: str, step: int) -> Path:
    return Path(output_dir) / f"checkpoint-{step}"


def _micro_batches(data: Iterable[Mapping[str, Any]], accumulation: int) -> Iterator[MicroBatch]:
    """The batches with their shares of an optimiser step's scored labels, or of its batches."""
    batches = iter(data)
    while step := list(itertools.islice(batches, accumulation)):
        scored = [_scored(batch) for batch in step]
        total = sum(scored) * world_size()
        for i, (batch, count) in enumerate(zip(step, scored, strict=True)):
            yield MicroBatch(batch, weight=count / total, last=i == len(step) - 1)


def _scored(batch: Mapping[str, Any]) -> int:
    """How many labels count for the loss; 1 where there are none to be seen."""
    labels = batch.get("labels")
    found = int((labels != IGNORED).sum()) if isinstance(labels, Tensor) else 1
    return max(found, 1)


def _task_loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    out = model(**batch)
    loss = out["loss"] if isinstance(out, dict) else getattr(out, "loss", None)
    if loss is None:
        raise ValueError(
            "prepare needs the task loss, but the model returned none: does the training data have "
            "labels?"
        )
    return loss


@functools.cache
def _callback_class() -> type:
    try:
        from transformers import TrainerCallback
        from transformers.trainer_callback import ExportableState
    except ImportError as error:
        raise ImportError(
            "TunerCallback is for the Hugging Face Trainer: pip install 'transformers>=4.44'"
        ) from error
    body = {"__doc__": _Callback.__doc__, "__module__": __name__}
    return type(NAME, (_Callback, TrainerCallback, ExportableState), body)


def __getattr__(name: str) -> Any:
    if name == NAME:
        return _callback_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# --- the Trainer's methods, for `hf_models.patch_transformers` ------------------------------------
def _init(original: Callable[..., None], trainer: Any, *args: Any, **kwargs: Any) -> None:
    original(trainer, *args, **kwargs)
    callbacks = trainer.callback_handler.callbacks
    adapted = isinstance(trainer.model, nn.Module) and any(iter_tuners(trainer.model))
    if adapted and not any(isinstance(callback, _Callback) for callback in callbacks):
        trainer.add_callback(_callback_class()())


def _load_from_checkpoint(
    original: Callable[..., None],
    trainer: Any,
    resume_from_checkpoint: str,
    *args: Any,
    **kwargs: Any,
) -> None:
    if adapters_of(trainer.model) is None:
        return original(trainer, resume_from_checkpoint, *args, **kwargs)
    load_trained(trainer.model, Path(resume_from_checkpoint))


def _load_best_model(
    original: Callable[..., None], trainer: Any, *args: Any, **kwargs: Any
) -> None:
    if adapters_of(trainer.model) is None:
        return original(trainer, *args, **kwargs)
    load_trained(trainer.model, Path(trainer.state.best_model_checkpoint))


TRAINER_METHODS: dict[str, Callable[..., Any]] = {
    "__init__": _init,
    "_load_from_checkpoint": _load_from_checkpoint,
    "_load_best_model": _load_best_model,
}
