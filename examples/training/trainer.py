"""The one training loop. It knows no method and no task.

It is given a model whose output has `.loss` and `.logits`, global batches, an optimiser, a schedule
and evaluation sets that score logits. One optimiser step takes one *global batch*: the mean losses
of its micro-batches are weighted by their share of its rows, over all processes, so neither the
number of processes, nor of micro-batches, nor their sizes change what is computed.

Before every step the random generators are seeded with f(seed, step, process), see `sampling`. So
step k draws the same dropout masks whether the run was interrupted, evaluated more often, or not:
with the weights, the optimiser's and the hooks' state restored, a resumed run is the whole one.
"""

from __future__ import annotations

import copy
import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from examples.cli.groups import TrainingOptions
from examples.data.batches import GlobalBatch, TrainingBatches, on_device
from examples.errors import RunError, as_user_error
from examples.evaluation import prediction as evaluation
from examples.evaluation.prediction import Collate, EvaluationSet, PlainPredictor, Predictor
from examples.training import checkpoints
from examples.training.checkpoints import Progress
from examples.training.compiling import compile_and_compare
from examples.training.distillation import for_the_model
from examples.training.progress import ProgressBar
from examples.training.run_folder import LOG, METRICS, RunFolder
from examples.training.sampling import WeightSampler, over_samples
from examples.training.sharding import ShardedModel, gathered
from peft_custom.distributed import take_from_first
from peft_custom.hooks import MicroBatch, attach, unwrap_optimizer

LOSS_CHECK_EVERY = 20  # steps: reading the losses of an accelerator waits for all its work
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
        train: the global batches; None where nothing is trained.
        collate: batch -> arguments of the model.
        schedule: λ(step), see `examples.training.schedules`.
        total_steps: T.
        evaluations: in order; the metric that chooses the best weights is the first one's.
        main_metric: its name, such as `eval_f1`; the smaller the better only for `eval_loss`.
        loss: (output, arguments) -> mean loss over the batch's rows.
        predictor: how evaluation sets are predicted; default: one forward pass.
        sampler: the optimiser, where it samples the weights.
        posterior: the weights are a distribution's: the optimiser's state belongs to them.
        read: what the run has read -> a key of its content; to resume, they must be the same.
        shard: weights are cut into pieces over the processes while it trains (FSDP2), instead of
            DistributedDataParallel.
        free_layers: of sharded weights, see `ShardedModel.free_after_forward`.
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
        read: Mapping[str, str] | None = None,
        shard: bool = False,
        free_layers: bool = True,
    ) -> None:
        self.options, self.accelerator, self.folder = options, accelerator, folder
        self.train_batches, self.collate, self.schedule = train, collate, schedule
        self.total_steps, self.evaluations = total_steps, evaluations or []
        self.main_metric, self.loss = main_metric, loss
        self.predictor = predictor or PlainPredictor()
        self.sampler, self.posterior = sampler, posterior
        self.read = dict(read or {})
        self.shard, self.free_layers = shard, free_layers
        self.shards: ShardedModel | None = None  # from the first step to the last
        self.device = accelerator.device
        self.progress = Progress()
        self.best_state: dict[str, Any] | None = None  # where no checkpoints are saved
        self.resumed_from = folder.path  # the folder with the checkpoints of before
        self.pending_losses: list[Tensor] = []  # on the device, not yet read
        if optimizer is None:
            self.unwrapped = self.model = model.to(self.device)
            return
        if shard:
            self.model = accelerator.prepare_model(model, evaluation_mode=True)  # without DDP
            take_from_first(list(model.parameters()))
            self.optimizer = accelerator.prepare(optimizer)
        else:
            self.model, self.optimizer = accelerator.prepare(model, optimizer)
        wrapped = isinstance(self.model, DistributedDataParallel)
        self.unwrapped = self.model.module if wrapped else self.model
        self.hooks = attach(self.unwrapped, self.optimizer, total_steps, seed=options.seed)
        self.base_lrs = [group["lr"] for group in self.optimizer.param_groups]
        self.clip_groups = self._make_clip_groups()

    def _make_clip_groups(self) -> list[tuple[list[nn.Parameter], float]]:
        """Lists of parameters, and the norm to which the gradients of each list are clipped."""
        common: list[nn.Parameter] = []
        own = []  # groups with a norm of their own, such as a mask's logits
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
        if self.progress.step == 0:  # what it found is in the hooks' state of a resumed run
            as_user_error(
                self.hooks.prepare, partial(self._batches_of_epoch, 0), self._forward_loss
            )
        if self.shard:
            self._shard()
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
        self.started = time.perf_counter()
        while state.step < self.total_steps and not state.stopped:
            epoch, start = divmod(state.step, len(self.train_batches))
            for batch in self.train_batches.global_batches(epoch, start):
                self.step(batch)
                self._after_step()
                if state.step >= self.total_steps or state.stopped:
                    break
        self._stop_clock()
        if self.shards is not None:
            self.shards.end()
            self.shards = None
        self.bar.close()

    def let_go(self) -> None:
        """Frees what shares gradients out, at the end, while the processes are still joined.

        Its destructor would else be the last to hold the process group, and wait, with Python's
        lock, for a thread of the group that may be waiting for that lock.
        """
        self.model = self.unwrapped
        self.accelerator.free_memory()
        gc.collect()

    def _shard(self) -> None:
        """The weights become pieces; what the tuners read between forward passes stays whole.

        So do trained weights that a tuner or an optimiser looks at as tensors of the model.
        """
        all_train = all(parameter.requires_grad for parameter in self.unwrapped.parameters())
        self.shards = ShardedModel(
            self.unwrapped,
            unwrap_optimizer(self.optimizer),
            self.hooks.read_between_passes(),
            trained_too=all_train and not self.hooks.adapts and self.sampler is None,
            free_after_forward=self.free_layers,
        )
        self.clip_groups = self._make_clip_groups()

    def _compile(self) -> None:
        """Compiles the model, and measures on the next global batch whether that pays.

        The weights and the optimiser's state stay as they are, so the run is the same without.
        """
        epoch, start = divmod(self.progress.step, len(self.train_batches))
        batch = next(self.train_batches.global_batches(epoch, start))

        def run_passes() -> None:
            self._passes(batch, train=False)
            self.optimizer.zero_grad()
            if self.device.type == "cuda":
                torch.cuda.synchronize()

        left = self.total_steps - self.progress.step
        self.bar.line(compile_and_compare(self.unwrapped, run_passes, left))

    def _batches_of_epoch(self, epoch: int) -> Iterator[MicroBatch]:
        """The model's arguments for every micro-batch, for methods that look at data first."""
        for batch in self.train_batches.global_batches(epoch):
            last = batch.micro_batches[-1]
            for micro_batch in batch.micro_batches:
                arguments = on_device(self.collate(micro_batch), self.device)
                ends = micro_batch is last
                yield MicroBatch(arguments, weight=micro_batch.weight, last=ends)

    def _forward_loss(self, arguments: dict[str, Any]) -> Tensor:
        return self.loss(self.model(**for_the_model(arguments)), arguments)

    def step(self, batch: GlobalBatch) -> None:
        """One optimiser step; under fp16 repeated with a smaller scale where it overflowed."""
        state = self.progress
        factor = self.schedule(state.step)
        for group, base_lr in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = base_lr * factor
        for _ in range(RETRIES):  # once, but under fp16
            loss = self._passes(batch)
            self.accelerator.unscale_gradients()
            # In the order of accumulate, unscale, clip, step; the other hooks run within `step`.
            self.hooks.before_clipping()
            for parameters, norm in self.clip_groups:
                torch.nn.utils.clip_grad_norm_(parameters, norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
            if not self.accelerator.optimizer_step_was_skipped:
                break
        else:
            raise self._diverged(state.step)
        state.step += 1
        state.tokens += batch.tokens
        self.pending_losses.append(loss)  # reading it here would wait for the device
        self.bar.advance()

    def _passes(self, batch: GlobalBatch, train: bool = True) -> Tensor:
        """The global batch's loss and gradient, over all samples of the weights."""
        where = self.options.seed, self.progress.step, self.accelerator.process_index
        return over_samples(lambda: self._backward(batch), self.sampler, *where, train=train)

    def _backward(self, batch: GlobalBatch) -> Tensor:
        """Σ weight·loss of this process's micro-batches, its gradient added up on the way."""
        total = torch.zeros((), device=self.device)  # ()
        processes = self.accelerator.num_processes  # gradients are averaged over them, not summed
        last = len(batch.micro_batches) - 1
        for i, micro_batch in enumerate(batch.micro_batches):
            # Gradients are exchanged once, with the last one; those of pieces with every one.
            hold = i < last and processes > 1 and self.shards is None
            with self.accelerator.no_sync(self.model) if hold else nullcontext():
                arguments = on_device(self.collate(micro_batch), self.device)
                loss = self._forward_loss(arguments).float() * micro_batch.weight
                self.accelerator.backward(loss * processes)
            total += loss.detach()
        if self.shards is not None:
            self.shards.average_gradients()
        return total

    # --- between steps --------------------------------------------------------------------------

    def _after_step(self) -> None:
        """Logs, evaluates and saves, each where it is due."""
        state, options = self.progress, self.options
        if self.device.type == "cpu" or len(self.pending_losses) >= LOSS_CHECK_EVERY:
            self._check_losses()
        if options.logging_steps and state.step % options.logging_steps == 0:
            self._log()
        better = self._evaluation_is_due() and self._evaluate_on_the_way()
        if options.save_strategy != "no":
            # The best weights are read back from their checkpoint at the end of the run.
            if self._save_is_due() or better:
                self.save()
        elif better:
            best = gathered({"weights": self.weights(), **self._posterior()})
            self.best_state = copy.deepcopy(best)

    def _is_last_step(self) -> bool:
        return self.progress.step == self.total_steps

    def _ends_epoch(self) -> bool:
        """The last epoch may be cut short by the number of steps."""
        return self.progress.step % len(self.train_batches) == 0 or self._is_last_step()

    def _evaluation_is_due(self) -> bool:
        """At the end of the run, of every epoch if asked for, and every `eval_steps`."""
        options, step = self.options, self.progress.step
        if options.eval_strategy == "no" or not options.do_eval or not self.evaluations:
            return False
        if self._is_last_step() or (options.eval_strategy == "epoch" and self._ends_epoch()):
            return True
        if not options.eval_steps or step % options.eval_steps:
            return False
        epochs_done = (step - 1) // len(self.train_batches)
        return epochs_done >= options.eval_after_epochs

    def _save_is_due(self) -> bool:
        """At the end of the run, however it ends, and every epoch or `save_steps`."""
        options, step = self.options, self.progress.step
        if self._is_last_step() or self.progress.stopped:
            return True
        if options.save_strategy == "epoch":
            return self._ends_epoch()
        return step % options.save_steps == 0

    def _check_losses(self) -> None:
        """Reads the pending losses, all at once; one that is not finite ends the run."""
        if not self.pending_losses:
            return
        losses = torch.stack(self.pending_losses).double().tolist()  # (steps,)
        first = self.progress.step - len(losses)
        self.pending_losses.clear()
        for i, loss in enumerate(losses):
            if not math.isfinite(loss):
                raise self._diverged(first + i)
        self.progress.count(losses)

    def _diverged(self, step: int) -> RunError:
        rate = self.options.learning_rate
        return checkpoints.diverged(self.folder.path, step + 1, self.total_steps, rate)

    def _log(self) -> None:
        self._check_losses()
        step, loss = self.progress.step, self._mean_loss("log")
        rate = self.optimizer.param_groups[0]["lr"]
        row = {"step": step, "epoch": self.epoch(), "loss": loss, "learning_rate": rate}
        row |= self.hooks.losses() | self.hooks.log()
        self.folder.add_line(LOG, row)
        self.accelerator.log({k: v for k, v in row.items() if k != "step"}, step=step)
        self.bar.note(step, loss=loss)

    def _mean_loss(self, name: str) -> float:
        """Over all processes, and the steps since the last call for `name` ("loss" or "log")."""
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
        """Evaluates and logs; returns whether this is the best evaluation so far."""
        self._check_losses()
        self._stop_clock()
        state = self.progress
        values = self.evaluate()
        row = {"step": state.step, "epoch": self.epoch(), "train_loss": self._mean_loss("loss")}
        row |= values | self.hooks.losses() | self.hooks.log()
        self.folder.add_line(METRICS, row)
        self.accelerator.log({k: v for k, v in row.items() if k != "step"}, step=state.step)
        shown = evaluation.summary_metrics(values, self.main_metric, self.predictor.variants(False))
        shown = "  ".join(f"{name} {value:.4f}" for name, value in shown.items())
        self.bar.line(f"epoch {row['epoch']:g}  train_loss {row['train_loss']:.4f}  {shown}")
        value = values[self.main_metric]
        self.bar.note(state.step, **{self.main_metric: value})
        better = self._is_better(value)
        if better:
            state.best, state.best_step, state.evals_without_gain = value, state.step, 0
        elif self.hooks.finished:
            state.evals_without_gain += 1
            patience = self.options.early_stopping_patience
            if patience and state.evals_without_gain >= patience:
                state.stopped = True
                self.bar.line(f"no better {self.main_metric} in {patience} evaluations: stopping")
        self._start_clock()
        return better

    def _is_better(self, value: float) -> bool:
        """Whether a value of the main metric is the best so far."""
        # Before its final ranks or mask an adapter is another model than the run's result.
        if not self.hooks.finished:
            return False
        if self.progress.best is None:
            return True
        smaller = self.main_metric.endswith("loss")
        return value < self.progress.best if smaller else value > self.progress.best

    def _stop_clock(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.progress.seconds += time.perf_counter() - self.started

    def _start_clock(self) -> None:
        self.started = time.perf_counter()

    # --- evaluation -----------------------------------------------------------------------------

    def evaluate(self, final: bool = False) -> dict[str, float]:
        """Metrics of every evaluation set; `final` at the end of a run."""
        where = self.unwrapped, self.evaluations, self.accelerator
        with nullcontext() if self.shards is None else self.shards.whole():
            return evaluation.evaluate(*where, self.predictor, final)

    # --- saving and resuming --------------------------------------------------------------------

    def weights(self) -> dict[str, Tensor]:
        """What training changes: trainable parameters, and buffers that a state dict has."""
        persistent = self.unwrapped.state_dict(keep_vars=True)
        found = {n: p for n, p in self.unwrapped.named_parameters() if p.requires_grad}
        return found | {n: b for n, b in self.unwrapped.named_buffers() if n in persistent}

    def save(self) -> None:
        """Writes a checkpoint, then removes those that are too many."""
        self._check_losses()
        self._stop_clock()
        state, weights = self.progress, gathered(self.weights())
        optimizer = gathered(self.optimizer.state_dict(), self.accelerator.is_main_process)
        # A finite loss may have made weights that are not; such a checkpoint would be the newest.
        if not all(bool(t.isfinite().all()) for t in weights.values() if t.is_floating_point()):
            raise self._diverged(state.step - 1)
        sums = {name: self.over_processes(getattr(state, name)) for name in SUMS}
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler
            content = {
                "weights": weights,
                "optimizer": optimizer,
                "hooks": self.hooks.state_dict(),
                "scaler": scaler.state_dict() if scaler is not None else None,
                "processes": self.accelerator.num_processes,
                "total_steps": self.total_steps,
                "read": self.read,
                "progress": state.to_dict() | sums,
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
        checkpoints.refuse_other_inputs(checkpoint, content.get("read", {}), self.read)
        self.resumed_from = checkpoint.parent
        self._put(content["weights"], checkpoint)
        self.optimizer.load_state_dict(content["optimizer"])
        self.hooks.load_state_dict(content["hooks"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(content["scaler"])
        self.progress = Progress.from_dict(content["progress"])
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
        folder, content = self.folder.path / f"checkpoint-{step}", self.best_state
        if not folder.is_dir():
            folder = self.resumed_from / folder.name
        if content is None and step != self.progress.step:
            content = checkpoints.read_state(folder / checkpoints.STATE)
        if content is not None:
            self._put(content["weights"], folder)
            if self.posterior:
                self.optimizer.load_state_dict(content["optimizer"])

    def _posterior(self) -> dict[str, Any]:
        """The optimiser's state where it belongs to the weights: they are a distribution's."""
        return {"optimizer": self.optimizer.state_dict()} if self.posterior else {}
