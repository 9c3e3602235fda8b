"""bert_base_{squad,mnli,qqp}.sh: a method, a density, and the published rows behind them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pytest
from support.paths import ROOT
from support.script_cases import Dry, rows_per_step

from examples import program
from examples.cli.groups import OPTION_CLASSES, DataOptions, ModelOptions, TrainingOptions
from examples.cli.squad import SquadOptions

TASKS = {"squad": "examples.run_squad", "mnli": "examples.run_glue", "qqp": "examples.run_glue"}
PRUNING = ("block_prune", "splopa", "splora")
# Rows of the sheets with 30 % by movement: of fine-pruning, and of SPLoPA with 64 prototypes
# (SQuAD's stands at another threshold). And the whole model.
ROWS = {
    "full": {"squad": 3, "mnli": 3, "qqp": 3},
    "block_prune": {"squad": 29, "mnli": 48, "qqp": 39},
    "splopa": {"squad": 37, "mnli": 56, "qqp": 44},
}


@pytest.fixture
def dry(tmp_path: Path) -> Dry:
    return Dry(tmp_path)


def parsed(task: str, words: Sequence[str]) -> program.Options:
    classes = {**OPTION_CLASSES, "data": SquadOptions if task == "squad" else DataOptions}
    options = program.parse(list(words), TASKS[task], "", classes, "task_name")
    assert options is not None
    return options


def called(task: str, command: Sequence[str]) -> program.Options:
    return parsed(task, command[command.index(TASKS[task]) + 1 :])


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("method", ROWS)
def test_values_are_those_of_the_workbook(dry: Dry, task: str, method: str) -> None:
    pytest.importorskip("openpyxl")
    from examples.sweeps.workbook import Selection, read_workbook, select
    from examples.sweeps.workbook_options import options

    rows = read_workbook(ROOT / "hparams" / "hyperparameters.xlsx", task)
    [row] = select(rows, Selection(numbers=(ROWS[method][task],)))
    words = [*options(row), "--model_name_or_path", "m", "--output_dir", "o"]
    published = parsed(task, words)
    ours = called(task, dry(f"bert_base_{task}.sh", method)[0])
    assert ours.method.name == published.method.name == method
    assert ours.method_options == published.method_options
    assert rows_per_step(ours, 1) == rows_per_step(published, 1)
    same = ("num_warmup_steps", "num_train_epochs", "learning_rate", "weight_decay")
    for name in same:
        assert getattr(ours[TrainingOptions], name) == getattr(published[TrainingOptions], name)
    data = SquadOptions if task == "squad" else DataOptions
    assert ours[data].max_length == published[data].max_length
    if method != "full":
        assert ours[TrainingOptions].seed == 92


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("method", PRUNING)
def test_a_density_is_the_final_threshold(dry: Dry, task: str, method: str) -> None:
    plain = called(task, dry(f"bert_base_{task}.sh", method)[0])
    assert plain.method_options.final_threshold == 0.3
    tenth = called(task, dry(f"bert_base_{task}.sh", method, "0.1", "--lr", "1e-4")[0])
    expected = dataclasses.replace(plain.method_options, final_threshold=0.1)
    assert tenth.method_options == expected and tenth[TrainingOptions].learning_rate == 1e-4
    folder = f"bert_base_{task}_{method}"
    assert plain[TrainingOptions].output_dir == str(ROOT / "runs" / folder)
    assert tenth[TrainingOptions].output_dir == str(ROOT / "runs" / f"{folder}_0.1")
    assert tenth[ModelOptions].model_name_or_path == "google-bert/bert-base-uncased"


def test_densities_that_are_none_and_methods_without(dry: Dry) -> None:
    for words, message in (
        (("splopa", "30"), "0.3 for 30 %"),
        (("splopa", "0"), "0.3 for 30 %"),
        (("splopa", "0.0"), "0.3 for 30 %"),
        (("full", "0.3"), "full has no density"),
        (("lora", "0.3"), "lora has no density"),
        (("nonsense",), "no values for method 'nonsense'"),
    ):
        for task in TASKS:
            command, done = dry(f"bert_base_{task}.sh", *words)
            assert (command, done.returncode) == ([], 2) and message in done.stderr
            assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("task", ("mnli", "qqp"))
def test_lora_and_the_environment(dry: Dry, task: str) -> None:
    options = called(task, dry(f"bert_base_{task}.sh", DATA_DIR="d", NUM_GPUS="2")[0])
    assert options.method.name == "lora" and options[DataOptions].data_dir == "d"
    assert rows_per_step(options, 2) == 128
    options = called(task, dry(f"bert_base_{task}.sh", "full", MODEL="my model", OUTPUT_DIR="o")[0])
    assert options[ModelOptions].model_name_or_path == "my model"
    assert options[TrainingOptions].output_dir == "o"
    assert options[DataOptions].task_name == task
