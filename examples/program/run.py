"""One run: model, optimiser and trainer put together, trained, its results written."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list, set_seed

from examples.cli.groups import TRACKERS, ModelOptions, TeacherOptions, TrainingOptions
from examples.data.batches import TrainingBatches
from examples.data.encode import EncodedSplit
from examples.data.readers import RawSplit
from examples.errors import OptionError, RunError, as_user_error
from examples.evaluation.forgetting import Forgetting
from examples.evaluation.prediction import (
    Collate,
    EvaluationSet,
    PlainPredictor,
    Prediction,
    Predictor,
    predict,
    summary_metrics,
)
from examples.methods.bf16 import cpu_multiplies_bf16, multiply_bf16_in_fp32
from examples.methods.registry import METHODS, BuiltOptimizer, RunInfo
from examples.methods.source import ModelSource
from examples.plots.curves import learning_curve
from examples.program.arithmetic import training_flops
from examples.program.launched import check_launch, frees_layers, joined_as_ddp, wants_sharding
from examples.program.main import Options
from examples.program.model_card import write_card
from examples.program.results import peak_memory, table
from examples.program.task_data import TaskData
from examples.program.teacher import Teacher
from examples.training.checkpoints import is_disk_full, saving_failed
from examples.training.run_folder import (
    CURVE,
    LOG,
    METRICS,
    PLOTS,
    RESULTS,
    SUBMISSION,
    RunFolder,
    source_commit,
)
from examples.training.schedules import clr, cycle, schedule
from examples.training.trainer import Trainer
from peft_custom import base_weights
from transformers_patched import AutoTokenizer

Loss = Callable[[Any, dict[str, Any]], torch.Tensor]
WritePredictions = Callable[[Path, str, RawSplit, Prediction], Path]
PredictSplit = Callable[["Run", str, Any], dict[str, float]]


def make_accelerator(options: TrainingOptions) -> Accelerator:
    """Devices, processes, precision and trackers, with the seed set."""
    check_launch(options)
    AcceleratorState._reset_state()  # a sweep makes several runs in one process
    set_seed(options.seed)
    wanted = TRACKERS if options.report_to == ("all",) else options.report_to
    trackers = [] if wanted == ("none",) else [_tracker(t, options.report_to) for t in wanted]
    trackers = [tracker for tracker in trackers if tracker]
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    with joined_as_ddp():
        accelerator = Accelerator(
            # without a GPU accelerate joins launched processes only where it is told so
            cpu=launched > 1 and not torch.accelerator.is_available(),
            mixed_precision=options.mixed_precision,
            log_with=trackers or None,
            project_dir=options.output_dir if trackers else None,
            step_scheduler_with_optimizer=False,
        )
    if accelerator.num_processes != launched:
        raise OptionError(
            f"{launched} processes were launched, but accelerate joined {accelerator.num_processes}"
        )
    if options.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise OptionError("--mixed_precision fp16 needs a GPU; use bf16 on a CPU")
    if options.mixed_precision == "bf16" and not cpu_multiplies_bf16():
        multiply_bf16_in_fp32()
    return accelerator


def _tracker(name: str, asked: Sequence[str]) -> str | None:
    """The tracker, if installed; where it was asked for by name, it must be."""
    if find_spec(name) is not None:
        return name
    if "all" in asked:
        return None
    raise OptionError(f"--report_to {name}: not installed; pip install {name}")


class Run:
    """A run. `build` makes its trainer, `train` trains and saves, `finish` reports.

    Making it claims the folder, for `train_and_evaluate` to end: another run's results there are an
    error, before any work is done.

    Args:
        options: of the program.
        accelerator: from `make_accelerator`.
        source: where the model comes from.
        title: the run in a few words: task and model.
        main_metric: chooses the best weights.

    Attributes:
        folder: of the run.
        read: what was read to evaluate -> a key of its content.
        test_metrics: of test splits, where their answers are known.
        extra: other figures to show and save at the end.
        checkpoint: that the run goes on from, or None.
        adapted: the model; from `build` on, as are the next two.
        built: the optimiser; None where nothing is trained and no posterior is asked.
        trainer: has the loop, and evaluates.
    """

    def __init__(
        self,
        options: Options,
        accelerator: Accelerator,
        source: ModelSource,
        title: str,
        main_metric: str,
    ) -> None:
        self.options, self.accelerator, self.source = options, accelerator, source
        self.title, self.main_metric = title, main_metric
        self.training: TrainingOptions = options[TrainingOptions]
        all_train = options.method.folder == "model"
        if all_train and options.optimizer.has_posterior and wants_sharding():
            raise OptionError(
                f"--optimizer {options.optimizer.name}: not with FSDP2 where all weights train: it "
                "samples them whole; launch without --use_fsdp, or use --optimizer adamw"
            )
        source.warmup = self.training.num_warmup_steps or self.training.warmup_ratio
        self.folder = RunFolder(
            Path(self.training.output_dir).expanduser(),
            options.resolved(),
            accelerator.is_main_process,
            {name: (method.folder, *method.files) for name, method in METHODS.items()},
            options.program,
        )
        self.read: dict[str, str] = {}
        self.test_metrics: dict[str, float] = {}
        self.extra: dict[str, float] = {}
        self.checkpoint: Path | None = None
        if self.training.do_train or self.training.do_predict:
            self.checkpoint = self._claim()

    def _claim(self) -> Path | None:
        """The main process claims the folder for all; the checkpoint to go on from."""
        answer: list[str | None] = [None, None]  # the checkpoint, or why there is no claim
        if self.accelerator.is_main_process:
            try:
                checkpoint = self.folder.claim(self.options.config_file)
                answer[0] = None if checkpoint is None else str(checkpoint)
            except (RunError, OSError) as error:
                answer[1] = str(error)
        broadcast_object_list(answer)
        if answer[1] is not None:
            raise RunError(answer[1])
        return None if answer[0] is None else Path(answer[0])

    def note_read(self, split: str, rows: EncodedSplit) -> None:
        """Keeps the keys of a split, which belong in checkpoints; the model's source has its own.

        What a method keeps for other runs, such as features, depends on the training split alone.
        """
        keys = {f"{what} of the {split} split": key for what, key in rows.keys.items()}
        (self.source.read if split == "train" else self.read).update(keys)

    def print_once(self, message: str) -> None:
        """Prints on the main process."""
        if self.accelerator.is_main_process:
            print(message)

    # -- putting it together --------------------------------------------------------------------

    def build(
        self,
        train: TrainingBatches | None,
        collate: Collate | None,
        evaluations: list[EvaluationSet],
        loss: Loss | None = None,
    ) -> Trainer:
        """Loads the model, puts the method's adapters in, makes optimiser and trainer.

        Args:
            train: the global batches; None where nothing is trained.
            collate: training batch -> arguments of the model.
            evaluations: sets to predict and score.
            loss: (output, arguments) -> mean loss over the rows; None: the model's own.
        """
        self.source.verbose = self.accelerator.is_main_process
        self.source.note_weights = train is not None
        options = self.options
        self.source.adapter = options.resolved().get("lora_path")
        self.adapted = as_user_error(options.method.build, self.source, options.method_options)
        if self.training.gradient_checkpointing:
            self.adapted.model.gradient_checkpointing_enable()
        self.built: BuiltOptimizer | None = None
        arguments: dict[str, Any] = {}
        if train is not None:
            steps, factor, rate = self._schedule(len(train))
            self.built = self._optimizer(train.counted, rate)
            arguments = {
                "read": self.read | self.source.read,
                "train": train,
                "collate": collate,
                "schedule": factor,
                "total_steps": steps,
                "sampler": self.built.sampler,
                "posterior": self.built.posterior is not None,
                "shard": wants_sharding(),
                "free_layers": frees_layers(),
            }
        elif options.optimizer.has_posterior:
            self.built = self._optimizer(0, self.training.learning_rate)
        if loss is not None:
            arguments["loss"] = loss
        self.trainer = as_user_error(
            Trainer,
            self.adapted.model,
            self.built.optimizer if self.built and train is not None else None,
            self.training,
            self.accelerator,
            self.folder,
            evaluations=evaluations,
            main_metric=self.main_metric,
            predictor=self._predictor(),
            **arguments,
        )
        return self.trainer

    def _optimizer(self, rows: int, rate: float) -> BuiltOptimizer:
        """The optimiser for that many training rows, or scored tokens where the loss is their mean.

        It has the posterior of what the run starts from.
        """
        o = self.training
        built = as_user_error(
            self.options.optimizer.build,
            self.adapted.model.parameter_groups(rate, o.weight_decay),
            self.options.optimizer_options,
            RunInfo(
                rows,
                o.seed,
                fp16=o.mixed_precision == "fp16",
                processes=self.accelerator.num_processes,
                device=str(self.accelerator.device),
            ),
        )
        if built.posterior is not None:
            adapter = self.options.resolved().get("lora_path")
            start = Path(adapter or self.source.name_or_path).expanduser()
            message = as_user_error(built.posterior.load, start, self.adapted.model)
            if adapter is not None:
                self.print_once(message)
        return built

    def _predictor(self) -> Predictor:
        """The method's way to predict, averaged over the optimiser's posterior where asked for."""
        predictor = self.adapted.predictor or PlainPredictor()
        if self.built is not None and self.built.predictor is not None:
            return self.built.predictor(predictor)
        return predictor

    def _schedule(self, per_epoch: int) -> tuple[int, Callable[[int], float], float]:
        """Steps of the run, λ(step), and the peak rate."""
        o = self.training
        steps = o.max_train_steps or math.ceil(o.num_train_epochs * per_epoch)
        warmup = o.num_warmup_steps or math.ceil(o.warmup_ratio * steps)
        if o.lr_scheduler_type == "clr":
            rate = clr(
                steps, per_epoch, warmup, first=o.lr_schedule_first_lr,
                const_epochs=o.lr_schedule_const_epochs, second=o.lr_schedule_second_lr,
                end=o.lr_schedule_end_lr,
            )  # fmt: skip
            return steps, rate, 1.0
        if o.lr_scheduler_type == "cycle":
            return o.max_train_steps or o.knots[0][-1], cycle(*o.knots), 1.0
        factor = schedule(
            o.lr_scheduler_type, steps, warmup, peak=o.learning_rate, cycles=o.lr_num_cycles
        )
        return steps, factor, o.learning_rate

    # -- training -------------------------------------------------------------------------------

    def train(self, tokenizer: Any = None) -> dict[str, Any]:
        """Trains (or goes on), puts the best weights back, saves the result; figures of the run.

        Args:
            tokenizer: saved beside a whole model.
        """
        trainer, training = self.trainer, self.training
        if self.checkpoint is not None:
            trainer.resume(self.checkpoint)
            self.print_once(f"going on from {self.checkpoint}, step {trainer.progress.step}")
        resumed = None if self.checkpoint is None else trainer.progress.step
        self.folder.open(training.seed, str(trainer.device), resumed)
        self.accelerator.wait_for_everyone()
        if self.accelerator.log_with:
            self.accelerator.init_trackers(training.project_prefix + self.title.split()[0])
        trainer.train()
        trainer.load_best()
        if self.accelerator.is_main_process:
            self._save(tokenizer)
        return self._figures()

    def _save(self, tokenizer: Any) -> None:
        """Writes the result: the adapter or the model, and the posterior beside it."""
        folder = self.folder.path / self.options.method.folder
        try:
            self.adapted.save(folder)
            if self.built is not None and self.built.posterior is not None:
                self.built.posterior.save(folder, self.adapted.model)
            if self.source.base is not None:
                base_weights.write(folder, self.source.base)
            if tokenizer is not None and self.options.method.folder == "model":
                tokenizer.save_pretrained(folder)
        except Exception as error:
            if isinstance(error, OSError) or is_disk_full(error):
                raise saving_failed(folder, error) from error
            raise

    def _figures(self) -> dict[str, Any]:
        trainer, state = self.trainer, self.trainer.progress
        tokens = trainer.over_processes(state.tokens)
        return {
            "steps": state.step,
            "epochs": trainer.epoch(),
            "best_step": state.best_step,
            "best_epoch": None if state.best_step is None else trainer.epoch(state.best_step),
            "train_seconds": round(state.seconds, 3),
            "train_tokens": int(tokens),
            "tokens_per_second": round(tokens / state.seconds, 1) if state.seconds else None,
        }

    # -- reporting ------------------------------------------------------------------------------

    def add_flops(
        self, figures: dict[str, Any], lengths: np.ndarray, scored: int | None = None
    ) -> None:
        """Adds `train_flops` to what `train` returned; the arguments are `training_flops`' own."""
        sampler = self.trainer.sampler
        passes = 1 if sampler is None else sampler.mc_samples
        figures["train_flops"] = passes * training_flops(
            self.adapted.model, figures["train_tokens"], lengths, scored
        )

    def finish(self, metrics: dict[str, float], figures: dict[str, Any]) -> None:
        """Writes `all_results.json` and the learning curve, and prints the final table.

        Args:
            metrics: of the result.
            figures: what `train` returned; empty where nothing was trained.
        """
        more = dict(self.extra)
        results = {**metrics, **self.test_metrics, **figures, **self._sizes()}
        results["main_metric"] = self.main_metric
        self.trainer.let_go()
        self.accelerator.end_training()
        if not self.accelerator.is_main_process:
            return
        title = f"{self.title}, {self.options.method.name}"
        if self.adapted.summarize is not None and metrics:
            where = self.folder.path if figures else None
            more |= self.adapted.summarize(metrics, self.main_metric, title, where)
        results |= more
        curve = self.folder.path / CURVE
        why_not = None
        if figures:
            card = self.folder.path / self.options.method.folder
            write_card(card, self.folder.config, results, source_commit())
            self.folder.write_json(RESULTS, results)
            lines = (self.folder.read_lines(LOG), self.folder.read_lines(METRICS))
            why_not = learning_curve(curve, *lines, self.main_metric, title)
        shown = summary_metrics(results, self.main_metric, self.trainer.predictor.variants(True))
        print(table(title, shown, more))
        if figures:
            print(f"  learning curve        {why_not or curve}")
            if self.training.plots:
                print(f"  pictures              {self._plot(title) or self.folder.path / PLOTS}")
            print(f"  result                {self.folder.path / self.options.method.folder}")

    def _sizes(self) -> dict[str, Any]:
        """Parameters, wall time and memory of the run."""
        parameters = list(self.adapted.model.parameters())
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        total = sum(p.numel() for p in parameters)
        return {
            "trainable_parameters": trained,
            "total_parameters": total,
            "trainable_share": trained / total,
            "wall_seconds": round(time.perf_counter() - self.options.started, 3),
            "peak_memory_bytes": peak_memory(str(self.trainer.device)),
        }

    def _plot(self, title: str) -> str | None:
        """Pictures of what method and optimiser have to show; why there are none, or None."""
        posterior = None if self.built is None else self.built.posterior
        if self.adapted.plot is None and posterior is None:
            return f"none: neither {self.options.method.name} nor its optimiser has any"
        folder = self.folder.path / PLOTS
        folder.mkdir(exist_ok=True)
        try:
            if self.adapted.plot is not None:
                self.adapted.plot(folder, title, self.folder.read_lines(METRICS))
            if posterior is not None:
                posterior.plot(folder, title, self.adapted.model)
        except ImportError as error:
            return f"none: {error}"
        return None


def train_and_evaluate(
    run: Run,
    data: TaskData,
    write_predictions: WritePredictions | None = None,
    loss: Loss | None = None,
    predict_split: PredictSplit | None = None,
) -> None:
    """The whole of a run: reads and encodes its data, trains, evaluates, predicts, reports.

    Args:
        run: not built yet.
        data: its splits.
        write_predictions: (folder, test split, its rows, prediction) -> the file it has written.
        loss: see `Run.build`.
        predict_split: (run, test split, encoded rows) -> its metrics, where predicting is more than
            a forward pass: on all processes together, instead of `write_predictions`.
    """
    error: BaseException | None = None
    try:
        _train_and_evaluate(run, data, write_predictions, loss, predict_split)
    except BaseException as raised:
        error = raised
        raise
    finally:
        run.folder.close(error)


def _train_and_evaluate(
    run: Run,
    data: TaskData,
    write_predictions: WritePredictions | None,
    loss: Loss | None,
    predict_split: PredictSplit | None,
) -> None:
    if data.found:
        run.print_once(data.found)
    model: ModelOptions = run.options[ModelOptions]
    tokenizer = as_user_error(
        AutoTokenizer.from_pretrained,
        model.tokenizer_name or model.model_name_or_path,
        revision=model.revision,
        local_files_only=model.local_files_only,
        **data.tokenizer_options,
    )
    o, training = data.options, run.training
    with run.accelerator.main_process_first():  # one process fills the cache of encoded data
        rows = {split: data.read(split, o.max_eval_samples) for split in data.evaluated}
        rows |= {split: data.read(split, o.max_predict_samples) for split in data.tests}
        if training.do_train:
            rows["train"] = data.read("train", o.max_train_samples)
        splits = {split: data.encode(r, tokenizer) for split, r in rows.items()}
    for split in splits.keys() & {"train", *data.evaluated}:
        run.note_read(split, splits[split])
    sets = [data.evaluation_set(name, splits[split]) for split, name in data.evaluated.items()]
    train = data.training_batches(splits["train"]) if training.do_train else None
    collate = None if train is None else data.collate(splits["train"])
    teacher: TeacherOptions = run.options[TeacherOptions]
    if train is not None and teacher.teacher is not None:
        source = Teacher(teacher, run.source, data, tokenizer, run.accelerator)
        run.read["teacher"] = source.key
        collate, loss = source.teach(train, collate, loss)
        run.print_once(source.message)
    memory = None
    if training.forgetting is not None and run.accelerator.is_main_process:
        where = (training.forgetting, model, tokenizer, str(run.accelerator.device))
        memory = as_user_error(Forgetting, *where)
    trainer = run.build(train, collate, sets, loss)
    figures: dict[str, Any] = {}
    if train is not None:
        run.print_once(
            f"{data.task.name}: {len(splits['train']):,} training rows, {trainer.total_steps:,} "
            f"steps of {train.global_batch_size} rows"
        )
        figures = run.train(tokenizer)
        counts, lengths = data.counts(splits["train"]), data.sequence_lengths(splits["train"])
        scored = None if counts is None else int(counts.sum())
        run.add_flops(figures, lengths, scored)
    metrics = trainer.evaluate(final=True) if sets else {}
    for split in data.tests:
        if predict_split is not None:
            run.test_metrics |= predict_split(run, split, splits[split])
            continue
        found = data.evaluation_set(split, splits[split])
        predictions = predict(
            trainer.unwrapped, found, run.accelerator, trainer.predictor, final=True
        )
        for variant, prediction in predictions.items() if run.accelerator.is_main_process else ():
            folder = run.folder.path / SUBMISSION / variant
            path = write_predictions(folder, split, rows[split], prediction)
            print(f"predictions of {split}{f' at {variant}' if variant else ''}: {path}")
    if memory is not None:
        run.extra |= memory.figures(trainer.unwrapped)
    run.finish(metrics, figures)
