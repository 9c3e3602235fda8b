"""The recipes of text generation: what the scripts call, and what the programs make of it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from support.paths import ROOT
from support.script_cases import Dry, parsed_nlg

from examples import program
from examples.cli.groups import ModelOptions, TrainingOptions
from examples.cli.nlg import DecodingOptions, NlgOptions
from examples.data.tasks.nlg import NLG_TASKS

SIZES = ("medium", "large")
METHODS = ("lora", "dylora", "adalora", "vilora", "bim_lora", "full")
SCRIPTS = [f"gpt2_{size}_{task}.sh" for size in SIZES for task in NLG_TASKS]


@pytest.fixture
def dry(tmp_path: Path) -> Dry:
    (tmp_path / "prepared").mkdir()
    return Dry(tmp_path)


def called(dry: Dry, script: str, *words: str, **environment: str) -> program.Options:
    """What run_nlg makes of a script whose data is prepared already."""
    command, done = dry(script, *words, PREPARED=str(dry.folder / "prepared"), **environment)
    assert done.returncode == 0, done.stderr
    assert command[:3] == ["python", "-m", "examples.run_nlg"] and len(dry.commands) == 1
    return parsed_nlg(command)


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_parse_are_thin_and_alike(name: str) -> None:
    path = ROOT / "scripts" / name
    assert subprocess.run(["bash", "-n", path]).returncode == 0
    lines = path.read_text().splitlines()
    _, size, task = name.removesuffix(".sh").split("_")
    assert lines[-1] == f'nlg gpt2_{size} {task} "$@"' and len(lines) == 4


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("task", NLG_TASKS)
def test_lora_is_the_published_recipe(dry: Dry, size: str, task: str) -> None:
    options = called(dry, f"gpt2_{size}_{task}.sh")
    training, data, decoding = (
        options[group] for group in (TrainingOptions, NlgOptions, DecodingOptions)
    )
    dart, boolq = task == "dart", task == "boolq"
    method = options.method_options
    assert (options.method.name, method.wiring, method.lora_modules) == ("lora", "loralib", ())
    assert (method.lora_r, method.lora_alpha) == (4, 32)
    assert method.lora_dropout == (0 if dart else 0.1)
    optimizer = options.optimizer_options
    betas = (optimizer.adam_beta1, optimizer.adam_beta2)
    assert (options.optimizer.name, betas, optimizer.adam_epsilon) == ("adamw", (0.9, 0.999), 1e-6)
    assert (training.learning_rate, training.lr_scheduler_type) == (2e-4, "linear")
    assert (training.num_warmup_steps, training.num_train_epochs, training.seed) == (500, 5, 110)
    assert (training.weight_decay, training.max_grad_norm) == (0 if dart else 0.01, 0)
    assert training.label_smoothing_factor == (0 if dart else 0.1)
    assert program.rows_at_once(training, 1) == training.global_batch_size == (6 if boolq else 8)
    assert (training.per_device_eval_batch_size, training.do_predict) == (4, True)
    assert (training.eval_steps, training.save_steps, training.logging_steps) == (2000, 1000, 100)
    assert not training.load_best_model_at_end and data.order == "random"
    assert (data.task_name, data.obj) == (task, "clm")
    assert data.max_length == (1024 if task == "xsum" else 512)
    assert data.data_dir == str(dry.folder / "prepared")
    assert (decoding.num_beams, decoding.max_new_tokens, decoding.min_new_tokens) == (10, 64, 0)
    assert (decoding.length_penalty, decoding.no_repeat_ngram_size) == (0.8, 4)
    assert (decoding.repetition_penalty, decoding.eos_token_id) == (1.0, ("628",))
    assert decoding.decoding_rules == "lora"
    assert options[ModelOptions].model_name_or_path == f"openai-community/gpt2-{size}"
    assert training.output_dir == str(ROOT / "runs" / f"gpt2_{size}_{task}_lora")


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_of_every_task_is_parsed(dry: Dry, size: str, method: str) -> None:
    for task in NLG_TASKS:
        options = called(dry, f"gpt2_{size}_{task}.sh", method, "--seed", "3")
        assert options.method.name == method and options[TrainingOptions].seed == 3
        assert options.optimizer.name == ("ivon" if method == "vilora" else "adamw")
        assert options[TrainingOptions].output_dir.endswith(f"gpt2_{size}_{task}_{method}")


def test_data_is_prepared_once(dry: Dry, tmp_path: Path) -> None:
    root = tmp_path / "copy of it"
    for name in ("scripts", "hparams"):
        shutil.copytree(ROOT / name, root / name)
    (root / "data" / "e2e").mkdir(parents=True)
    (root / "checkpoints" / "gpt2-medium").mkdir(parents=True)
    dry("gpt2_medium_e2e.sh", root=root)
    prepare, run = dry.commands
    model, folder = str(root / "checkpoints/gpt2-medium"), str(root / "data/prepared/e2e")
    words = ["--data_dir", str(root / "data/e2e"), "--tokenizer", model]
    assert prepare == [
        "python", "-m", "examples.data.prepare_nlg", "e2e", *words, "--output_dir",
        f"{folder}.partial",
    ]  # fmt: skip
    options = parsed_nlg(run)
    assert options[NlgOptions].data_dir == folder and Path(folder).is_dir()
    assert options[ModelOptions].model_name_or_path == model
    dry("gpt2_medium_e2e.sh", "dylora", root=root)
    assert len(dry.commands) == 1
    # without files of their own boolq and xsum are the hub's; the others must be there
    dry("gpt2_large_xsum.sh", root=root)
    assert "--data_dir" not in dry.commands[0]
    dry("gpt2_large_boolq.sh", root=root, DATA_DIR="raw", SPLIT_DEV="1")
    assert dry.commands[0][-1] == "--split_dev" and "raw" in dry.commands[0]
    assert parsed_nlg(dry.commands[1])[NlgOptions].data_dir.endswith("boolq_dev")


def test_boolqs_dev_set_stands_in_for_its_test_set(dry: Dry, tmp_path: Path) -> None:
    """Its official test set has no answers; other tasks without a test set are left as they are."""
    for task in ("boolq", "xsum"):
        folder = tmp_path / task
        _, done = dry(f"gpt2_medium_{task}.sh", PREPARED=str(folder))
        assert done.returncode == 0, done.stderr
        assert ("the dev set is decoded and scored in its place" in done.stderr) == (
            task == "boolq"
        )
        names = {"valid.jsonl", "valid_formatted.jsonl"}
        names |= {"test.jsonl", "test_formatted.jsonl"} if task == "boolq" else set()
        assert {path.name for path in folder.iterdir()} == names


@pytest.mark.parametrize(
    ("words", "environment", "message"),
    [
        (["nonsense"], {}, "no values for method 'nonsense': there is no "
         "hparams/gpt2_medium_nonsense.yaml, only hparams/gpt2_medium_adalora.yaml"),
        ([], {"NUM_GPUS": "two"}, "NUM_GPUS=two: a whole number"),
        ([], {"PREPARED": "nowhere"}, "no data of dart here: run scripts/download.sh dart"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(
    dry: Dry, words: list[str], environment: dict[str, str], message: str
) -> None:
    command, done = dry("gpt2_medium_dart.sh", *words, **environment)
    assert command == [] and done.returncode == 2
    assert done.stderr.startswith("gpt2_medium_dart.sh: ") and message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_the_global_batch_does_not_depend_on_the_gpus(dry: Dry) -> None:
    for gpus in ("1", "2", "4"):
        places = {"PREPARED": str(dry.folder / "prepared"), "NUM_GPUS": gpus}
        command, done = dry("gpt2_medium_webnlg.sh", **places)
        assert done.returncode == 0 and (command[0] == "accelerate") == (gpus != "1")
        training = parsed_nlg(command)[TrainingOptions]
        at_once = program.rows_at_once(training, int(gpus))
        assert at_once * program.accumulation(training, int(gpus)) * int(gpus) == 8
