"""The one training loop. It knows no method and no task.

It is given a model whose output has `.loss` and `.logits`, windows of batches, an optimiser, a
schedule and evaluation sets that score logits. A *window* is one optimiser step: its micro-batches'
mean losses are weighted by their share of the window's rows, over all processes, so neither the
number of processes, nor of micro-batches, nor their sizes change what is computed.

Before every window the random generators are seeded with f(seed, step, process), see `sampling`. So
step k draws the same dropout masks whether the run was interrupted, evaluated more often, or not:
with the weights, the optimiser's and the hooks' state restored, a resumed run is the whole one.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from examples.cli.groups import TrainingOptions
from examples.data.batches import TrainingBatches, Window
from examples.evaluation import prediction as evaluation
from examples.evaluation.prediction import (
    Collate,
    EvaluationSet,
    PlainPredictor,
    Predictor,
    on_device,
)
from examples.training import checkpoints
from examples.training.checkpoints import Progress, RunError
from examples.training.compiling import compile_and_compare
from examples.training.progress import ProgressBar
from examples.training.run_folder import LOG, METRICS, RunFolder
from examples.training.sampling import WeightSampler, over_samples
from peft_custom.hooks import attach

LOOK_EVERY = 20  # steps between looks at the losses of an accelerator: each look waits for it
SUMS = ("tokens", "loss_sum", "log_sum")  # every process has its own part of these
RETRIES = 30  # halvings of fp16's scale before a step is given up


class Trainer:
    """Trains, evaluates, saves and resumes.

    Args:
        model: gives `.loss` and `.logits`.
        optimizer: has all trainable parameters; its groups' rates are the peaks of the schedule.
            A group with `max_grad_norm` is clipped by itself.
        options: the training options.
        accelerator: devices, processes, precision.
        folder: where files go.
        train: the windows; None where nothing is trained.
        collate: batch -> arguments of the model.
        schedule: λ(step), see `examples.training.schedules`.
        total_steps: T.
        evaluations: in order; the metric that chooses the best weights is the first one's.
        main_metric: its name, such as `eval_f1`; the smaller the better only for `eval_loss`.
        loss: (output, arguments) -> mean loss over the batch's rows.
        predictor: how evaluation sets are predicted.
        sampler: the optimiser, where it samples the weights.
        posterior: the weights are a distribution's: the optimiser's state belongs to them.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None,
        options: TrainingOptions,
        accelerator: Accelerator,
        folder: RunFolder,
        *,
        train: TrainingBatches | None = None,
        collate: Collate | None = None,
        schedule: Callable[[int], float] | None = None,
        total_steps: int = 0,
        evaluations: list[EvaluationSet] | None = None,
        main_metric: str = "eval_loss",
        loss: Callable[[Any, dict[str, Any]], Tensor] = lambda output, arguments: output.loss,
        predictor: Predictor | None = None,
        sampler: WeightSampler | None = None,
        posterior: bool = False,
    ) -> None:
        self.options, self.accelerator, self.folder = options, accelerator, folder
        self.train_batches, self.collate, self.schedule = train, collate, schedule
        self.total_steps, self.evaluations = total_steps, evaluations or []
        self.main_metric, self.loss = main_metric, loss
        self.predictor = predictor or PlainPredictor()
        self.sampler, self.posterior = sampler, posterior
        self.device = accelerator.device
        self.progress = Progress()
        self.kept: dict[str, Any] | None = None  # of the best evaluation, where nothing is saved
        self.unseen: list[Tensor] = []  # losses nobody has looked at yet
        if optimizer is None:
            self.raw = self.model = model.to(self.device)
            return
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        wrapped = isinstance(self.model, DistributedDataParallel)
        self.raw = self.model.module if wrapped else self.model
        self.hooks = attach(self.raw, self.optimizer, total_steps, seed=options.seed)
        self.peaks = [group["lr"] for group in self.optimizer.param_groups]
        self.clipped = self._clipping()

    def _clipping(self) -> list[tuple[list[nn.Parameter], float]]:
        """Parameters whose gradients are scaled down together, and to which norm."""
        common: list[nn.Parameter] = []
        own = []
        for group in self.optimizer.param_groups:
            if "max_grad_norm" in group:
                own.append((group["params"], group["max_grad_norm"]))
            else:
                common += group["params"]
        sets = [(common, self.options.max_grad_norm), *own]
        return [(parameters, norm) for parameters, norm in sets if parameters and norm]

    # --- the loop -------------------------------------------------------------------------------

    def train(self) -> None:
        """Takes all steps that are left, evaluating and saving on the way."""
        if self.progress.step == 0:
            self.hooks.prepare(lambda: self._batches_of_epoch(0), self._forward_loss)
        state = self.progress
        self.bar = ProgressBar(
            self.total_steps,
            state.step,
            show=self.accelerator.is_main_process,
            plain=self.options.disable_tqdm,
        )
        self.model.train()
        if self.options.compile and state.step < self.total_steps:
            self._compile()
        self.began = time.perf_counter()
        while state.step < self.total_steps and not state.stopped:
            epoch, start = divmod(state.step, len(self.train_batches))
            for window in self.train_batches.windows(epoch, start):
                self.step(window)
                self._after_step()
                if state.step >= self.total_steps or state.stopped:
                    break
        self._stop_clock()
        self.bar.close()

    def _compile(self) -> None:
        """Compiles the model, and measures on the next window whether that pays."""
        epoch, start = divmod(self.progress.step, len(self.train_batches))
        window = next(self.train_batches.windows(epoch, start))

        def run_window() -> None:
            self._passes(window, train=False)
            self.optimizer.zero_grad()
            if self.device.type == "cuda":
                torch.cuda.synchronize()

        left = self.total_steps - self.progress.step
        self.bar.line(compile_and_compare(self.raw, run_window, left))

    def _batches_of_epoch(self, epoch: int) -> Iterator[dict[str, Any]]:
        for window in self.train_batches.windows(epoch):
            for batch in window.batches:
                yield on_device(self.collate(batch), self.device)

    def _forward_loss(self, arguments: dict[str, Any]) -> Tensor:
        return self.loss(self.model(**arguments), arguments)

    def step(self, window: Window) -> None:
        """One optimiser step; under fp16 repeated with a smaller scale where it overflowed."""
        state = self.progress
        factor = self.schedule(state.step)
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * factor
        for _ in range(RETRIES):
            loss = self._passes(window)
            self.accelerator.unscale_gradients()
            for parameters, norm in self.clipped:
                torch.nn.utils.clip_grad_norm_(parameters, norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
            if not self.accelerator.optimizer_step_was_skipped:
                break
        else:
            raise self._diverged(state.step)
        state.step += 1
        state.tokens += window.tokens
        self.unseen.append(loss)
        self.bar.advance()

    def _passes(self, window: Window, train: bool = True) -> Tensor:
        """The window's loss and gradient, over all samples of the weights."""
        where = self.options.seed, self.progress.step, self.accelerator.process_index
        return over_samples(lambda: self._backward(window), self.sampler, *where, train=train)

    def _backward(self, window: Window) -> Tensor:
        """Σ weight·loss of this process's micro-batches, its gradient added up on the way."""
        total = torch.zeros((), device=self.device)
        processes = self.accelerator.num_processes  # gradients are averaged over them, not summed
        last = len(window.batches) - 1
        for i, batch in enumerate(window.batches):
            hold = i < last and processes > 1
            with self.accelerator.no_sync(self.model) if hold else nullcontext():
                arguments = on_device(self.collate(batch), self.device)
                loss = self._forward_loss(arguments).float() * batch.weight
                self.accelerator.backward(loss * processes)
            total += loss.detach()
        return total

    # --- between steps --------------------------------------------------------------------------

    def _after_step(self) -> None:
        state, options, step = self.progress, self.options, self.progress.step
        if self.device.type == "cpu" or len(self.unseen) >= LOOK_EVERY:
            self._look_at_losses()
        if options.logging_steps and step % options.logging_steps == 0:
            self._log()
        ended = step % len(self.train_batches) == 0 or step == self.total_steps
        late = (step - 1) // len(self.train_batches) >= options.eval_after_epochs
        by_steps = late and options.eval_steps and step % options.eval_steps == 0
        at_end = step == self.total_steps or (ended and options.eval_strategy == "epoch")
        due = (at_end or by_steps) and options.eval_strategy != "no"
        due = due and self.evaluations and options.do_eval
        better = due and self._evaluate_on_the_way()
        if options.save_strategy == "no":
            if better:
                self.kept = copy.deepcopy({"weights": self.weights(), **self._posterior()})
            return
        regular = ended if options.save_strategy == "epoch" else step % options.save_steps == 0
        if regular or better or step == self.total_steps or state.stopped:
            self.save()

    def _look_at_losses(self) -> None:
        if not self.unseen:
            return
        losses = torch.stack(self.unseen).double().tolist()
        first = self.progress.step - len(losses)
        self.unseen.clear()
        for i, loss in enumerate(losses):
            if not math.isfinite(loss):
                raise self._diverged(first + i)
        self.progress.count(losses)

    def _diverged(self, step: int) -> RunError:
        rate = self.options.learning_rate
        return checkpoints.diverged(self.folder.path, step + 1, self.total_steps, rate)

    def _log(self) -> None:
        self._look_at_losses()
        step, loss = self.progress.step, self._mean_loss("log")
        rate = self.optimizer.param_groups[0]["lr"]
        row = {"step": step, "epoch": self.epoch(), "loss": loss, "learning_rate": rate}
        row |= self.hooks.losses() | self.hooks.log()
        self.folder.add_line(LOG, row)
        self.accelerator.log({k: v for k, v in row.items() if k != "step"}, step=step)
        self.bar.note(step, loss=loss)

    def _mean_loss(self, name: str) -> float:
        """Over processes and over the steps since this was last asked for `name`."""
        own, steps = self.progress.take(name)
        return self.over_processes(own) / max(1, steps)

    def over_processes(self, value: float) -> float:
        """The sum of a figure of every process."""
        if self.accelerator.num_processes == 1:
            return value
        own = torch.tensor(float(value), dtype=torch.float64, device=self.device)
        return float(self.accelerator.reduce(own, "sum"))

    def epoch(self, step: int | None = None) -> float:
        """Passes over the training data after `step` steps (default: now)."""
        step = self.progress.step if step is None else step
        return round(step / len(self.train_batches), 4)

    def _evaluate_on_the_way(self) -> bool:
        """Evaluates, logs, and says whether this is the best so far."""
        self._look_at_losses()
        self._stop_clock()
        state = self.progress
        values = self.evaluate()
        row = {"step": state.step, "epoch": self.epoch(), "train_loss": self._mean_loss("loss")}
        row |= values | self.hooks.losses() | self.hooks.log()
        self.folder.add_line(METRICS, row)
        self.accelerator.log({k: v for k, v in row.items() if k != "step"}, step=state.step)
        shown = evaluation.worth_showing(values, self.main_metric, self.predictor.views(False))
        shown = "  ".join(f"{name} {value:.4f}" for name, value in shown.items())
        self.bar.line(f"epoch {row['epoch']:g}  train_loss {row['train_loss']:.4f}  {shown}")
        value = values[self.main_metric]
        self.bar.note(state.step, **{self.main_metric: value})
        better = self._is_better(value)
        if better:
            state.best, state.best_step, state.worse = value, state.step, 0
        elif self.hooks.finished:
            state.worse += 1
            patience = self.options.early_stopping_patience
            if patience and state.worse >= patience:
                state.stopped = True
                self.bar.line(f"no better {self.main_metric} in {patience} evaluations: stopping")
        self._start_clock()
        return better

    def _is_better(self, value: float) -> bool:
        """Weights whose adapter has not its final form yet are no candidates."""
        if not self.hooks.finished:
            return False
        if self.progress.best is None:
            return True
        smaller = self.main_metric.endswith("loss")
        return value < self.progress.best if smaller else value > self.progress.best

    def _stop_clock(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.progress.seconds += time.perf_counter() - self.began

    def _start_clock(self) -> None:
        self.began = time.perf_counter()

    # --- evaluation -----------------------------------------------------------------------------

    def evaluate(self, final: bool = False) -> dict[str, float]:
        """Metrics of every evaluation set; `final` at the end of a run."""
        where = self.raw, self.evaluations, self.accelerator
        return evaluation.evaluate(*where, self.predictor, final)

    # --- saving and resuming --------------------------------------------------------------------

    def weights(self) -> dict[str, Tensor]:
        """What training changes: trainable parameters, and buffers that a state dict has."""
        persistent = self.raw.state_dict(keep_vars=True)
        found = {n: p for n, p in self.raw.named_parameters() if p.requires_grad}
        return found | {n: b for n, b in self.raw.named_buffers() if n in persistent}

    def save(self) -> None:
        """Writes a checkpoint, then removes those that are too many."""
        self._look_at_losses()
        self._stop_clock()
        state, weights = self.progress, self.weights()
        if not all(bool(t.isfinite().all()) for t in weights.values() if t.is_floating_point()):
            raise self._diverged(state.step - 1)
        sums = {name: self.over_processes(getattr(state, name)) for name in SUMS}
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler
            content = {
                "weights": weights,
                "optimizer": self.optimizer.state_dict(),
                "hooks": self.hooks.state_dict(),
                "scaler": scaler.state_dict() if scaler is not None else None,
                "processes": self.accelerator.num_processes,
                "total_steps": self.total_steps,
                "progress": asdict(state) | sums,
            }
            figures = content["progress"] | {"epoch": self.epoch()}
            checkpoints.save(self.folder.path, state.step, content, figures)
            best = None if state.best_step is None else f"checkpoint-{state.best_step}"
            checkpoints.prune(self.folder.path, self.options.save_total_limit, best)
        self.accelerator.wait_for_everyone()
        self._start_clock()

    def resume(self, checkpoint: Path) -> None:
        """Takes over everything a checkpoint holds."""
        content = checkpoints.read_state(checkpoint / checkpoints.STATE)
        for name, now in (
            ("processes", self.accelerator.num_processes),
            ("total_steps", self.total_steps),
        ):
            if content[name] != now:
                raise RunError(f"{checkpoint} has {name} {content[name]}, now {now}: keep it so")
        self._put(content["weights"], checkpoint)
        self.optimizer.load_state_dict(content["optimizer"])
        self.hooks.load_state_dict(content["hooks"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(content["scaler"])
        self.progress = Progress(**content["progress"])
        if not self.accelerator.is_main_process:  # the main process goes on with the sums of all
            for name in SUMS:
                setattr(self.progress, name, 0)

    @torch.no_grad()
    def _put(self, tensors: dict[str, Tensor], source: object) -> None:
        own = self.weights()
        if own.keys() != tensors.keys():
            differing = sorted(own.keys() ^ tensors.keys())
            raise RunError(f"{source} is of another model: {', '.join(differing[:3])} …")
        for name, tensor in own.items():
            tensor.copy_(tensors[name])

    def load_best(self) -> None:
        """Puts the weights of the best evaluation back, if there was one."""
        step = self.progress.best_step
        if step is None or not self.options.load_best_model_at_end:
            return
        folder, content = self.folder.path / f"checkpoint-{step}", self.kept
        if content is None and step != self.progress.step:
            content = checkpoints.read_state(folder / checkpoints.STATE)
        if content is not None:
            self._put(content["weights"], folder)
            if self.posterior:
                self.optimizer.load_state_dict(content["optimizer"])

    def _posterior(self) -> dict[str, Any]:
        """The optimiser's state where it belongs to the weights: they are a distribution's."""
        return {"optimizer": self.optimizer.state_dict()} if self.posterior else {}
