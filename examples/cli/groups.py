"""The options that programs share: model, data, training. No torch here, so `--help` is quick."""

from __future__ import annotations

from dataclasses import MISSING, dataclass

from examples.cli.fields import option
from examples.errors import OptionError

TRACKERS = ("tensorboard", "wandb", "trackio")
SCHEDULES = (  # their formulas: examples/training/schedules.py
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "clr",
    "cycle",
)


@dataclass(frozen=True)
class ModelOptions:
    model_name_or_path: str = option(MISSING, "folder or hub id of the pretrained model")
    tokenizer_name: str | None = option(None, "folder or hub id of another tokenizer")
    revision: str | None = option(None, "branch, tag or commit on the hub")
    local_files_only: bool = option(False, "never ask the hub")
    ignore_mismatched_sizes: bool = option(
        False,
        "re-initialise parameters whose shape differs from the checkpoint's, such as a head for "
        "other labels",
    )
    base_dtype: str = option(
        "auto",
        "dtype of frozen weights and of the activations; what is trained stays float32. auto: "
        "bfloat16 where the hardware multiplies it (full fine-tuning: float32)",
        choices=("auto", "float32", "bfloat16"),
    )


@dataclass(frozen=True)
class DataOptions:
    task_name: str | None = option(None, "a task")
    data_dir: str | None = option(
        None, "folder with a folder per task, or the task's own; without it the hub is read"
    )
    train_file: str | None = option(None, "training file of your own (tsv csv json jsonl parquet)")
    validation_file: str | None = option(None, "its validation file")
    test_file: str | None = option(None, "its test file, for --do_predict")
    dataset_name: str | None = option(None, "a dataset of your own: hub id or folder")
    dataset_config_name: str | None = option(None, "its configuration")
    text_column: tuple[str, ...] | None = option(
        None, "the one or two text columns of data of your own; without it they are found"
    )
    label_column: str | None = option(None, "its label column (label)")
    max_length: int = option(128, "tokens per row; longer rows are cut", low=3)
    pad_to_max_length: bool = option(False, "pad every row to max_length (slow)")
    group_by_length: bool | None = option(
        None, "let rows of like length meet: little padding; by default unless packed"
    )
    packing: bool = option(False, "no padding at all: the tokens of a batch end to end")
    max_tokens: int | None = option(
        None, "with packing: tokens per forward pass; a step keeps its number of rows", low=1
    )
    max_train_samples: int | None = option(None, "use only the first rows of the split", low=1)
    max_eval_samples: int | None = option(None, "use only the first rows of each split", low=1)
    max_predict_samples: int | None = option(None, "use only the first rows of each split", low=1)
    cache_dir: str | None = option(None, "where encoded data is kept ($RANKWISE_CACHE)")
    cache: bool = option(True, "keep encoded data for the next run")

    def __post_init__(self) -> None:
        if self.max_tokens is not None and not self.packing:
            raise OptionError("--max_tokens goes with --packing")
        if self.packing and self.pad_to_max_length:
            raise OptionError("--packing and --pad_to_max_length exclude each other")
        own = [n for n in ("train_file", "validation_file", "test_file") if getattr(self, n)]
        ways = [self.task_name is not None, bool(own), self.dataset_name is not None]
        if sum(ways) != 1:
            raise OptionError(
                "give --task_name, or --train_file and --validation_file, or --dataset_name"
                + (", only one of these" if sum(ways) > 1 else "")
            )
        self._check_columns()

    def _check_columns(self) -> None:
        for name in ("text_column", "label_column"):
            if getattr(self, name) and self.task_name is not None:
                raise OptionError(
                    f"--{name} goes with --train_file or --dataset_name: the columns of "
                    f"{self.task_name} are known"
                )
        text = self.text_column or ()
        if len(text) > 2 or len(set(text)) < len(text):
            raise OptionError(f"--text_column {','.join(text)}: name one or two columns")

    @property
    def order(self) -> str:
        """How training rows meet: "bucket" or "random".

        Where length goes with the label, batches of like length are alike (on STS-B their mean
        labels vary 1.6 times as much as those of random batches): less padding is worth that.
        """
        by_length = not self.packing if self.group_by_length is None else self.group_by_length
        return "bucket" if by_length else "random"


@dataclass(frozen=True)
class TrainingOptions:
    output_dir: str = option(MISSING, "the run's folder")
    overwrite_output_dir: bool = option(
        False, "replace the run in output_dir, which is kept until the new one has ended"
    )
    resume_from_checkpoint: str | None = option(
        None, "auto: the newest checkpoint in output_dir, if any; or a checkpoint folder"
    )
    do_train: bool = option(True, "train")
    do_eval: bool = option(True, "evaluate")
    do_predict: bool = option(False, "write predictions for the test split (GLUE submission files)")
    seed: int = option(0, "of initial weights, data order and dropout", low=0)
    learning_rate: float = option(5e-5, "peak learning rate (clr has its own)", low=0)
    weight_decay: float = option(0.0, "not on biases and normalisation weights", low=0)
    max_grad_norm: float = option(1.0, "gradients are scaled down to this norm; 0: never", low=0)
    label_smoothing_factor: float = option(0.0, "share of the label spread evenly", low=0, high=1)
    num_train_epochs: float = option(3.0, "passes over the training data", low=0)
    max_train_steps: int | None = option(None, "optimiser steps, instead of epochs")
    per_device_train_batch_size: int = option(8, "rows per forward pass and process", low=1)
    per_device_eval_batch_size: int = option(64, "rows per forward pass and process", low=1)
    gradient_accumulation_steps: int = option(1, "forward passes per optimiser step", low=1)
    global_batch_size: int | None = option(
        None,
        "rows per optimiser step, over all processes: accumulation follows from it, and "
        "per_device_train_batch_size is an upper limit",
        low=1,
    )
    lr_scheduler_type: str = option("linear", "learning rate over training", choices=SCHEDULES)
    num_warmup_steps: int = option(0, "optimiser steps of linear warm-up", low=0)
    warmup_ratio: float = option(
        0.0, "the same as a share of all steps, where num_warmup_steps is 0", low=0, high=1
    )
    lr_num_cycles: int = option(1, "cycles of cosine_with_restarts", low=1)
    lr_schedule_first_lr: float = option(2.0, "clr: rate until const_epochs", low=0)
    lr_schedule_const_epochs: float = option(
        1.0, "clr: epochs (above 100: steps) at first_lr, warm-up included", low=0
    )
    lr_schedule_second_lr: float = option(0.2, "clr: rate after that", low=0)
    lr_schedule_end_lr: float = option(0.0, "clr: rate at the end", low=0)
    i_steps: tuple[str, ...] = option(
        ("0",),
        "cycle: optimiser steps from 0 on, with straight lines between them; the last ends the "
        "run, unless max_train_steps does",
    )
    i_lrs: tuple[str, ...] = option(("0.00025",), "cycle: the rates at them")
    mixed_precision: str = option("no", "autocast", choices=("no", "bf16", "fp16"))
    gradient_checkpointing: bool = option(False, "less memory, about a third more time")
    compile: bool = option(False, "torch.compile; says whether the run is long enough to pay")
    eval_strategy: str = option(
        "epoch",
        "evaluate after epochs, every eval_steps, or only at the end",
        choices=("epoch", "steps", "no"),
    )
    eval_steps: int = option(0, "also evaluate every so many optimiser steps; 0: not", low=0)
    eval_after_epochs: int = option(0, "evaluations within epochs begin at this epoch", low=0)
    save_strategy: str = option("epoch", "when to save", choices=("epoch", "steps", "no"))
    save_steps: int | str = option(0, "save every so many optimiser steps (or: epoch)")
    save_total_limit: int = option(2, "checkpoints kept beside the best one; 0: all", low=0)
    load_best_model_at_end: bool = option(True, "the best evaluation's weights are the result")
    metric_for_best_model: str | None = option(None, "default: the task's own; `loss` is possible")
    early_stopping_patience: int = option(
        0, "stop after so many evaluations without a better one; 0: never", low=0
    )
    logging_steps: int = option(50, "log the loss every so many optimiser steps; 0: never", low=0)
    calibration: bool = option(
        False,
        "NLL, calibration error and entropy of classes; always where predictions are averaged",
    )
    forgetting: str | None = option(
        None,
        "held-out text file, a text a line: how much the model's loss as a language model rises "
        "there by this training",
    )
    plots: bool = option(
        False, "what method and optimiser have to show, as pictures in plots/ of the run"
    )
    report_to: tuple[str, ...] = option(("none",), "trackers", choices=("none", "all", *TRACKERS))
    project_prefix: str = option("rankwise_", "the trackers' project is this and the task")
    disable_tqdm: bool = option(False, "plain lines instead of a progress bar")

    def __post_init__(self) -> None:
        if isinstance(self.save_steps, str):
            if self.save_steps != "epoch":
                raise OptionError(f"--save_steps {self.save_steps}: a whole number, or epoch")
            object.__setattr__(self, "save_steps", 0)
        elif self.save_steps > 0 and self.save_strategy == "epoch":
            object.__setattr__(self, "save_strategy", "steps")
        if self.save_strategy == "steps" and self.save_steps < 1:
            raise OptionError("--save_strategy steps needs --save_steps, such as 500")
        if self.eval_strategy == "steps" and self.eval_steps < 1:
            raise OptionError("--eval_strategy steps needs --eval_steps, such as 500")
        if self.global_batch_size is not None and self.gradient_accumulation_steps != 1:
            raise OptionError(
                "--global_batch_size sets the accumulation; leave --gradient_accumulation_steps out"
            )
        if self.max_train_steps is not None and self.max_train_steps < 1:
            object.__setattr__(self, "max_train_steps", None)
        if self.num_train_epochs == 0 and self.max_train_steps is None and self.do_train:
            raise OptionError("--num_train_epochs 0: use --eval_only to evaluate without training")
        if self.lr_scheduler_type == "cycle":
            self._check_cycle()
        if "none" in self.report_to and len(self.report_to) > 1:
            raise OptionError("--report_to none stands alone")
        if not (self.do_train or self.do_eval or self.do_predict):
            raise OptionError("nothing to do: --do_train, --do_eval and --do_predict are all off")

    @property
    def knots(self) -> tuple[list[int], list[float]]:
        """Of the schedule cycle: steps, and the rates at them."""
        return [int(word) for word in self.i_steps], [float(word) for word in self.i_lrs]

    def _check_cycle(self) -> None:
        try:
            steps, rates = self.knots
        except ValueError as error:
            raise OptionError(f"--i_steps and --i_lrs are numbers ({error})") from None
        wrong = steps != sorted(set(steps)) or not steps or steps[0] != 0
        if wrong or len(rates) != len(steps) or min(rates) < 0:
            raise OptionError(
                f"--i_steps {','.join(self.i_steps)} --i_lrs {','.join(self.i_lrs)}: give rising "
                "steps from 0 on and as many rates, such as 0,400,1000 and 0,0.001,0"
            )
        if self.max_train_steps is None and steps[-1] == 0 and self.do_train:
            raise OptionError(
                "--lr_scheduler_type cycle ends with the last of --i_steps, which is 0: give steps "
                "such as 0,400,1000, or --max_train_steps"
            )


@dataclass(frozen=True)
class TeacherOptions:
    teacher: str | None = option(
        None,
        "learn from this trained model's predictions too: a model's or an adapter's folder, or "
        "that of a run; it must know the same labels and tokens",
    )
    alpha_distil: float = option(0.5, "weight of T²·KL(teacher ‖ student)", low=0)
    alpha_ce: float = option(0.5, "weight of the loss against the labels", low=0)
    temperature: float = option(2.0, "T: both models' logits are divided by it", low=0)

    def __post_init__(self) -> None:
        if self.temperature == 0:
            raise OptionError("--temperature 0: must be more than 0, such as 2.0")
        if self.teacher is not None and self.alpha_distil == 0:
            raise OptionError(
                "--alpha_distil 0 leaves --teacher nothing to do: leave the teacher out"
            )


# What every program that trains on a task has; method and optimiser add theirs.
OPTION_CLASSES: dict[str, type] = {
    "model": ModelOptions,
    "data": DataOptions,
    "training": TrainingOptions,
    "teacher": TeacherOptions,
}
