"""What every program does around its task: options, errors, data, the run, the final table.

A program gives its `main` to `run_main`. It calls `parse` with its option classes, makes `TaskData`
and a `Run` of them, and lets `train_and_evaluate` do the rest. Whatever needs torch is imported
when it is first asked for, so that `--help` and wrong options answer at once.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from examples.errors import OptionError
from examples.program.batching import accumulation, rows_at_once
from examples.program.main import MethodOptions, Options, parse, run_main, with_known_task

if TYPE_CHECKING:
    from examples.program.choice_data import ChoiceData, choice_model
    from examples.program.nlg_data import NlgData, language_model
    from examples.program.pretraining import pretrain
    from examples.program.run import Run, make_accelerator, train_and_evaluate
    from examples.program.task_data import TaskData, sequence_classifier

_WITH_TORCH = {
    "NlgData": "nlg_data",
    "language_model": "nlg_data",
    "ChoiceData": "choice_data",
    "choice_model": "choice_data",
    "Run": "run",
    "make_accelerator": "run",
    "train_and_evaluate": "run",
    "TaskData": "task_data",
    "sequence_classifier": "task_data",
    "pretrain": "pretraining",
}

__all__ = [
    "ChoiceData",
    "MethodOptions",
    "NlgData",
    "OptionError",
    "Options",
    "Run",
    "TaskData",
    "accumulation",
    "language_model",
    "choice_model",
    "make_accelerator",
    "parse",
    "pretrain",
    "rows_at_once",
    "run_main",
    "sequence_classifier",
    "train_and_evaluate",
    "with_known_task",
]


def __getattr__(name: str) -> Any:
    if name not in _WITH_TORCH:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_WITH_TORCH[name]}"), name)
