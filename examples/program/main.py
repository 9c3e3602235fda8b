"""What every program does around its task: options, errors, trainer, results, the final table.

A program gives its work to `run_main`. The work calls `parse` with its option classes, reads data,
names a head, and hands both to `Run`.
"""

from __future__ import annotations

import dataclasses
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from examples.cli import fields as config
from examples.cli.fields import OptionError
from examples.cli.groups import TRACKERS, TrainingOptions
from examples.methods.registry import METHODS, OPTIMIZERS, Entry, MethodOptions, RunFacts
from examples.training import memory, threads

if TYPE_CHECKING:
    from accelerate import Accelerator

    from examples.data.batches import TrainingBatches
    from examples.evaluation.prediction import EvaluationSet, Predictor
    from examples.methods.common import ModelSource
    from examples.training.trainer import Trainer

memory.keep_compiled_kernels()  # before torch is imported
memory.keep_freed_memory()


@dataclass(frozen=True)
class Options:
    """All options of a run.

    Attributes:
        groups: option class -> its instance.
        method: the chosen method; `method_options` are its own.
        optimizer: the chosen optimiser; `optimizer_options` are its own.
        began: when they were read, for the wall time.
    """

    groups: dict[type, Any]
    method: Entry
    method_options: Any
    optimizer: Entry
    optimizer_options: Any
    began: float = dataclasses.field(default_factory=time.perf_counter)

    def __getitem__(self, owner: type) -> Any:
        return self.groups[owner]

    def resolved(self) -> dict[str, Any]:
        """Every option by name, as `--config` reads it."""
        values: dict[str, Any] = {}
        for part in (*self.groups.values(), self.method_options, self.optimizer_options):
            values.update(dataclasses.asdict(part))
        values |= {"method": self.method.name, "optimizer": self.optimizer.name}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def parse(
    argv: Sequence[str], program: str, summary: str, owners: Mapping[str, type], row: str | None
) -> Options | None:
    """Options from the command line and `--config`; None after `--help`.

    Args:
        argv: the words after the program's name.
        program: its module, for `--help`.
        summary: what it does.
        owners: title -> option class, beside those of method and optimiser.
        row: the option whose value chooses a row of a config file's `tasks`.
    """
    owners = {**owners, "method": MethodOptions}
    entries = {f"method {e.name}": e for e in METHODS.values()}
    entries |= {f"optimizer {e.name}": e for e in OPTIMIZERS.values()}
    if any(word in ("-h", "--help") for word in argv):
        groups = {**owners, **{f"{title} ({e.summary})": e.options for title, e in entries.items()}}
        print(config.help_text(program, summary, groups))
        return None
    everything = config.fields_of([*owners.values(), *(e.options for e in entries.values())])
    typed = config.given_on_command_line(argv, everything)
    values: dict[str, Any] = {}
    file = typed.pop("config", None)
    given = config.canonical(typed, everything, "command line")
    if file is not None:
        from_file = config.read_file(file, given.get(row or ""))
        values = config.canonical(from_file, everything, f"--config {file}")
    values |= given
    method, optimizer = config.build(MethodOptions, values).entries()
    _refuse_options_of_others(given, owners, entries, method, optimizer)
    groups = {owner: config.build(owner, values) for owner in owners.values()}
    return Options(
        groups,
        method,
        config.build(method.options, values),
        optimizer,
        config.build(optimizer.options, values),
    )


def _refuse_options_of_others(
    given: Mapping[str, Any],
    owners: Mapping[str, type],
    entries: Mapping[str, Entry],
    method: Entry,
    optimizer: Entry,
) -> None:
    """An option on the command line that the chosen method does not have would do nothing."""
    known = config.fields_of([*owners.values(), method.options, optimizer.options])
    for name in given:
        if name not in known:
            title = next(t for t, e in entries.items() if name in config.fields_of([e.options]))
            kind = title.split()[0]
            raise OptionError(
                f"--{name} is an option of {kind} {title.split()[1]}, but --{kind} is "
                f"{method.name if kind == 'method' else optimizer.name}"
            )


def run_main(work: Callable[[Sequence[str]], int], argv: Sequence[str] | None = None) -> int:
    """Runs a program; what a user can mend is one line on stderr and exit status 2."""
    threads.spin_briefly_beside_others()  # before torch is imported
    try:
        return work(sys.argv[1:] if argv is None else argv)
    except BrokenPipeError:  # whoever read our output has seen enough
        sys.stderr.close()
        return 1
    except KeyboardInterrupt:
        print("interrupted; --resume_from_checkpoint auto goes on", file=sys.stderr)
        return 130
    except Exception as error:
        if not is_users(error):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2


def is_users(error: Exception) -> bool:
    """Whether an error's message says what its user should change."""
    if isinstance(error, OptionError):
        return True
    from examples.data.tables import DataError
    from examples.training.checkpoints import RunError
    from transformers_patched.checkpoint import CheckpointError
    from transformers_patched.configuration import ConfigError

    return isinstance(error, (RunError, DataError, CheckpointError, ConfigError, SetupError))


class SetupError(ValueError):
    """What a part refused while a run was put together: options that do not fit, missing files."""


def put_together(build: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls `build`; what it refuses is the user's to mend, and its message says how."""
    try:
        return build(*args, **kwargs)
    except (ValueError, NotImplementedError, OSError) as error:
        if is_users(error):
            raise
        raise SetupError(str(error)) from error


# -- the run ------------------------------------------------------------------------------------


def make_accelerator(options: TrainingOptions) -> Accelerator:
    """Devices, processes, precision and trackers, with the seed set."""
    import torch
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import set_seed

    AcceleratorState._reset_state()  # a sweep makes several runs in one process
    set_seed(options.seed)
    wanted = TRACKERS if options.report_to == ("all",) else options.report_to
    trackers = [] if wanted == ("none",) else [_tracker(t, options.report_to) for t in wanted]
    trackers = [tracker for tracker in trackers if tracker]
    launched = int(os.environ.get("WORLD_SIZE", "1"))
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
    return accelerator


def _tracker(name: str, asked: Sequence[str]) -> str | None:
    """The tracker, if installed; where it was asked for by name, it must be."""
    from importlib.util import find_spec

    if find_spec(name) is not None:
        return name
    if "all" in asked:
        return None
    raise OptionError(f"--report_to {name}: not installed; pip install {name}")


def rows_at_once(options: TrainingOptions, processes: int) -> int:
    """Rows per forward pass and process: of a stated global batch, as many as divide it evenly."""
    limit = options.per_device_train_batch_size
    if options.global_batch_size is None:
        return limit
    own, rest = divmod(options.global_batch_size, processes)
    if rest or not own:
        raise OptionError(
            f"--global_batch_size {options.global_batch_size} is no multiple of the {processes} "
            f"processes; {max(1, own) * processes} is"
        )
    return max(size for size in range(1, min(limit, own) + 1) if own % size == 0)


def accumulation(options: TrainingOptions, processes: int) -> int:
    """Forward passes per optimiser step and process."""
    if options.global_batch_size is None:
        return options.gradient_accumulation_steps
    return options.global_batch_size // (rows_at_once(options, processes) * processes)


@dataclass
class Run:
    """A run put together: model, optimiser, trainer, folder; `go` does it.

    Args:
        options: of the program.
        accelerator: from `make_accelerator`.
        source: where the model comes from.
        title: the run in a few words: task and model.
        main_metric: chooses the best weights.
        tokenizer: saved beside a whole model.
    """

    options: Options
    accelerator: Accelerator
    source: ModelSource
    title: str
    main_metric: str
    tokenizer: Any = None

    def __post_init__(self) -> None:
        from examples.training.run_folder import RunFolder

        self.training: TrainingOptions = self.options[TrainingOptions]
        self.folder = RunFolder(
            Path(self.training.output_dir).expanduser(),
            self.options.resolved(),
            self.accelerator.is_main_process,
        )
        self.checkpoint: Path | None = None
        if self.training.do_train:
            self.checkpoint = self.folder.check(
                self.training.overwrite_output_dir, self.training.resume_from_checkpoint
            )
        self.accelerator.wait_for_everyone()

    def say(self, text: str) -> None:
        """Prints on the main process."""
        if self.accelerator.is_main_process:
            print(text)

    def build(
        self,
        train: TrainingBatches | None,
        collate: Callable[..., dict[str, Any]] | None,
        evaluations: list[EvaluationSet],
        loss: Callable[..., Any] | None = None,
    ) -> Trainer:
        """Loads the model, puts the method's adapters in, makes optimiser and trainer."""
        from examples.training.trainer import Trainer

        self.source.speak = self.accelerator.is_main_process
        build = self.options.method.load()
        self.adapted = put_together(build, self.source, self.options.method_options)
        if self.training.gradient_checkpointing:
            self.adapted.model.gradient_checkpointing_enable()
        arguments: dict[str, Any] = {"evaluations": evaluations, "main_metric": self.main_metric}
        self.optimizer = None
        if train is not None:
            steps, schedule, rate = self._schedule(len(train))
            self.optimizer = self._optimizer(len(train.split), rate)
            arguments |= {
                "train": train, "collate": collate, "schedule": schedule, "total_steps": steps
            }  # fmt: skip
        elif self.options.optimizer.posterior:
            self.optimizer = self._optimizer(0, self.training.learning_rate)
        if loss is not None:
            arguments["loss"] = loss
        self.trainer = put_together(
            Trainer,
            self.adapted.model,
            None if train is None else self.optimizer,
            self.training,
            self.accelerator,
            self.folder,
            predictor=self._predictor(),
            **arguments,
        )
        return self.trainer

    def _optimizer(self, rows: int, rate: float) -> Any:
        """The optimiser of `rows` training rows, with the posterior of what the run starts from."""
        o = self.training
        optimizer = put_together(
            self.options.optimizer.load(),
            self.adapted.model.parameter_groups(rate, o.weight_decay),
            self.options.optimizer_options,
            RunFacts(
                rows,
                o.seed,
                fp16=o.mixed_precision == "fp16",
                processes=self.accelerator.num_processes,
                device=str(self.accelerator.device),
            ),
        )
        posterior = getattr(optimizer, "posterior", None)
        if posterior is not None:
            adapter = getattr(self.options.method_options, "lora_path", None)
            start = Path(adapter or self.source.name_or_path).expanduser()
            said = put_together(posterior.load, start, self.adapted.model)
            if adapter is not None:
                self.say(said)
        return optimizer

    def _predictor(self) -> Predictor:
        """The method's way to predict, averaged over the optimiser's posterior where asked for."""
        from examples.evaluation.prediction import PlainPredictor

        predictor = self.adapted.predictor or PlainPredictor()
        averaged = getattr(self.optimizer, "predictor", None)
        if averaged is not None:
            averaged.inner = predictor
            predictor = averaged
        if self.training.calibration:
            predictor.probabilistic = True
        return predictor

    def _schedule(self, per_epoch: int) -> tuple[int, Callable[[int], float], float]:
        """Steps of the run, λ(step), and the peak rate."""
        from examples.training.schedules import clr, schedule

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
        factor = schedule(
            o.lr_scheduler_type, steps, warmup, peak=o.learning_rate, cycles=o.lr_num_cycles
        )
        return steps, factor, o.learning_rate

    def train(self) -> dict[str, Any]:
        """Trains (or goes on), puts the best weights back, saves the result; figures of the run."""
        from examples.training.checkpoints import is_disk_full, saving_failed

        trainer, training = self.trainer, self.training
        if self.checkpoint is not None:
            trainer.resume(self.checkpoint)
            self.say(f"going on from {self.checkpoint}, step {trainer.progress.step}")
        resumed = None if self.checkpoint is None else trainer.progress.step
        self.folder.open(training.seed, str(trainer.device), resumed)
        self.accelerator.wait_for_everyone()
        if self.accelerator.log_with:
            self.accelerator.init_trackers(training.project_prefix + self.title.split()[0])
        trainer.train()
        trainer.load_best()
        if self.accelerator.is_main_process:
            folder = self.folder.path / self.adapted.folder
            try:
                self.adapted.save(folder)
                if hasattr(self.optimizer, "posterior"):
                    self.optimizer.posterior.save(folder, self.adapted.model)
                if self.tokenizer is not None and self.adapted.folder == "model":
                    self.tokenizer.save_pretrained(folder)
            except Exception as error:
                if isinstance(error, OSError) or is_disk_full(error):
                    raise saving_failed(folder, error) from error
                raise
        return self._figures()

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

    def finish(self, metrics: dict[str, float], figures: dict[str, Any]) -> None:
        """Writes `all_results.json` and the learning curve, and prints the final table."""
        from examples.evaluation.prediction import worth_showing
        from examples.plots.curves import learning_curve
        from examples.training.run_folder import CURVE, LOG, METRICS, RESULTS

        parameters = list(self.adapted.model.parameters())
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        total = sum(p.numel() for p in parameters)
        results = {
            **metrics,
            **figures,
            "trainable_parameters": trained,
            "total_parameters": total,
            "trainable_share": trained / total,
            "wall_seconds": round(time.perf_counter() - self.options.began, 3),
            "peak_memory_bytes": peak_memory(str(self.trainer.device)),
        }
        self.accelerator.end_training()
        if not self.accelerator.is_main_process:
            return
        title = f"{self.title}, {self.options.method.name}"
        more: dict[str, Any] = {}
        if self.adapted.conclude is not None and metrics:
            where = self.folder.path if figures else None
            more = self.adapted.conclude(metrics, self.main_metric, title, where)
            results |= more
        curve = self.folder.path / CURVE
        why_not = None
        if figures:
            self.folder.write_json(RESULTS, results)
            rows = (self.folder.read_lines(LOG), self.folder.read_lines(METRICS))
            why_not = learning_curve(curve, *rows, self.main_metric, title)
        shown = worth_showing(results, self.main_metric, self.trainer.predictor.views(True))
        print(table(title, shown, more))
        if figures:
            print(f"  learning curve        {why_not or curve}")
            if self.training.plots:
                print(f"  pictures              {self._draw() or self.folder.path}")
            print(f"  result                {self.folder.path / self.adapted.folder}")

    def _draw(self) -> str | None:
        """Pictures of what method and optimiser have to show; why there are none, or None."""
        posterior = getattr(self.optimizer, "posterior", None)
        title = f"{self.title}, {self.options.method.name}"
        try:
            if self.adapted.pictures is not None:
                self.adapted.pictures(self.folder, title)
            if posterior is not None:
                posterior.pictures(self.folder.path, title, self.adapted.model)
        except ImportError as error:
            return f"none: {error}"
        if self.adapted.pictures is None and posterior is None:
            return f"none: neither {self.options.method.name} nor its optimiser has any"
        return None


def table(title: str, results: dict[str, Any], more: dict[str, Any]) -> str:
    """The end of a run, for people; `more` are the method's own figures."""
    lines: list[tuple[str, str]] = []
    for name, value in results.items():
        if name.startswith("eval_"):
            lines.append((name, f"{value:.4f}"))
    lines += [(name.replace("_", " "), f"{value:g}") for name, value in more.items()]
    if results.get("best_epoch") is not None:
        lines.append(("best epoch", f"{results['best_epoch']:g} of {results['epochs']:g}"))
    share = 100 * results["trainable_share"]
    lines.append(("trainable parameters", f"{results['trainable_parameters']:,} ({share:.2f} %)"))
    if "train_seconds" in results:
        lines.append(("training seconds", f"{results['train_seconds']:.1f}"))
        if results["tokens_per_second"]:
            lines.append(("real tokens per second", f"{results['tokens_per_second']:,.0f}"))
    lines.append(("wall seconds", f"{results['wall_seconds']:.1f}"))
    lines.append(("peak memory", f"{results['peak_memory_bytes'] / 2**20:,.0f} MiB"))
    width = max(len(name) for name, _ in lines)
    rule = "─" * max(48, len(title))
    return "\n".join(["", title, rule, *(f"  {n:<{max(width, 20)}}  {v}" for n, v in lines)])


def peak_memory(device: str) -> int:
    """Bytes: the most a GPU had allocated, else the most this process had resident."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated()
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
