"""The splits of a multiple-choice run, whose rows are questions."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from examples.cli.groups import ModelOptions
from examples.data.choice import (
    EncodedChoices,
    RawChoices,
    collate_choices,
    encode_choices,
    read_choices,
)
from examples.data.tasks.choice import CUSTOM_CHOICE, ChoiceTask, choice_task
from examples.errors import OptionError, as_user_error
from examples.evaluation.prediction import Collate
from examples.methods.source import ModelSource
from examples.program.task_data import TaskData


class ChoiceData(TaskData):
    """Reads, encodes and batches the questions of one run; arguments as for `TaskData`."""

    task: ChoiceTask

    def _find_task(self) -> ChoiceTask:
        o = self.options
        for name in ("text_column", "label_column"):
            if getattr(o, name):
                raise OptionError(
                    f"--{name} is not for multiple choice: its columns are question, choices and "
                    "label (or answerKey)"
                )
        return CUSTOM_CHOICE if o.task_name is None else as_user_error(choice_task, o.task_name)

    def _rows(self, task: ChoiceTask, split: str) -> RawChoices:
        o = self.options
        if o.task_name is not None:
            return read_choices(task, split, data_dir=o.data_dir)
        if o.dataset_name is not None:
            return read_choices(task, split, hub=(o.dataset_name, o.dataset_config_name))
        path = {"train": o.train_file, "validation": o.validation_file, "test": o.test_file}[split]
        if path is None:
            raise OptionError(f"--{split}_file is needed")
        return read_choices(task, split, file=path)

    def encode(self, rows: RawChoices, tokenizer: Any) -> EncodedChoices:
        """Token ids of every choice, from the cache where they are there."""
        o = self.options
        return as_user_error(
            encode_choices, rows, tokenizer, o.max_length, cache_dir=o.cache_dir, cache=o.cache
        )

    def collate(self, split: EncodedChoices) -> Collate:
        """batch of questions -> arguments of the model, padded or packed as the options say."""
        o = self.options
        return partial(
            collate_choices,
            split,
            packed=o.packing,
            width=o.max_length if o.pad_to_max_length else None,
            multiple=8,
        )

    def sequence_lengths(self, split: EncodedChoices) -> np.ndarray:  # type: ignore[override]
        """(choices,) tokens of every choice."""
        return split.pairs.lengths


def choice_model(options: ModelOptions) -> ModelSource:
    """Where a run gets a model from that scores choices one by one."""
    return ModelSource(
        options.model_name_or_path,
        "AutoModelForMultipleChoice",
        "SEQ_CLS",  # in PEFT's words: its head is a classifier's
        options.base_dtype,
        {
            "revision": options.revision,
            "local_files_only": options.local_files_only,
            "ignore_mismatched_sizes": options.ignore_mismatched_sizes,
            "problem_type": "single_label_classification",  # among a question's choices
        },
    )
