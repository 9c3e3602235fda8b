"""Whole runs on questions about paragraphs: every way to train, to batch, to stop and go on."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.processes import WAYS, launch_two
from support.runner_cases import lines, results, tiny_bert
from support.squad_cases import squad_task

from examples import evaluate_squad, program
from examples.run_squad import main
from peft_custom import PeftModel
from transformers_patched import AutoModelForQuestionAnswering

OPTIONS = (
    "--base_dtype float32 --learning_rate 2e-2 --num_train_epochs 2 --max_length 24 "
    "--doc_stride 6 --max_query_length 8 --eval_strategy epoch"
).split()
METHODS = {
    "full": [], "lora": [], "dylora": ["--lora_r", "4"],
    "adalora": ["--adalora_tinit", "0.1", "--adalora_tfinal", "0.3"],
    "vilora": ["--adalora_tinit", "0.1", "--adalora_tfinal", "0.3", "--ivon_infer_mc_samples", "2"],
    "bim_lora": ["--block_size", "4"],
}  # fmt: skip
BLOCKS = "--mask_block_rows 8 --mask_block_cols 16 --final_threshold 0.5".split()
PRUNING = {
    "splora": [],
    "splopa": ["--pruning_method", "sigmoied_threshold"],
    "block_prune": ["--mask_structure", "hybrid"],
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    tiny_bert(folder / "bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    squad_task(folder / "squad", {"train": 24, "dev": 11})
    squad_task(folder / "squad_v2", {"train": 24, "dev": 11, "test": 5}, empty=True)
    return folder


def words(home: Path, out: Path, *more: str) -> list[str]:
    where = ["--model_name_or_path", str(home / "bert"), "--data_dir", str(home)]
    cache = ["--cache_dir", str(home / "cache")]
    return [*where, *cache, *OPTIONS, "--output_dir", str(out), *more]


def run(home: Path, out: Path, *more: str) -> Path:
    assert program.run_main(main, words(home, out, *more)) == 0
    return out


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def assert_close(one: dict, two: dict) -> None:
    assert one.keys() == two.keys()
    for name in one.keys() - {"base_model.model.qa_outputs.bias"}:  # a softmax does not see it
        torch.testing.assert_close(one[name], two[name], atol=2e-6, rtol=1e-5)


def answers(folder: Path, name: str = "predictions", split: str = "validation") -> dict:
    return json.loads((folder / "submission" / split / f"{name}.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def plain(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(home, tmp_path_factory.mktemp("plain") / "run")


def test_the_files_of_a_run_have_its_score(home: Path, plain: Path, tmp_path: Path) -> None:
    found, scores = results(plain), tmp_path / "scores.json"
    data, given = home / "squad/dev.json", plain / "submission/validation/predictions.json"
    command = ["--data", str(data), "--pred", str(given), "--output", str(scores)]
    assert evaluate_squad.main(command) == 0
    score = json.loads(scores.read_text())
    for name in ("exact", "f1"):
        assert found[f"eval_{name}"] == pytest.approx(score[name])
    rows = lines(plain / "metrics.jsonl")
    assert found["eval_f1"] == max(row["eval_f1"] for row in rows)
    assert {"eval_exact", "eval_f1", "eval_loss"} == {n for n in rows[0] if n.startswith("eval")}
    assert all(entries[0]["text"] for entries in answers(plain, "nbest_predictions").values())


def test_packed_and_padded_runs_are_one(home: Path, plain: Path, tmp_path: Path) -> None:
    packed = ["--packing", "--group_by_length", "--max_tokens", "60"]
    for name, more in (("packed", packed), ("wide", ["--pad_to_max_length"])):
        other = run(home, tmp_path / name, *more)
        assert_close(adapter(plain), adapter(other))
        for a, b in zip(
            lines(plain / "metrics.jsonl"), lines(other / "metrics.jsonl"), strict=True
        ):
            assert a == pytest.approx(b, abs=1e-4)
        assert answers(plain) == answers(other)


@pytest.mark.parametrize("method", METHODS)
def test_every_method(home: Path, tmp_path: Path, method: str) -> None:
    out = run(home, tmp_path / "run", "--method", method, *METHODS[method])
    found = results(out)
    assert 0 <= found["eval_exact"] <= found["eval_f1"] <= 100
    if method == "dylora":
        for rank in (1, 4):
            assert 0 < found[f"eval_r{rank}_loss"]
        assert found["eval_r4_loss"] == pytest.approx(found["eval_loss"])
        path = out / "submission/r4/validation/predictions.json"
        assert json.loads(path.read_text()) == answers(out)


@pytest.mark.parametrize("method", PRUNING)
def test_a_pruned_model_answers_alike_when_it_is_loaded(
    home: Path, tmp_path: Path, method: str
) -> None:
    more = ["--method", method, *BLOCKS, *PRUNING[method]]
    out = run(home, tmp_path / "run", *more)
    found = results(out)
    assert 0.4 < found["density"] < 0.6
    whole = home / "bert"
    model = AutoModelForQuestionAnswering.from_pretrained(whole)
    pruned = PeftModel.from_pretrained(model, out / "adapter").merge_and_unload()
    shutil.copytree(whole, tmp_path / "merged")
    pruned.save_pretrained(tmp_path / "merged")
    zeros = sum(int((p == 0).sum()) for n, p in pruned.named_parameters() if "layer" in n)
    assert zeros >= found["encoder_weights"] - found["encoder_kept"]
    again = ["--model_name_or_path", str(tmp_path / "merged"), "--eval_only", "--do_predict"]
    other = run(home, tmp_path / "again", *again)
    assert answers(other) == answers(out)


def test_averaged_predictions_have_the_loss_of_their_logits(home: Path, tmp_path: Path) -> None:
    """With next to no variance, the average over draws is the prediction at the mean."""
    more = ["--optimizer", "ivon", "--ivon_infer_mc_samples", "3", "--ivon_hess_init", "1e9"]
    found = results(run(home, tmp_path / "run", *more))
    assert found["eval_loss"] == pytest.approx(found["eval_mean_loss"], rel=1e-3)
    assert found["eval_f1"] == found["eval_mean_f1"]


@pytest.mark.parametrize("method", ["lora", "dylora"])
def test_both_wirings(home: Path, tmp_path: Path, method: str) -> None:
    """They differ in their first random factors, and go on alike from one adapter."""
    first = run(home, tmp_path / "first", "--method", method, "--num_train_epochs", "1")
    start = ["--method", method, "--lora_path", str(first / "adapter")]
    made = []
    for wiring in ("peft_custom", "loralib"):
        out = run(home, tmp_path / wiring, *start, "--wiring", wiring)
        made.append(results(out))
    for name in ("eval_f1", "eval_exact", "eval_loss"):
        assert made[0][name] == pytest.approx(made[1][name], rel=1e-4)


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_are_one(home: Path, plain: Path, tmp_path: Path, way: str) -> None:
    small = ["--per_device_train_batch_size", "4", "--per_device_eval_batch_size", "5"]
    launch_two(["-m", "examples.run_squad"], *words(home, tmp_path / "two", *small), way=way)
    assert_close(adapter(plain), adapter(tmp_path / "two"))
    rows = [lines(out / "metrics.jsonl") for out in (plain, tmp_path / "two")]
    for a, b in zip(*rows, strict=True):
        assert a == pytest.approx(b, abs=1e-4)
    assert answers(plain) == answers(tmp_path / "two")


def test_killed_it_goes_on(home: Path, plain: Path, tmp_path: Path) -> None:
    """Killed at once after its third step; the end is that of a run that went through."""
    more = ["--save_steps", "1", "--save_total_limit", "0", "--logging_steps", "1"]
    command = [sys.executable, "-m", "examples.run_squad", *words(home, tmp_path / "run", *more)]
    command += ["--disable_tqdm"]
    threads = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=threads
    )
    said = []
    for line in process.stderr:
        said.append(line)
        if re.match("step [3-9]/", line):
            break
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "".join(said)
    assert not (tmp_path / "run/all_results.json").exists()
    run(home, tmp_path / "run", *more, "--resume_from_checkpoint", "auto")
    whole = run(home, tmp_path / "whole", *more)
    for name in ("adapter/adapter_model.safetensors", "submission/validation/predictions.json"):
        assert (whole / name).read_bytes() == (tmp_path / "run" / name).read_bytes()
    assert lines(whole / "metrics.jsonl") == lines(tmp_path / "run/metrics.jsonl")


# --- no answer -----------------------------------------------------------------------------------


def test_questions_without_an_answer(home: Path, tmp_path: Path) -> None:
    last = ["--load_best_model_at_end", "false"]  # the best epoch depends on the threshold
    out = run(home, tmp_path / "v2", "--version_2_with_negative", "--do_predict", *last)
    found = results(out)
    assert {"eval_HasAns_f1", "eval_NoAns_exact", "eval_best_f1_thresh"} <= found.keys()
    assert found["eval_best_f1"] >= found["eval_f1"]
    odds, texts = answers(out, "null_odds"), answers(out)
    assert all((texts[id] == "") == (odds[id] > 0) for id in odds)
    assert len(answers(out, split="test")) == 5
    # The same by the task's name, at a threshold that lets every answer in.
    high = ["--task_name", "squad_v2", "--null_score_diff_threshold", "1e9", *last]
    every = run(home, tmp_path / "high", *high)
    assert all(answers(every).values())
    assert_close(adapter(out), adapter(every))


# --- options -------------------------------------------------------------------------------------


def test_the_originals_names(home: Path, plain: Path, tmp_path: Path) -> None:
    data = ["--train_file", "train.json", "--predict_file", "dev.json"]
    where = ["--data_dir", str(home / "squad"), "--max_seq_length", "24", *data]
    more = ["--per_gpu_train_batch_size", "8", "--evaluate_during_training", "--overwrite_cache"]
    more += ["--do_lower_case", "--do_train", "--do_eval", "--max_steps", "-1"]
    out = run(home, tmp_path / "run", *where, *more)
    assert_close(adapter(plain), adapter(out))
    assert answers(plain) == answers(out)
    few = run(home, tmp_path / "few", "--truncate_train_examples", "4", "--max_steps", "1")
    assert len(answers(few)) == 4


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--doc_stride", "20"], "dev.json, question dev2 (2 tokens): it leaves a window 19"),
        (["--max_length", "5", "--doc_stride", "1"], "it leaves no room for the paragraph"),
        (["--train_file", "x.json"], "--validation_file is needed"),
        (["--train_file", "t", "--text_column", "question"], "SQuAD's columns are known"),
        (["--label_smoothing_factor", "0.1"], "spans have no smoothed labels"),
        (["--calibration"], "spans have no classes"),
        (["--model_type", "bert"], "the checkpoint's config.json says it"),
        (["--task_name", "squad3"], "choose among squad, squad_v2"),
        (["--max_length", "41"], "more than the 40 tokens this model takes"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_touched(
    home: Path, tmp_path: Path, capsys, more: list[str], said: str
) -> None:
    assert program.run_main(main, words(home, tmp_path / "run", *more)) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run" / "config.json").exists()


def test_evaluating_alone_writes_only_where_it_is_asked_to(
    home: Path, plain: Path, tmp_path: Path, capsys
) -> None:
    where = ["--lora_path", str(plain / "adapter"), "--eval_only"]
    run(home, tmp_path / "none", *where)
    assert f"{results(plain)['eval_f1']:.4f}" in capsys.readouterr().out
    assert not (tmp_path / "none").exists()
    assert answers(run(home, tmp_path / "files", *where, "--do_predict")) == answers(plain)
