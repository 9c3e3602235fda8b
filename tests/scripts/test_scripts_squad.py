"""The scripts of SQuAD: what they call is what run_squad takes, on any number of GPUs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from support.paths import ROOT
from support.script_cases import Dry, rows_per_step

from examples import program
from examples.cli.fields import read_file
from examples.cli.groups import OPTION_CLASSES, ModelOptions, TrainingOptions
from examples.cli.squad import SquadOptions

MODELS = {
    "bert_base": "google-bert/bert-base-uncased",
    "roberta_base": "FacebookAI/roberta-base",
}
METHODS = ("lora", "adalora", "bim_lora")


@pytest.fixture
def dry(tmp_path: Path) -> Dry:
    return Dry(tmp_path)


def parsed(command: Sequence[str]) -> program.Options:
    """What run_squad makes of a recorded command."""
    words = list(command[command.index("examples.run_squad") + 1 :])
    classes = {**OPTION_CLASSES, "data": SquadOptions}
    options = program.parse(words, "examples.run_squad", "", classes, "task_name")
    assert options is not None
    return options


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model", MODELS)
def test_every_method_is_called_with_its_row(dry: Dry, model: str, method: str) -> None:
    for gpus in (1, 2):
        command, done = dry(f"{model}_squad.sh", method, NUM_GPUS=str(gpus))
        assert done.returncode == 0, done.stderr
        options = parsed(command)
        training, data = options[TrainingOptions], options[SquadOptions]
        assert options.method.name == method
        assert options[ModelOptions].model_name_or_path == MODELS[model]
        assert (data.task_name, data.max_length, data.data_dir) == ("squad", 384, None)
        assert (data.doc_stride, data.version_2_with_negative) == (128, False)
        assert training.num_train_epochs == 10
        assert rows_per_step(options, gpus) == (32 if method == "bim_lora" else 16)
        assert training.output_dir == str(ROOT / "runs" / f"{model}_squad_{method}")


def test_the_dense_row_is_the_published_one(dry: Dry) -> None:
    """The sheet of block pruning, row 3: batch 16, 5,400 steps of warm-up, 3 epochs, 3e-5."""
    training = parsed(dry("bert_base_squad.sh", "full")[0])[TrainingOptions]
    assert (training.global_batch_size, training.num_warmup_steps) == (16, 5400)
    assert (training.num_train_epochs, training.learning_rate) == (3, 3e-5)


@pytest.mark.parametrize("model", MODELS)
def test_the_second_version_has_rows(dry: Dry, model: str) -> None:
    for method in METHODS:
        words = ("--task_name", "squad_v2", "--learning_rate", "1e-4")
        options = parsed(dry(f"{model}_squad.sh", method, *words)[0])
        assert options[SquadOptions].task_name == "squad_v2"
        assert options[TrainingOptions].learning_rate == 1e-4
        assert options[TrainingOptions].output_dir.endswith(f"{model}_squad_v2_{method}")
    for method in ("adalora", "bim_lora"):
        sheet = ROOT / "hparams" / f"{model}_{method}.yaml"
        assert read_file(sheet, "squad") == read_file(sheet, "squad_v2")


def test_the_environment_says_where_things_are(dry: Dry) -> None:
    places = {"MODEL": "my models/b", "DATA_DIR": "../d", "OUTPUT_DIR": "o p"}
    options = parsed(dry("bert_base_squad.sh", **places)[0])
    assert options[ModelOptions].model_name_or_path == "my models/b"
    assert options[SquadOptions].data_dir == "../d"
    assert options[TrainingOptions].output_dir == "o p"


def test_an_unknown_method_is_one_line(dry: Dry) -> None:
    command, done = dry("bert_base_squad.sh", "nonsense")
    assert (command, done.returncode) == ([], 2)
    assert "only hparams/bert_base_" in done.stderr and len(done.stderr.splitlines()) == 1
