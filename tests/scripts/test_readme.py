"""Every command and every snippet of the README works; conda, hub and GPU commands are parsed."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from support.paths import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.DOTALL)
COMMANDS = [line for kind, text in BLOCKS if kind == "bash" for line in text.splitlines() if line]
SNIPPETS = [text for kind, text in BLOCKS if kind == "python"]
SHORT = "--max_train_steps 3 --max_eval_samples 32 --per_device_train_batch_size 4"


def the_command(*words: str) -> str:
    """The one README command that has all these words."""
    found = [line for line in COMMANDS if all(word in line for word in words)]
    assert len(found) == 1, f"{words}: {found}"
    return found[0]


def shell(command: str, cwd: Path, **variables: str) -> str:
    """Runs a command with this environment's programs first on PATH; returns its output."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)} | variables
    done = subprocess.run(
        ["bash", "-c", command], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


def parsed(command: str) -> None:
    """The options of a run_glue command exist and have possible values."""
    from examples import program, run_glue

    words = shlex.split(command)
    options = words[words.index("examples.run_glue") + 1 :]
    assert program.parse(options, "run_glue", "", run_glue.OPTION_CLASSES, "task_name") is not None


def test_every_command_is_covered_here() -> None:
    covered = {
        "bash scripts/quickstart.sh",
        "bash scripts/test.sh",
        the_command("--task_name wording"),
        the_command("--config runs/wording/config.json"),
        the_command("quickstart.sh", "mrpc"),
        the_command("roberta_base_mrpc.sh"),
        the_command("run_squad_from_excel_sheet.py"),
        the_command("bert_base_squad.sh lora"),
        the_command("accelerate launch"),
        the_command("download.sh", "squad"),
        the_command("bert_base_squad.sh splopa"),
        the_command("evaluate_squad"),
        the_command("download.sh", "e2e"),
        the_command("gpt2_medium_e2e.sh"),
        the_command("evaluate_nlg"),
        "conda env create -f environment.yml",
        "pip install -e .",
        'pip install -e ".[dev]"',
    }
    assert covered == set(COMMANDS)


@pytest.mark.parametrize("snippet", SNIPPETS, ids=["loralib", "peft_custom", "transformers"])
def test_snippets_run(snippet: str, tmp_path: Path) -> None:
    (tmp_path / "snippet.py").write_text(snippet)
    shell("python snippet.py", tmp_path)
    assert any((tmp_path / name).exists() for name in ("lora.pt", "adapter"))


def test_run_glue_and_its_own_config_again(tmp_path: Path, minilm_dir: Path) -> None:
    home = {"RANKWISE_MINILM": str(minilm_dir), "RANKWISE_CACHE": str(tmp_path / "cache")}
    shell(f"{the_command('--task_name wording')} {SHORT}", tmp_path, **home)
    shell(the_command("--config runs/wording/config.json"), tmp_path, **home)
    for name in ("wording", "again"):
        assert (tmp_path / "runs" / name / "adapter" / "adapter_model.safetensors").is_file()


def copy_of_the_project(folder: Path) -> None:
    """Links to all but what a user's commands make."""
    for entry in ROOT.iterdir():
        if not entry.name.startswith(".") and entry.name not in ("checkpoints", "data", "runs"):
            (folder / entry.name).symlink_to(entry)


def test_question_answering(tmp_path: Path) -> None:
    """In a copy of the project, where download.sh would have put a model and a task."""
    from support.runner_cases import tiny_bert
    from support.squad_cases import squad_task

    copy_of_the_project(tmp_path)
    tiny_bert(tmp_path / "checkpoints" / "bert-base-uncased")
    squad_task(tmp_path / "data" / "squad", {"train-v1.1": 16, "dev-v1.1": 8})
    short = "--max_train_steps 2 --max_length 24 --doc_stride 6 --max_query_length 8"
    shell(f"{the_command('bert_base_squad.sh lora')} {short}", tmp_path, PYTHONPATH="")
    told = shell(the_command("evaluate_squad"), tmp_path, PYTHONPATH=str(tmp_path))
    assert "f1" in told and (tmp_path / "squad.json").is_file()


def test_text_generation(tmp_path: Path) -> None:
    """In a copy of the project, where download.sh would have put a model and a task."""
    from support.gpt2_tiny import tiny_gpt2

    copy_of_the_project(tmp_path)
    tiny_gpt2(tmp_path / "checkpoints" / "gpt2-medium")
    (tmp_path / "data" / "e2e").mkdir(parents=True)
    for split in ("train", "valid", "test"):
        lines = [f"name : Place {i} | area : city||Place {i} is there .\n" for i in range(5)]
        (tmp_path / "data" / "e2e" / f"{split}.txt").write_text("".join(lines))
    short = "--max_train_steps 2 --max_length 128 --num_beams 2 --max_new_tokens 6"
    short += " --min_new_tokens 4 --eos_token_id 10"
    shell(f"{the_command('gpt2_medium_e2e.sh')} {short}", tmp_path, PYTHONPATH="")
    told = shell(the_command("evaluate_nlg"), tmp_path, PYTHONPATH=str(tmp_path))
    assert "BLEU" in told and (tmp_path / "e2e.json").is_file()


def test_the_row_of_the_workbook_and_the_script_beside_it(tmp_path: Path) -> None:
    """The first is run; what the second calls is the script's own test."""
    pytest.importorskip("openpyxl")
    command = the_command("run_squad_from_excel_sheet.py").replace("scripts/", f"{ROOT}/scripts/")
    told = shell(command, tmp_path)
    assert told.startswith("python -m examples.run_squad") and "--final_threshold 0.3" in told
    subprocess.run(
        ["bash", "-n", ROOT / shlex.split(the_command("bert_base_squad.sh splopa"))[1]], check=True
    )


@pytest.mark.slow
def test_quick_start_from_an_empty_environment(nested_venv: Path, minilm_dir: Path) -> None:
    variables = {"VENV": str(nested_venv), "RANKWISE_MINILM": str(minilm_dir)}
    out = nested_venv.parent / "quickstart"
    command = f"bash {ROOT}/scripts/quickstart.sh --output_dir {out} {SHORT}"
    first = shell(command, nested_venv.parent, **variables)
    assert "installing into" in first and "eval_accuracy" in first
    assert (out / "learning_curve.png").is_file() and (out / "adapter").is_dir()
    second = shell(f"{command} --overwrite_output_dir", nested_venv.parent, **variables)
    assert "installing" not in second


@pytest.mark.slow
def test_quick_start_on_real_data(nested_venv: Path, minilm_dir: Path, real_data) -> None:
    folder = real_data("glue")
    variables = {"VENV": str(nested_venv), "RANKWISE_MINILM": str(minilm_dir)}
    out = nested_venv.parent / "mrpc"
    command = the_command("quickstart.sh", "mrpc").replace("scripts/", f"{ROOT}/scripts/")
    told = shell(
        f"{command} --output_dir {out} {SHORT}",
        nested_venv.parent, GLUE_DIR=str(folder), **variables,
    )  # fmt: skip
    assert "eval_f1" in told


def test_the_test_command_is_what_ci_runs() -> None:
    assert "bash scripts/test.sh" in (ROOT / ".ci" / "run").read_text()


def test_gpu_hub_and_conda_commands_parse() -> None:
    parsed(the_command("accelerate launch"))
    from examples import download
    from examples.data.tasks.nlg import NLG_TASKS
    from examples.data.tasks.squad import SQUAD_TASKS

    wanted = shlex.split(the_command("download.sh", "e2e"))[2:]
    assert download.names(wanted) == ["openai-community/gpt2-medium", NLG_TASKS["e2e"]]
    wanted = shlex.split(the_command("download.sh", "squad"))[2:]
    assert download.names(wanted) == ["google-bert/bert-base-uncased", SQUAD_TASKS["squad"]]
    script = ROOT / shlex.split(the_command("roberta_base_mrpc.sh"))[1]
    subprocess.run(["bash", "-n", script], check=True)
    file = ROOT / shlex.split("conda env create -f environment.yml")[-1]
    assert yaml.safe_load(file.read_text())["name"] == "rankwise"


def test_links_and_pictures_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target
