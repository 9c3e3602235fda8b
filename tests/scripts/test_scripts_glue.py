"""The task scripts: short, and what they call is the published table, on any number of GPUs."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.paths import ROOT
from support.script_cases import Dry, parsed, rows_per_step

from examples import program
from examples.cli.fields import read_file
from examples.cli.groups import DataOptions, ModelOptions, TrainingOptions
from examples.data.tables import write_table
from examples.data.tasks import GLUE_TASKS

# task: GPUs, batch per GPU, learning rate, epochs, tokens, starts from an MNLI adapter
BASE = {
    "mnli": (8, 16, 5e-4, 30, 512, False),
    "sst2": (8, 16, 5e-4, 60, 512, False),
    "mrpc": (8, 16, 4e-4, 30, 512, True),
    "cola": (2, 32, 4e-4, 80, 512, False),
    "qnli": (8, 32, 4e-4, 25, 512, False),
    "qqp": (8, 16, 5e-4, 25, 512, False),
    "rte": (8, 32, 5e-4, 80, 512, True),
    "stsb": (8, 16, 4e-4, 40, 512, True),
    "wnli": (8, 32, 5e-4, 80, 512, True),
}
LARGE = {
    "mnli": (8, 4, 3e-4, 10, 128, False),
    "sst2": (8, 8, 4e-4, 10, 512, False),
    "mrpc": (8, 4, 3e-4, 20, 512, True),
    "cola": (8, 4, 3e-4, 20, 128, False),
    "qnli": (8, 4, 2e-4, 10, 512, False),
    "qqp": (8, 4, 3e-4, 20, 512, False),
    "rte": (8, 8, 4e-4, 20, 512, True),
    "stsb": (8, 4, 3e-4, 10, 128, True),
    "wnli": (8, 8, 4e-4, 20, 512, True),
}
TABLE = {("base", task): row for task, row in BASE.items()}
TABLE |= {("large", task): row for task, row in LARGE.items()}
SCRIPTS = sorted(str(p.relative_to(ROOT / "scripts")) for p in (ROOT / "scripts").rglob("*.sh"))
OTHERS = ("squad", "arc_easy", "arc_challenge")  # tasks of other programs
GLUE_SCRIPTS = [
    name for name in SCRIPTS
    if name.startswith("roberta_") and name.split("_", 2)[2].removesuffix(".sh") not in OTHERS
]  # fmt: skip


@pytest.fixture
def dry(tmp_path: Path) -> Dry:
    return Dry(tmp_path)


def test_there_is_a_script_for_every_task_and_size() -> None:
    wanted = {f"roberta_{size}_{task}.sh" for size, task in TABLE}
    assert wanted == set(GLUE_SCRIPTS)
    assert {task for _, task in TABLE} == set(GLUE_TASKS)


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_parse_and_are_short(name: str) -> None:
    path = ROOT / "scripts" / name
    assert subprocess.run(["bash", "-n", path]).returncode == 0
    if name.startswith(("roberta_", "bert_")):
        assert len(path.read_text().splitlines()) <= 15


def test_scripts_differ_only_in_flags() -> None:
    def bare(name: str) -> list[str]:
        lines = (ROOT / "scripts" / name).read_text().splitlines()
        return [line for line in lines if not line.startswith(("  --", "# ", "glue "))]

    assert len({tuple(bare(name)) for name in GLUE_SCRIPTS}) == 1


@pytest.mark.parametrize(("size", "task"), TABLE)
def test_lora_calls_hold_the_published_values(dry: Dry, size: str, task: str) -> None:
    gpus, batch, rate, epochs, length, from_mnli = TABLE[size, task]
    command, done = dry(f"roberta_{size}_{task}.sh")
    assert done.returncode == 0, done.stderr
    assert command[:3] == ["python", "-m", "examples.run_glue"]
    options = parsed(command)
    training, data = options[TrainingOptions], options[DataOptions]
    assert options.method.name == "lora"
    assert (options.method_options.lora_r, options.method_options.lora_alpha) == (8, 16)
    assert (training.learning_rate, training.num_train_epochs) == (rate, epochs)
    assert (training.weight_decay, training.warmup_ratio, training.seed) == (0.1, 0.06, 0)
    assert training.lr_scheduler_type == "linear"
    assert (data.task_name, data.max_length, data.data_dir) == (task, length, None)
    assert training.global_batch_size == gpus * batch
    assert training.per_device_train_batch_size == batch
    assert options[ModelOptions].model_name_or_path == f"FacebookAI/roberta-{size}"
    assert training.output_dir == str(ROOT / "runs" / f"roberta_{size}_{task}_lora")
    assert ("LORA_PATH is not set" in done.stderr) == from_mnli
    # the command is shown as it could be typed
    shown = next(line for line in done.stderr.splitlines() if line.startswith("+ "))
    assert shown.split()[1:] == command


@pytest.mark.parametrize(("size", "task"), TABLE)
@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_global_batch_does_not_depend_on_the_gpus(
    dry: Dry, size: str, task: str, method: str
) -> None:
    sizes = set()
    for gpus in (1, 2, 4, 8):
        command, done = dry(f"roberta_{size}_{task}.sh", method, NUM_GPUS=str(gpus))
        assert done.returncode == 0, done.stderr
        if gpus > 1:
            assert command[0] == "accelerate"
            assert command[command.index("--num_processes") + 1] == str(gpus)
            assert command[command.index("examples.run_glue") - 1] == "--module"
        sizes.add(rows_per_step(parsed(command), gpus))
    gpus, batch, *_ = TABLE[size, task]
    small = task in ("cola", "mrpc", "rte", "stsb", "wnli")
    assert sizes == {gpus * batch if method == "lora" else 16 if small else 32}


# The second of two machines.
MACHINES = {"NUM_NODES": "2", "MASTER_ADDR": "first.example", "NODE_RANK": "1"}


@pytest.mark.parametrize("gpus", [1, 4])
def test_several_machines_share_the_global_batch(dry: Dry, gpus: int) -> None:
    from accelerate.commands.launch import launch_command_parser

    command, done = dry("roberta_base_cola.sh", **MACHINES, NUM_GPUS=str(gpus))
    assert done.returncode == 0, done.stderr
    launched = launch_command_parser().parse_args(command[2:])  # as accelerate reads it
    assert (launched.num_processes, launched.num_machines) == (2 * gpus, 2)
    assert (launched.machine_rank, launched.main_process_ip) == (1, "first.example")
    assert (launched.main_process_port, launched.multi_gpu, launched.module) == (29500, True, True)
    assert launched.training_script == "examples.run_glue"
    assert rows_per_step(parsed(command), 2 * gpus) == rows_per_step(
        parsed(dry("roberta_base_cola.sh")[0]), 1
    )
    command, _ = dry("roberta_base_cola.sh", **MACHINES, MASTER_PORT="1234")
    assert command[command.index("--main_process_port") + 1] == "1234"


def test_a_batch_that_cannot_be_split_is_an_error(dry: Dry) -> None:
    options = parsed(dry("roberta_base_cola.sh", NUM_GPUS="3")[0])
    with pytest.raises(program.OptionError, match="--global_batch_size 64 is no multiple"):
        rows_per_step(options, 3)


# RoBERTa's own table of full fine-tuning, large: learning rate, batch, warm-up share
FULL_LARGE = {
    "mnli": (1e-5, 32, 7432 / 123873),
    "qnli": (1e-5, 32, 1986 / 33112),
    "qqp": (1e-5, 32, 28318 / 113272),
    "rte": (2e-5, 16, 122 / 2036),
    "sst2": (1e-5, 32, 1256 / 20935),
    "mrpc": (1e-5, 16, 137 / 2296),
    "cola": (1e-5, 16, 320 / 5336),
    "stsb": (2e-5, 16, 214 / 3598),
    "wnli": (2e-5, 16, 122 / 2036),
}


@pytest.mark.parametrize("task", GLUE_TASKS)
def test_another_method_takes_its_row(dry: Dry, task: str) -> None:
    command, done = dry(f"roberta_large_{task}.sh", "full")
    assert done.returncode == 0 and "LORA_PATH" not in done.stderr
    options = parsed(command)
    training = options[TrainingOptions]
    rate, batch, warmup = FULL_LARGE[task]
    assert options.method.name == "full"
    assert (training.learning_rate, training.global_batch_size) == (rate, batch)
    assert training.warmup_ratio == pytest.approx(warmup, abs=1e-3)
    assert (training.num_train_epochs, training.weight_decay) == (10, 0.1)
    assert (training.max_grad_norm, options.optimizer_options.adam_beta2) == (0, 0.98)
    assert training.output_dir == str(ROOT / "runs" / f"roberta_large_{task}_full")


# DyLoRA's own scripts, base: GPUs, batch per GPU, learning rate, epochs, starts from MNLI
DYLORA = {
    "mnli": (8, 16, 5e-4, 30, False),
    "sst2": (8, 16, 5e-4, 60, False),
    "mrpc": (8, 16, 4e-4, 30, True),
    "cola": (2, 32, 4e-4, 80, False),
    "qnli": (8, 32, 4e-4, 25, False),
    "qqp": (8, 16, 5e-4, 25, False),
    "rte": (8, 16, 5e-4, 80, True),
    "stsb": (8, 16, 4e-4, 40, True),
    "wnli": (8, 16, 5e-4, 80, True),
}


@pytest.mark.parametrize("task", DYLORA)
def test_dylora_has_its_authors_values(dry: Dry, task: str) -> None:
    gpus, batch, rate, epochs, from_mnli = DYLORA[task]
    command, done = dry(f"roberta_base_{task}.sh", "dylora", LORA_PATH="a/b")
    assert done.returncode == 0, done.stderr
    options = parsed(command)
    training, own = options[TrainingOptions], options.method_options
    assert options.method.name == "dylora"
    assert (own.lora_r, own.lora_alpha, own.dylora_dist) == (8, 16, "uniform")
    assert own.lora_path == ("a/b" if from_mnli else None)
    assert (training.learning_rate, training.num_train_epochs) == (rate, epochs)
    assert (training.weight_decay, training.warmup_ratio, training.seed) == (0.1, 0.06, 0)
    assert options[DataOptions].max_length == 512
    assert (training.global_batch_size, training.per_device_train_batch_size) == (
        gpus * batch,
        batch,
    )


@pytest.mark.parametrize(
    "sheet", sorted((ROOT / "hparams").glob("roberta_*.yaml")), ids=lambda p: p.stem
)
def test_every_sheet_has_every_task(sheet: Path) -> None:
    for task in GLUE_TASKS:
        words = ["examples.run_glue", "--task_name", task, "--config", str(sheet)]
        words += ["--model_name_or_path", "m", "--output_dir", "o"]
        words += ["--method", sheet.stem.split("_", 2)[2]]
        assert parsed(words)[TrainingOptions].global_batch_size
    with pytest.raises(program.OptionError, match="no row 'none' under tasks; has cola, mnli"):
        read_file(sheet, "none")


def test_options_given_win_over_script_and_row(dry: Dry) -> None:
    words = ("--learning_rate", "1e-3", "--global_batch_size", "24", "--max_length", "64")
    for method in ((), ("lora",), ("full",)):
        options = parsed(dry("roberta_base_mrpc.sh", *method, *words)[0])
        training = options[TrainingOptions]
        assert (training.learning_rate, options[DataOptions].max_length) == (1e-3, 64)
        assert training.global_batch_size == 24
        assert training.num_train_epochs == (10 if method == ("full",) else 30)


def test_the_environment_says_where_things_are(dry: Dry) -> None:
    places = {"MODEL": "my models/r", "DATA_DIR": "../d", "OUTPUT_DIR": "o p", "LORA_PATH": "a/b"}
    command, done = dry("roberta_base_rte.sh", "--seed", "3", **places)
    assert "LORA_PATH" not in done.stderr
    options = parsed(command)
    assert options[ModelOptions].model_name_or_path == "my models/r"
    assert options[DataOptions].data_dir == "../d"
    assert options[TrainingOptions].output_dir == "o p"
    assert options[TrainingOptions].seed == 3
    assert options.method_options.lora_path == "a/b"
    options = parsed(dry("roberta_base_rte.sh", "--lora_path", "c", **places)[0])
    assert options.method_options.lora_path == "c"


@pytest.mark.parametrize("words", [("roberta_base_cola.sh",), ("roberta_base_rte.sh", "full")])
def test_an_adapter_that_is_not_used_is_mentioned(dry: Dry, words: tuple[str, ...]) -> None:
    command, done = dry(*words, LORA_PATH="a/b")
    assert "LORA_PATH is not used" in done.stderr
    assert "--lora_path" not in command


def test_downloads_are_found(dry: Dry, tmp_path: Path) -> None:
    root = tmp_path / "copy of it"
    for name in ("scripts", "hparams"):
        shutil.copytree(ROOT / name, root / name)
    (root / "data" / "mrpc").mkdir(parents=True)
    (root / "checkpoints" / "roberta-large").mkdir(parents=True)
    options = parsed(dry("roberta_large_mrpc.sh", root=root)[0])
    assert options[DataOptions].data_dir == str(root / "data")
    assert options[ModelOptions].model_name_or_path == str(root / "checkpoints" / "roberta-large")
    options = parsed(dry("roberta_base_rte.sh", root=root)[0])
    assert options[DataOptions].data_dir is None
    assert options[ModelOptions].model_name_or_path == "FacebookAI/roberta-base"


@pytest.mark.parametrize(
    ("words", "environment", "message"),
    [
        (["nonsense"], {}, "no values for method 'nonsense': there is no "
         "hparams/roberta_base_nonsense.yaml, only hparams/roberta_base_"),
        ([], {"NUM_GPUS": "two"}, "NUM_GPUS=two: a whole number"),
        ([], {"NUM_GPUS": "0"}, "NUM_GPUS=0: a whole number"),
        ([], {"NUM_NODES": "1.5"}, "NUM_NODES=1.5: a whole number"),
        ([], {"NUM_NODES": "2", "NODE_RANK": "0"}, "NUM_NODES=2: MASTER_ADDR is needed"),
        ([], {**MACHINES, "NODE_RANK": ""}, "NODE_RANK=: which machine this is, a number from 0"),
        ([], {**MACHINES, "NODE_RANK": "2"}, "NODE_RANK=2: which machine this is, a number from 0 "
         "to 1"),
        ([], {**MACHINES, "MASTER_PORT": "http"}, "MASTER_PORT=http: a whole number"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(
    dry: Dry, words: list[str], environment: dict[str, str], message: str
) -> None:
    command, done = dry("roberta_base_cola.sh", *words, **environment)
    assert command == [] and done.returncode == 2
    assert done.stderr.startswith("roberta_base_cola.sh: ") and message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def real(folder: Path, script: str, *words: str, **environment: str) -> str:
    """Runs a script in earnest, from another directory; what it printed."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", str(ROOT / "scripts" / script), *words],
        cwd=folder,
        env={**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1", **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_more_processes_than_gpus_are_an_error(tmp_path: Path) -> None:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", str(ROOT / "scripts" / "roberta_base_cola.sh"), "--output_dir", str(tmp_path)],
        env={**os.environ, "PATH": path, "NUM_GPUS": "64"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr == ("roberta_base_cola.sh: NUM_GPUS=64: torch sees fewer GPUs than that\n")


def test_help_comes_from_anywhere(tmp_path: Path) -> None:
    assert "--lora_alpha" in real(tmp_path, "roberta_base_mrpc.sh", "--help")


def test_an_mnli_adapter_is_continued_on_rte(tmp_path: Path, minilm_dir: Path) -> None:
    text = [f"the number {i} is written here" for i in range(24)]
    for task, splits, classes, columns in (
        ("MNLI", ("train", "dev_matched", "dev_mismatched"), 3, ("premise", "hypothesis")),
        ("RTE", ("train", "dev"), 2, ("sentence1", "sentence2")),
    ):
        rows = {columns[0]: text, columns[1]: text[::-1], "label": [i % classes for i in range(24)]}
        for split in splits:
            write_table(tmp_path / "data" / task / f"{split}.jsonl", rows)
    places = {"MODEL": str(minilm_dir), "DATA_DIR": "data", "RANKWISE_CACHE": str(tmp_path / "c")}
    words = ("--num_train_epochs", "1", "--global_batch_size", "12", "--max_length", "32")
    places["OUTPUT_DIR"] = "runs/mnli"
    real(tmp_path, "roberta_base_mnli.sh", *words, **places)
    places |= {"OUTPUT_DIR": "runs/rte", "LORA_PATH": "runs/mnli"}
    shown = real(tmp_path, "roberta_base_rte.sh", *words, **places)
    assert "only the LoRA factors are taken over" in shown
    assert (tmp_path / "runs" / "rte" / "all_results.json").is_file()
