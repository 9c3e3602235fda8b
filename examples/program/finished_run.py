"""A run that has ended: its options, its data, its adapter."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from examples.cli.groups import OPTION_CLASSES, DataOptions, ModelOptions, TrainingOptions
from examples.errors import RunError
from examples.methods.source import ModelSource
from examples.program.main import parse
from examples.program.task_data import TaskData, sequence_classifier
from examples.training.run_folder import CONFIG


class FinishedRun:
    """What a program asks of a run of `examples.run_glue` afterwards.

    Args:
        folder: of the run.
        base: where the pretrained model is now; None: where the run had it.

    Attributes:
        options: of the run.
        where: its model's, in fp32.

    Raises:
        RunError: it is no finished run with an adapter.
    """

    def __init__(self, folder: Path, base: str | None = None) -> None:
        if not (folder / CONFIG).is_file() or not (folder / "adapter").is_dir():
            raise RunError(f"{folder} is no finished run: it needs {CONFIG} and adapter/")
        words = ["--config", str(folder / CONFIG)]
        if base is not None:
            words += ["--model_name_or_path", base]
        options = parse(words, "examples.export", "", OPTION_CLASSES, "task_name")
        assert options is not None
        self.folder, self.options = folder, options
        self.where: ModelOptions = dataclasses.replace(options[ModelOptions], base_dtype="float32")

    @property
    def training(self) -> TrainingOptions:
        """The options of its training."""
        return self.options[TrainingOptions]

    def data(self) -> TaskData:
        """Its task and splits."""
        return TaskData(self.options[DataOptions], self.training)

    def source(self, data: TaskData) -> ModelSource:
        """Its model, with the head of the task."""
        return sequence_classifier(self.where, data.task)
