"""scripts/run_squad_from_excel_sheet.py: lists, dry runs, processes, and whole tiny runs."""

from __future__ import annotations

import json
import shlex
import subprocess
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.runner_cases import pair_task, tiny_bert
from support.script_cases import script_module
from support.squad_cases import squad_task

pytest.importorskip("openpyxl")
sheet = script_module("run_squad_from_excel_sheet")
TOP_K = "topK_1.0_*_1_2_null_0._3e-5_1e-2_topK_constant_0._10_epochs"
TINY = (
    "--warmup_steps 1 --num_train_epochs 1 --base_dtype float32 --mask_block_rows 8 "
    "--mask_block_cols 16 --disable_tqdm --no_cache --max_length 40"
).split()


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]):
    """Calls the program: its status, what it printed, and its errors."""

    def run(*words: str) -> tuple[int, str, str]:
        status = sheet.main(words)
        told = capsys.readouterr()
        return status, told.out, told.err

    return run


def test_without_a_choice_the_rows_are_listed(call) -> None:
    for name, count, local in (("squad", 46, 46), ("mnli", 86, 78), ("qqp", 61, 61)):
        status, out, _ = call("--sheet", name)
        assert status == 0 and f"{count} rows, {local} of them" in out
        assert len(out.splitlines()) == count + 1


def test_a_dry_run_prints_commands(call, tmp_path: Path) -> None:
    words = ["--sheet", "squad", "--exp_id", TOP_K, "--remaining", "30.05", "--dry_run"]
    place = ["--output_dir", str(tmp_path / "o p"), "--learning_rate", "1e-4"]
    status, out, _ = call(*words, *place)
    assert status == 0
    command = shlex.split(out)
    assert command[:3] == ["python", "-m", "examples.run_squad"]
    assert command.count("--learning_rate") == 1
    for name, value in (
        ("--final_threshold", "0.3"), ("--pruning_method", "topK"), ("--learning_rate", "1e-4"),
        ("--output_dir", str(tmp_path / "o p" / "squad_row029")),
    ):  # fmt: skip
        assert command[command.index(name) + 1] == value
    assert not (tmp_path / "o p").exists()
    status, out, _ = call("--sheet", "qqp", "--row", "44,46", "--dry_run", "--data_dir", "d")
    lines = [shlex.split(line) for line in out.splitlines()]
    assert [line[2] for line in lines] == ["examples.run_glue"] * 2
    assert len({line[line.index("--output_dir") + 1] for line in lines}) == 2
    assert all("--splopa_prototypes_not_shared" in line for line in lines)


def test_wrong_words_are_one_error_before_anything_runs(call, tmp_path: Path) -> None:
    for words, message in (
        (["--exp_id", TOP_K], "15 rows are meant"),
        (["--exp_id", "none"], "EXP IDs are"),
        (["--row", "x"], "numbers of rows"),
        (["--row", "29", "--no_such_option", "1"], "no option --no_such_option"),
        (["--row", "29", "--jobs", "0"], "--jobs 0"),
        (["--row", "29", "--gpus", "0", "--jobs", "2"], "--gpus names 1"),
        (["--seed", "1"], "choose a row"),
        (["--workbook", str(tmp_path / "a.xslx")], "no such workbook"),
    ):
        status, out, err = call(*words, "--output_dir", str(tmp_path / "out"))
        assert status == 2 and err.startswith("error: ") and message in err, words
        assert "Traceback" not in err and not out
    assert not (tmp_path / "out").exists()


def test_runs_at_a_time_and_gpus_are_bounded(call, tmp_path, monkeypatch) -> None:
    lock, now, most, used = threading.Lock(), set(), [], []

    def fake(command: list[str], env: dict[str, str], **_: object) -> SimpleNamespace:
        folder, gpu = command[command.index("--output_dir") + 1], env["CUDA_VISIBLE_DEVICES"]
        with lock:
            assert gpu not in now  # no two runs share one
            now.add(gpu)
            most.append(len(now))
            used.append(gpu)
        time.sleep(0.02)
        with lock:
            now.remove(gpu)
        if "row016" in folder:
            return SimpleNamespace(returncode=3)
        Path(folder).mkdir(parents=True)
        (Path(folder) / "all_results.json").write_text('{"eval_exact": 1.0, "eval_f1": 2.0}')
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(sheet.subprocess, "run", fake)
    words = ["--row", "14,15,16,17,18,19,20", "--gpus", "4,7", "--output_dir", str(tmp_path)]
    status, out, err = call(*words)
    assert status == 1 and "row 16: failed with status 3" in err
    assert max(most) == 2 and set(used) == {"4", "7"} and len(used) == 7
    assert out.count("here: exact 1, f1 2") == 6
    log = (tmp_path / "squad_row020.log").read_text()
    assert log.startswith("+ python -m examples.run_squad") and "--method splopa" in log


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    tiny_bert(folder / "bert")
    squad_task(folder / "squad", {"train": 16, "dev": 8})
    splits = {"train": 32, "validation_matched": 6, "validation_mismatched": 6}
    pair_task(folder / "mnli", splits, labels=3)
    return folder


@pytest.mark.parametrize(
    ("name", "number", "more", "metric"),
    [
        ("squad", 49, ["--doc_stride", "6", "--max_query_length", "8"], "exact"),
        ("mnli", 48, [], "matched_accuracy"),
    ],
)
def test_a_row_runs_and_is_not_run_again(
    call, home: Path, tmp_path: Path, monkeypatch, name: str, number: int, more, metric: str
) -> None:
    words = ["--sheet", name, "--row", str(number), "--output_dir", str(tmp_path)]
    words += ["--model_name_or_path", str(home / "bert"), "--data_dir", str(home), *TINY, *more]
    if name == "mnli":
        words += ["--per_device_train_batch_size", "8"]
    else:
        words += ["--per_device_train_batch_size", "4"]
    status, out, err = call(*words)
    assert status == 0, err + (tmp_path / f"{name}_row{number:03}.log").read_text()
    assert f"row {number}" in out and f"here: {metric} " in out and "remaining" in out
    folder = tmp_path / f"{name}_row{number:03}"
    saved = json.loads((folder / "config.json").read_text())
    assert saved["method"] == ("splopa" if name == "squad" else "block_prune")
    assert saved["seed"] == 92 and saved["num_warmup_steps"] == 1
    found = json.loads((folder / "all_results.json").read_text())
    if name == "mnli":
        assert found["encoder_kept"] < 0.4 * found["encoder_weights"]

    def never(*_: object, **__: object) -> None:
        raise AssertionError("it was run again")

    monkeypatch.setattr(subprocess, "run", never)
    status, out, _ = call(*words)
    assert status == 0 and f"row {number}: done already" in out and "here:" in out
    status, out, err = call(*words, "--seed", "7")
    assert status == 2 and "seed was 92, now 7" in err
