"""What the quick start ends with: a command, and Python that runs as it is printed."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from support.paths import ROOT
from support.runner_cases import pair_task, tiny_bert

from examples import next_steps, program
from examples.run_glue import OPTION_CLASSES, main

# Answers as the python of an environment would, and notes what it is asked to run.
RECORDER = '#!/bin/sh\nshift; echo "$@" >>"$RECORD"\n'


@pytest.mark.parametrize("method", ["lora", "bim_lora", "full"])
def test_the_python_that_is_printed_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str
) -> None:
    tiny_bert(tmp_path / "bert")
    pair_task(tmp_path / "mrpc", {"train": 16, "validation": 8})
    run = tmp_path / "a run's folder"
    words = ["--task_name", "mrpc", "--data_dir", str(tmp_path), "--output_dir", str(run)]
    words += ["--model_name_or_path", str(tmp_path / "bert"), "--method", method]
    words += ["--base_dtype", "float32", "--max_length", "40", "--max_train_steps", "2"]
    assert program.run_main(main, words) == 0
    capsys.readouterr()
    next_steps.main(run)
    _, command, code = capsys.readouterr().out.split("\n\n", 2)[0:3]
    code = "\n".join(line[4:] for line in code.splitlines() if line.startswith("    "))
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nprint(model.eval()(**batch).logits.shape)"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "tensor([[" in done.stdout and "torch.Size([1, 2])" in done.stdout
    assert "# not_equivalent, equivalent" in code
    bash, script, *options = shlex.split(command)
    assert bash == "bash" and Path(script).is_file()
    needed = ["--model_name_or_path", "m", "--output_dir", "o"]
    assert (
        program.parse([*needed, *options], "run_glue", "", OPTION_CLASSES, "task_name") is not None
    )


def test_nothing_is_said_of_a_run_without_result(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    next_steps.main(tmp_path)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("words", "trained", "last"),
    [
        ([], "examples.run_glue --task_name wording", f"next_steps {ROOT}/runs/quickstart"),
        (["--lora_r", "4", "--output_dir", "here"], "examples.run_glue", "next_steps here"),
        (["--output_dir=there", "--seed", "1"], "examples.run_glue", "next_steps there"),
        (["e2e"], "examples.run_nlg --task_name e2e", f"show_texts {ROOT}/runs/quickstart_e2e"),
        (["e2e", "--output_dir", "here"], "examples.run_nlg", "show_texts here"),
    ],
)
def test_the_quick_start_ends_with_the_steps_of_its_run(
    tmp_path: Path, words: list[str], trained: str, last: str
) -> None:
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(RECORDER)
    python.chmod(0o755)
    record = tmp_path / "record"
    subprocess.run(
        ["bash", str(ROOT / "scripts" / "quickstart.sh"), *words],
        env={"PATH": "/usr/bin:/bin", "VENV": str(tmp_path / "venv"), "RECORD": str(record),
             "PYTHON": str(python)},
        check=True,
        capture_output=True,
    )  # fmt: skip
    *_, run, after = record.read_text().splitlines()
    assert run.startswith(trained) and last.split()[1] in run
    assert after == f"examples.{last}"
    given = words[1:] if words[:1] == ["e2e"] else words
    assert run.endswith(" ".join(given)) and " e2e --output_dir" not in run
    if "e2e" in words:
        for folder in ("models/gpt2-mini", "examples/data/embedded/museums"):
            assert f"{ROOT}/{folder}" in run and (ROOT / folder).is_dir()
