"""run_multiple_choice as a whole: every method, both wirings, padded, packed, resumed, on two."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from support.choice_cases import choice_task
from support.processes import WAYS, launch_two
from support.runner_cases import lines, results, tiny_bert, tiny_deberta

from examples import program
from examples.evaluation.calibration import nll
from examples.methods import METHODS
from examples.run_multiple_choice import main, smoothed_loss
from peft_custom import PeftModel
from transformers_patched import AutoModelForMultipleChoice, AutoTokenizer

RUN = (
    "--base_dtype float32 --max_length 40 --no_cache --per_device_train_batch_size 6 "
    "--num_train_epochs 2 --disable_tqdm --calibration --metric_for_best_model loss"
).split()
SHORT = {
    "adalora": "--adalora_init_r 3 --adalora_target_r 2 --adalora_tinit 1 --adalora_tfinal 3 "
    "--adalora_delta_t 1",
    "bim_lora": "--block_size 4",
    "splopa": "--mask_block_rows 8 --mask_block_cols 16",
    "block_prune": "--mask_block_rows 8 --mask_block_cols 16",
}
SHORT["vilora"] = SHORT["adalora"] + " --learning_rate 50"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    tiny_bert(folder / "bert", initializer_range=0.2, **still)
    tiny_bert(folder / "dropout", initializer_range=0.2)
    choice_task(folder / "arc_easy", {"train": 23, "validation": 13, "test": 7})
    return folder


def words(home: Path, out: Path, *more: str, model: str = "bert") -> list[str]:
    where = ["--model_name_or_path", str(home / model), "--data_dir", str(home)]
    return ["--task_name", "ARC-Easy", *where, *RUN, "--output_dir", str(out), *more]


def run(home: Path, out: Path, *more: str, model: str = "bert") -> Path:
    assert program.run_main(main, words(home, out, *more, model=model)) == 0
    return out


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def assert_close(one: Path, two: Path, **tolerance: float) -> None:
    """Two runs' adapters, but for the head's bias: all choices have it, so nothing determines it.

    Its gradient is 0 but for rounding, of which Adam makes steps like any others.
    """
    for name, tensor in adapter(one).items():
        if not name.endswith("classifier.bias"):
            torch.testing.assert_close(adapter(two)[name], tensor, **tolerance, msg=name)


def log_probabilities(model: torch.nn.Module, home: Path, rows: list[dict]) -> np.ndarray:
    """(rows, 5) by Transformers, one question at a time."""
    tokenizer = AutoTokenizer.from_pretrained(home / "bert")
    found = np.full((len(rows), 5), -np.inf)
    for row, logs in zip(rows, found, strict=True):
        choices = row["choices"]
        call = tokenizer(
            [row["question"]] * len(choices), choices, padding=True, return_tensors="pt"
        )
        with torch.no_grad():
            logits = model(**{name: x[None] for name, x in call.items()}).logits[0]
        logs[: len(choices)] = logits.double().log_softmax(0)
    return found


@pytest.mark.parametrize("method", METHODS)
def test_every_methods_result_is_transformers_model(
    home: Path, tmp_path: Path, method: str
) -> None:
    """Merged and saved it is Transformers' model, which gives the loss that the run reports."""
    rate = [] if method == "vilora" else ["--learning_rate", "0.05"]
    out = run(home, tmp_path / "run", "--method", method, *rate, *SHORT.get(method, "").split())
    folder = out / "model"
    if not folder.is_dir():
        base = AutoModelForMultipleChoice.from_pretrained(home / "bert")
        model = PeftModel.from_pretrained(base, out / "adapter").merge_and_unload()
        model.save_pretrained(folder)
    theirs = transformers.AutoModelForMultipleChoice.from_pretrained(folder).eval()
    rows = lines(home / "arc_easy" / "validation.jsonl")
    logs = log_probabilities(theirs, home, rows)
    labels = np.array([row["label"] for row in rows])
    found = results(out)
    assert nll(logs, labels) == pytest.approx(found["eval_nll"], abs=2e-5)
    assert nll(logs, labels) == pytest.approx(found["eval_loss"], abs=2e-5)
    assert np.mean(logs.argmax(1) == labels) == pytest.approx(found["eval_accuracy"])


def test_it_learns(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    choice_task(tmp_path / "own", {"train": 240, "validation": 60}, seed=1)
    files = [f"--{s}_file={tmp_path / 'own' / s}.jsonl" for s in ("train", "validation")]
    where = ["--model_name_or_path", str(home / "bert"), "--output_dir", str(tmp_path / "run")]
    more = "--method full --num_train_epochs 8 --learning_rate 3e-3 --packing --warmup_ratio 0.1"
    assert program.run_main(main, [*files, *where, *RUN, *more.split()]) == 0
    assert results(tmp_path / "run")["eval_accuracy"] > 0.6  # chance is .32
    assert "custom: 240 training rows" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["lora", "dylora"])
def test_both_wirings_train_the_same_layers(home: Path, tmp_path: Path, method: str) -> None:
    sizes = []
    for wiring in ("peft_custom", "loralib"):
        more = ["--method", method, "--learning_rate", "1e-2", "--wiring", wiring]
        out = run(home, tmp_path / wiring, *more)
        sizes.append(results(out)["trainable_parameters"])
    assert sizes[0] == sizes[1]


def test_packed_padded_and_smaller_pieces_are_the_same_run(home: Path, tmp_path: Path) -> None:
    rate = ["--learning_rate", "0.02"]
    plain = run(home, tmp_path / "plain", *rate)
    others = {
        "packed": ["--packing"],
        "pieces": ["--packing", "--max_tokens", "160"],
        "global": ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "3"],
        "wide": ["--pad_to_max_length"],
    }
    for name, more in others.items():
        # rows meet alike only where length has no say
        order = ["--group_by_length", "true"]
        out = run(home, tmp_path / name, *rate, *order, *more)
        assert_close(plain, out, atol=2e-5, rtol=1e-4)
        assert results(out)["eval_loss"] == pytest.approx(results(plain)["eval_loss"], abs=1e-5)


def test_a_killed_run_ends_with_the_same_bytes(home: Path, tmp_path: Path) -> None:
    save = ["--learning_rate", "0.02", "--save_steps", "2", "--save_total_limit", "0"]
    whole = run(home, tmp_path / "whole", *save, model="dropout")
    again = tmp_path / "again"
    shutil.copytree(whole, again)
    for name in ("checkpoint-6", "checkpoint-8", "adapter"):
        shutil.rmtree(again / name)
    (again / "all_results.json").unlink()
    run(home, again, *save, "--resume_from_checkpoint", "auto", model="dropout")
    assert all(torch.equal(adapter(again)[name], t) for name, t in adapter(whole).items())


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_equal_one(home: Path, tmp_path: Path, way: str) -> None:
    rate = ["--learning_rate", "0.02", "--adam_epsilon", "1e-3", "--do_predict"]
    small = ["--per_device_train_batch_size", "3", "--per_device_eval_batch_size", "4"]
    two = words(home, tmp_path / "two", *rate, *small)
    launch_two(["-m", "examples.run_multiple_choice"], *two, way=way)
    run(home, tmp_path / "one", *rate)
    assert_close(tmp_path / "one", tmp_path / "two", atol=1e-6, rtol=1e-5)
    one, two = (results(tmp_path / name) for name in ("one", "two"))
    for name in ("eval_loss", "eval_accuracy", "eval_nll"):
        assert one[name] == pytest.approx(two[name], abs=1e-5)
    files = [tmp_path / name / "submission" / "ARC-Easy.csv" for name in ("one", "two")]
    assert files[0].read_text() == files[1].read_text()


def test_predictions_are_the_files_own_names(home: Path, tmp_path: Path) -> None:
    out = run(home, tmp_path / "run", "--do_predict", "--learning_rate", "0.05")
    with open(out / "submission" / "ARC-Easy.csv", newline="") as file:
        found = dict(csv.reader(file))
    rows = lines(home / "arc_easy" / "test.jsonl")
    base = AutoModelForMultipleChoice.from_pretrained(home / "bert")
    model = PeftModel.from_pretrained(base, out / "adapter").merge_and_unload()
    model.save_pretrained(tmp_path / "model")
    theirs = transformers.AutoModelForMultipleChoice.from_pretrained(tmp_path / "model").eval()
    wanted = log_probabilities(theirs, home, rows).argmax(1)
    assert found == {row["id"]: str(k) for row, k in zip(rows, wanted, strict=True)}


def test_deberta_without_a_pooler(home: Path, tmp_path: Path) -> None:
    tiny_deberta(tmp_path / "deberta")
    home_of_model = home / "deberta"
    if not home_of_model.exists():
        shutil.copytree(tmp_path / "deberta", home_of_model)
    modules = ["--lora_modules", "query_proj,value_proj", "--packing"]
    out = run(home, tmp_path / "run", *modules, model="deberta")
    assert any("pooler" in name for name in adapter(out))


def test_smoothing_stays_within_a_questions_choices() -> None:
    logits = torch.randn(2, 4, dtype=torch.float64)
    counts, labels = torch.tensor([2, 4]), torch.tensor([1, 2])
    alone = [
        torch.nn.functional.cross_entropy(z[None, :n], y[None], label_smoothing=0.3)
        for z, n, y in zip(logits.float(), counts, labels, strict=True)
    ]
    logits[0, 2:] = torch.finfo(torch.float32).min

    class Output:
        pass

    output = Output()
    output.logits = logits
    found = smoothed_loss(0.3)(output, {"choice_counts": counts, "labels": labels})
    torch.testing.assert_close(found, sum(alone) / 2)


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Iterator[pytest.CaptureFixture[str]]:
    yield capsys


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--task_name", "arc"], "unknown task 'arc'; choose among arc_easy, arc_challenge"),
        (["--metric_for_best_model", "f1"], "arc_easy has accuracy, combined_score, loss"),
        (["--max_length", "8"], "leaves its question no room in --max_length 8: give at least"),
    ],
)
def test_mistakes_are_one_line(
    home: Path, tmp_path: Path, said: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    long = tmp_path / "home" / "arc_easy"
    shutil.copytree(home / "arc_easy", long)
    text = (long / "train.jsonl").read_text().replace("bado", "bado beno biru bosa cado ceno ciru")
    (long / "train.jsonl").write_text(text)
    where = ["--data_dir", str(tmp_path / "home")] if "8" in more else []
    code = program.run_main(main, [*words(home, tmp_path / "run"), *where, *more])
    error = said.readouterr().err.strip().splitlines()
    assert code == 2 and len(error) == 1 and message in error[0]
