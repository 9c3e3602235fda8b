"""ARC's scripts: what they call is parsed by run_multiple_choice, for every method with a sheet."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.paths import ROOT
from support.script_cases import Dry

from examples import program
from examples.cli.groups import OPTION_CLASSES, DataOptions, ModelOptions, TrainingOptions
from examples.config import get_default_config
from examples.data.tasks.choice import CHOICE_TASKS

METHODS = ("lora", "adalora", "bim_lora", "dylora", "vilora", "full")


def parsed(command: list[str]) -> program.Options:
    words = command[command.index("examples.run_multiple_choice") + 1 :]
    options = program.parse(words, "x", "", OPTION_CLASSES, "task_name")
    assert options is not None
    return options


@pytest.mark.parametrize("task", CHOICE_TASKS)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_values(tmp_path: Path, task: str, method: str) -> None:
    command, done = Dry(tmp_path)(f"roberta_base_{task}.sh", method, "--seed", "7")
    assert done.returncode == 0, done.stderr
    options = parsed(command)
    assert options.method.name == method
    training = options[TrainingOptions]
    assert training.seed == 7 and training.num_train_epochs in (10, 30)
    assert training.global_batch_size in (8, 16, 32)
    assert options[ModelOptions].model_name_or_path == "FacebookAI/roberta-base"
    assert options[DataOptions].task_name == task and options[DataOptions].data_dir is None
    assert training.output_dir == str(ROOT / "runs" / f"roberta_base_{task}_{method}")


def test_a_method_without_values_is_one_line(tmp_path: Path) -> None:
    command, done = Dry(tmp_path)("roberta_base_arc_easy.sh", "nonsense")
    assert command == [] and done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "no values for method 'nonsense'" in done.stderr


@pytest.mark.parametrize("task", CHOICE_TASKS)
def test_the_originals_configuration_is_its_global_default(task: str) -> None:
    config = get_default_config(task)
    assert (config.task_name, config.num_train_epochs, config.collection_steps) == (task, 10, 3000)
