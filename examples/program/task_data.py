"""The splits of a run: read, encoded, batched, scored."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from examples.cli.groups import DataOptions, ModelOptions, TrainingOptions
from examples.data import batches as batching
from examples.data.batches import Batch, TrainingBatches
from examples.data.custom import Columns
from examples.data.encode import EncodedSplit, encode
from examples.data.readers import RawSplit, read_file, read_hub, read_split
from examples.data.tasks import CUSTOM, Task, get_task
from examples.errors import OptionError, as_user_error
from examples.evaluation.calibration import calibration
from examples.evaluation.glue import compute
from examples.evaluation.prediction import Collate, EvaluationSet
from examples.methods.source import ModelSource
from examples.program.batching import accumulation, rows_at_once
from examples.training.distillation import Classes, Distilled


class TaskData:
    """Reads, encodes and batches the splits of one run; its metrics.

    Rows of sentences with one label each are what is known here. A program for another kind of task
    overrides what differs, and says in `distilled` what a teacher teaches.

    Args:
        options: the data options.
        training: the training options.
        processes: how many share the work.
        process: this one's number.

    Attributes:
        task: what is trained on.
        found: what data of one's own was found to hold, in one line for people, else "".
        distilled: where the distributions are that a teacher teaches; None: there are none.
        tokenizer_options: what the tokenizer is loaded with, beside what its files say.
    """

    tokenizer_options: Mapping[str, Any] = {}

    def __init__(
        self,
        options: DataOptions,
        training: TrainingOptions,
        processes: int = 1,
        process: int = 0,
    ) -> None:
        self.options, self.training = options, training
        self.share = {"processes": processes, "process": process}
        self._training_rows: RawSplit | None = None  # where reading the task has read them
        self.task = self._find_task()
        self.found = "" if self._training_rows is None else self._training_rows.found

    @property
    def distilled(self) -> Distilled | None:
        """The classes; a regression has none."""
        return None if self.task.regression else Classes()

    def _find_task(self) -> Task:
        """The task; columns and labels of one's own data come from its training split."""
        o = self.options
        if o.task_name is not None:
            return as_user_error(get_task, o.task_name)
        if o.dataset_name is None and o.train_file is None:
            raise OptionError("--train_file is needed: it says the columns and the labels")
        self._training_rows = self._rows(CUSTOM, "train")
        return self._training_rows.task

    def _rows(self, task: Task, split: str) -> RawSplit:
        """Reads a split from wherever the options say."""
        o = self.options
        if o.task_name is not None:
            return read_split(task, o.data_dir, split)
        columns = Columns(o.text_column or (), o.label_column)
        if o.dataset_name is not None:
            return read_hub(task, o.dataset_name, o.dataset_config_name, split, columns)
        path = {"train": o.train_file, "validation": o.validation_file, "test": o.test_file}[split]
        if path is None:
            raise OptionError(f"--{split}_file is needed")
        return read_file(task, path, split, columns)

    def read(self, split: str, most: int | None) -> RawSplit:
        """Reads a split and keeps its first `most` rows."""
        rows = self._training_rows if split == "train" else None
        if rows is None:
            rows = self._rows(self.task, split)
        else:
            self._training_rows = None  # read once, and not kept
        return rows.take(range(most)) if most is not None and most < len(rows) else rows

    def encode(self, rows: RawSplit, tokenizer: Any) -> EncodedSplit:
        """Token ids of the rows, from the cache where they are there."""
        o = self.options
        return as_user_error(
            encode, rows, tokenizer, o.max_length, cache_dir=o.cache_dir, cache=o.cache
        )

    def collate(self, split: EncodedSplit) -> Collate:
        """batch -> arguments of the model, padded or packed as the options say."""
        o = self.options
        return partial(
            batching.collate,
            split,
            packed=o.packing,
            width=o.max_length if o.pad_to_max_length else None,
            multiple=8,
        )

    def training_batches(self, split: EncodedSplit) -> TrainingBatches:
        """The global batches of every epoch."""
        processes = self.share["processes"]
        return as_user_error(
            TrainingBatches,
            split,
            rows_at_once(self.training, processes),
            accumulation=accumulation(self.training, processes),
            seed=self.training.seed,
            order=self.options.order,
            max_tokens=self.options.max_tokens,
            counts=self.counts(split),
            **self.share,
        )

    def counts(self, split: EncodedSplit) -> np.ndarray | None:
        """(n,) what the loss of each row is a mean over; None: a row counts for one."""
        return None

    def sequence_lengths(self, split: EncodedSplit) -> np.ndarray:
        """(sequences,) tokens of everything that the model reads on its own."""
        return split.lengths

    # -- evaluation -----------------------------------------------------------------------------

    @property
    def evaluated(self) -> dict[str, str]:
        """split -> its name in metrics: `validation` -> "", `validation_matched` -> "matched"."""
        splits = self.task.evaluation if self.training.do_eval else {}
        return {s: name.removeprefix("validation").strip("_") for name, s in splits.items()}

    @property
    def tests(self) -> tuple[str, ...]:
        """The splits to predict."""
        return self.task.test_splits if self.training.do_predict else ()

    @property
    def main_metric(self) -> str:
        """What chooses the best weights, of the first evaluated split: `eval_f1`.

        Raises:
            OptionError: the task has no such metric.
        """
        metric = self.training.metric_for_best_model or self.task.main_metric
        metric = metric.removeprefix("eval_")
        known = (*self.task.metrics, "combined_score", "loss")
        if metric not in known and self.training.do_eval:
            raise OptionError(
                f"--metric_for_best_model {metric}: {self.task.name} has {', '.join(known)}"
            )
        first = next(iter(self.evaluated.values()), "")
        return f"eval_{first}_{metric}" if first else f"eval_{metric}"

    def score(self, labels: np.ndarray) -> Callable[[np.ndarray], dict[str, float]]:
        """(n, labels) logits -> metrics."""
        return lambda logits: compute(self.task, logits, labels)

    def evaluation_batches(self, split: EncodedSplit) -> Callable[[int], list[Batch]]:
        """(copies of a batch in one forward pass) -> this process's batches."""

        def batches(copies: int) -> list[Batch]:
            most = self.training.per_device_eval_batch_size
            return batching.evaluation_batches(split, max(1, most // copies), **self.share)

        return batches

    def evaluation_set(self, name: str, split: EncodedSplit) -> EvaluationSet:
        """A split to predict; scored where it has labels."""
        labels = split.labels
        return EvaluationSet(
            name,
            len(split),
            self.evaluation_batches(split),
            self.collate(split),
            score=self.score(labels),
            calibration=None if self.task.regression else lambda x: calibration(x, labels),
            calibrated=self.training.calibration,
        )


def sequence_classifier(options: ModelOptions, task: Task) -> ModelSource:
    """Where a run of `task`, which gives every row a label, gets its model from."""
    arguments: dict[str, Any] = {
        "revision": options.revision,
        "local_files_only": options.local_files_only,
        "ignore_mismatched_sizes": options.ignore_mismatched_sizes,
    }
    if task.regression:
        arguments |= {"num_labels": 1, "problem_type": "regression"}
    else:
        arguments |= {"id2label": task.id2label, "problem_type": "single_label_classification"}
    return ModelSource(
        options.model_name_or_path,
        "AutoModelForSequenceClassification",
        "SEQ_CLS",
        options.base_dtype,
        arguments,
    )
