"""DyLoRA in whole runs: ranks as variants in one pass, reports, starts, exports, training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.runner_cases import lines, pair_task, results, tiny_bert

import loralib
from examples import export_adapter, program
from examples.evaluation import prediction as evaluation
from examples.methods.dylora import DyLoraOptions
from examples.methods.dylora_ranks import chosen_ranks, repeated
from examples.run_glue import main

FAST = (
    "--base_dtype float32 --learning_rate 2e-2 --num_train_epochs 2 --max_length 40 --lora_r 5"
).split()
WIRINGS = ("peft_custom", "loralib")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    tiny_bert(folder / "bert")
    pair_task(folder / "mrpc", {"train": 40, "validation": 23, "test": 7})
    three = {"train": 30, "validation_matched": 12, "validation_mismatched": 9}
    pair_task(folder / "mnli", three, labels=3, names=("premise", "hypothesis"))
    return folder


def run(home: Path, out: Path, *more: str, task: str = "mrpc", method: str = "dylora") -> Path:
    words = ["--task_name", task, "--model_name_or_path", str(home / "bert"), "--data_dir"]
    words += [str(home), "--cache_dir", str(home / "cache"), "--output_dir", str(out), *FAST]
    assert program.run_main(main, [*words, "--method", method, *more]) == 0
    return out


def figures(monkeypatch: pytest.MonkeyPatch, *args: str, **kwargs: str) -> dict[str, float]:
    """The metrics of an evaluation without training."""
    seen = {}
    finish = program.Run.finish

    def noting(self, metrics, figures):
        seen.update(metrics)
        finish(self, metrics, figures)

    with monkeypatch.context() as patch:
        patch.setattr(program.Run, "finish", noting)
        run(*args, "--eval_only", **kwargs)
    return seen


@pytest.fixture(scope="module")
def runs(home, tmp_path_factory):
    """The same run in both wirings: both go on from one adapter."""
    folder = tmp_path_factory.mktemp("runs")
    run(home, folder / "start", "--max_train_steps", "1")
    for wiring in WIRINGS:
        words = ["--wiring", wiring, "--lora_path", str(folder / "start"), "--logging_steps", "1"]
        run(home, folder / wiring, *words, "--do_predict")
    return folder


def test_ranks_to_evaluate():
    options = DyLoraOptions(lora_r=6)
    assert options.ranks(False) == [1, 6] and options.ranks(True) == [1, 2, 3, 4, 5, 6]
    options = DyLoraOptions(lora_r=6, dylora_r_min=4)
    assert options.ranks(False) == [4, 6] and options.ranks(True) == [4, 5, 6]
    options = DyLoraOptions(lora_r=6, dylora_eval_ranks=("2", "1"))
    assert options.ranks(False) == options.ranks(True) == [1, 2, 6]
    options = DyLoraOptions(
        lora_r=6, dylora_mode="matryoshka", dylora_train_ranks=("2", "4", "6"), dylora_r_min=2
    )
    assert options.ranks(False) == [2, 6] and options.ranks(True) == [2, 4, 6]


@pytest.mark.parametrize("wiring", WIRINGS)
def test_every_rank_is_reported(runs, wiring):
    found = results(runs / wiring)
    for b in range(1, 6):
        names = {f"eval_r{b}_{name}" for name in ("accuracy", "f1", "combined_score", "loss")}
        assert names <= found.keys()
    assert found["eval_f1"] == found["eval_r5_f1"] and found["eval_loss"] == found["eval_r5_loss"]
    assert len({found[f"eval_r{b}_loss"] for b in range(1, 6)}) == 5
    on_the_way = [name for name in lines(runs / wiring / "metrics.jsonl")[0] if "_r" in name]
    assert {name.split("_")[1] for name in on_the_way} == {"r1", "r5"}
    ranks = [row["rank"] for row in lines(runs / wiring / "log.jsonl")]
    assert set(ranks) <= {1.0, 2.0, 3.0, 4.0, 5.0} and len(set(ranks)) > 2
    curve = json.loads((runs / wiring / "rank_curve.json").read_text())
    assert curve["ranks"] == [1, 2, 3, 4, 5]
    assert curve["eval_loss"] == [found[f"eval_r{b}_loss"] for b in range(1, 6)]
    assert curve["best_rank"] == found["best_rank"]
    assert curve["smallest_rank"] == found["smallest_rank"]
    assert (runs / wiring / "rank_curve.png").read_bytes()[:4] == b"\x89PNG"
    files = {str(p.parent.name) for p in (runs / wiring / "submission").rglob("MRPC.tsv")}
    assert files == {"submission", "r1", "r2", "r3", "r4", "r5"}


def test_both_wirings_train_alike(runs):
    one, two = (lines(runs / wiring / "metrics.jsonl") for wiring in WIRINGS)
    assert len(one) == 2
    for a, b in zip(one, two, strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], abs=1e-5)
        assert a["eval_r1_loss"] == pytest.approx(b["eval_r1_loss"], abs=1e-4)
    tensors = load_file(runs / "loralib" / "adapter" / "lora.safetensors")
    assert tensors["bert.encoder.layer.1.attention.self.value.lora_A"].shape == (5, 32)
    values = json.loads((runs / "loralib" / "adapter" / "lora.json").read_text())
    assert values["dylora_mode"] == "normal"


@pytest.mark.parametrize("batches", [["--packing"], []])
def test_a_stacked_pass_is_one_pass_per_rank(home, runs, tmp_path, monkeypatch, batches):
    """The metrics of the run, from another batching, are those of set_rank and a plain pass."""
    words = ["--lora_path", str(runs / "peft_custom"), "--per_device_eval_batch_size", "6"]
    stacked = figures(monkeypatch, home, tmp_path / "none", *words, *batches)
    expected = results(runs / "peft_custom")
    assert {n: expected[n] for n in stacked} == pytest.approx(stacked, abs=1e-6)
    kept = evaluation.predict

    def at_rank_2(model, data, accelerator, predictor, final):
        with loralib.at_rank(model, 2):
            return kept(model, data, accelerator, evaluation.PlainPredictor(), final)

    monkeypatch.setattr(evaluation, "predict", at_rank_2)
    monkeypatch.setattr("examples.methods.dylora_ranks.RankReport.__call__", lambda *given: {})
    plain = figures(monkeypatch, home, tmp_path / "none", *words, *batches)
    assert plain["eval_loss"] == pytest.approx(stacked["eval_r2_loss"], abs=1e-6)
    assert plain["eval_f1"] == stacked["eval_r2_f1"]


def test_repeated_rows_come_in_blocks():
    packed = {
        "input_ids": torch.tensor([7, 8, 9]),
        "cu_seqlens": torch.tensor([0, 2, 3], dtype=torch.int32),
        "max_seqlen": 2,
    }
    found = repeated(packed, 3)
    assert found["input_ids"].tolist() == [7, 8, 9] * 3 and found["max_seqlen"] == 2
    assert found["cu_seqlens"].tolist() == [0, 2, 3, 5, 6, 8, 9]
    assert found["cu_seqlens"].dtype == torch.int32
    padded = {"input_ids": torch.tensor([[1, 2], [3, 4]])}
    assert repeated(padded, 2)["input_ids"].tolist() == [[1, 2], [3, 4], [1, 2], [3, 4]]


@pytest.mark.parametrize(("wiring", "mode"), [("peft_custom", "frozen"), ("loralib", "normal")])
def test_evaluating_does_not_change_training(home, tmp_path, wiring, mode):
    words = ["--wiring", wiring, "--dylora_mode", mode, "--load_best_model_at_end", "false"]
    words += ["--lora_dropout", "0.1", "--logging_steps", "1"]
    often = run(home, tmp_path / "often", *words, "--eval_steps", "1")
    never = run(home, tmp_path / "never", *words, "--eval_strategy", "no")
    names = {"peft_custom": "adapter_model.safetensors", "loralib": "lora.safetensors"}
    one, two = ((f / "adapter" / names[wiring]).read_bytes() for f in (often, never))
    assert one == two
    assert lines(often / "log.jsonl") == lines(never / "log.jsonl")
    assert len(lines(often / "metrics.jsonl")) == 10 and not (never / "metrics.jsonl").exists()


def test_a_killed_run_draws_the_same_ranks(home, tmp_path):
    words = ["--dylora_mode", "frozen", "--dylora_dist", "geometric(0.3)", "--logging_steps", "1"]
    whole = run(home, tmp_path / "whole", *words)
    first = run(home, tmp_path / "first", *words, "--save_total_limit", "0")
    (first / "all_results.json").unlink()
    for folder in ("checkpoint-10", "adapter"):
        for path in (first / folder).iterdir():
            path.unlink()
        (first / folder).rmdir()
    run(home, first, *words, "--save_total_limit", "0", "--resume_from_checkpoint", "auto")
    name = "adapter/adapter_model.safetensors"
    assert (whole / name).read_bytes() == (first / name).read_bytes()
    assert lines(whole / "log.jsonl") == lines(first / "log.jsonl")


@pytest.mark.parametrize("method", ["lora", "dylora"])
@pytest.mark.parametrize("wiring", WIRINGS)
def test_an_mnli_adapter_is_continued(home, tmp_path, capsys, method, wiring):
    mnli = run(home, tmp_path / "mnli", "--max_train_steps", "2", task="mnli", method=method)
    words = ["--wiring", wiring, "--lora_path", str(mnli), "--learning_rate", "0"]
    run(home, tmp_path / "mrpc", *words, "--max_train_steps", "1")
    assert "only the LoRA factors are taken over" in capsys.readouterr().out
    theirs = load_file(mnli / "adapter" / "adapter_model.safetensors")
    name = {"peft_custom": "adapter_model", "loralib": "lora"}[wiring]
    ours = load_file(tmp_path / "mrpc" / "adapter" / f"{name}.safetensors")
    short = {n.replace("base_model.model.", "").replace(".weight", ""): t for n, t in ours.items()}
    factors = {n: t for n, t in theirs.items() if ".lora_" in n}
    assert len(factors) == 8
    for full, tensor in factors.items():
        found = short[full.replace("base_model.model.", "").replace(".weight", "")]
        assert torch.equal(found, tensor)


def test_overwriting_leaves_no_curve_of_the_run_before(home, tmp_path):
    out = run(home, tmp_path / "run", "--max_train_steps", "1")
    assert (out / "rank_curve.json").is_file()
    run(home, out, "--max_train_steps", "1", "--overwrite_output_dir", method="lora")
    assert not list(out.glob("rank_curve.*"))


def test_another_rank_is_refused(home, runs, tmp_path, capsys):
    words = ["--task_name", "mrpc", "--model_name_or_path", str(home / "bert"), "--method"]
    words += ["dylora", "--data_dir", str(home), "--output_dir", str(tmp_path / "x"), *FAST[:-2]]
    assert program.run_main(main, [*words, "--lora_path", str(runs / "start")]) == 2
    assert "has r 5: give --lora_r 5" in capsys.readouterr().err


@pytest.mark.parametrize("wiring", WIRINGS)
def test_an_exported_rank_has_the_reported_metrics(home, runs, tmp_path, monkeypatch, wiring):
    said = results(runs / wiring)
    out = tmp_path / "r2"
    assert export_adapter.main([str(runs / wiring), "--rank", "2", "--out", str(out)]) == 0
    values = json.loads((out / "adapter_config.json").read_text())
    assert (values["peft_type"], values["r"], values["lora_alpha"]) == ("LORA", 2, 16)
    words = ["--lora_path", str(out), "--lora_r", "2"]
    found = figures(monkeypatch, home, tmp_path / "none", *words, method="lora")
    assert found["eval_loss"] == pytest.approx(said["eval_r2_loss"], abs=1e-6)
    merged = tmp_path / "merged"
    words = [str(runs / wiring), "--rank", "3", "--out", str(merged), "--merged"]
    assert export_adapter.main(words) == 0
    words = ["--model_name_or_path", str(merged), "--method", "full", "--eval_only"]
    seen = {}
    monkeypatch.setattr(program.Run, "finish", lambda self, metrics, _: seen.update(metrics))
    base = ["--task_name", "mrpc", "--data_dir", str(home), "--output_dir", str(tmp_path / "no")]
    assert program.run_main(main, [*base, *words, "--max_length", "40", "--no_cache"]) == 0
    assert seen["eval_loss"] == pytest.approx(said["eval_r3_loss"], abs=1e-6)


def test_exports_that_cannot_be(home, runs, tmp_path, capsys):
    plain = run(home, tmp_path / "plain", "--max_train_steps", "1", method="lora")
    new = str(tmp_path / "new")
    for words, message in (
        ([str(runs / "start"), "--rank", "6", "--out", new], "has the ranks 1 to 5"),
        ([str(runs / "start"), "--rank", "1", "--out", str(tmp_path)], "choose another folder"),
        ([str(plain), "--rank", "6", "--out", new], "the adapter has the ranks 1 to 5"),
        ([str(tmp_path), "--rank", "1", "--out", new], "is no finished run"),
    ):
        assert program.run_main(export_adapter.main, words) == 2
        assert message in capsys.readouterr().err
        assert not Path(new).exists()


def test_the_best_and_the_smallest_good_rank():
    ranks, values = [1, 2, 4, 8], [0.80, 0.885, 0.89, 0.89]
    assert chosen_ranks(ranks, values, 0.01, False) == {"best_rank": 4, "smallest_rank": 2}
    assert chosen_ranks(ranks, values, 0.0, False) == {"best_rank": 4, "smallest_rank": 4}
    assert chosen_ranks(ranks, values, 0.1, True) == {"best_rank": 1, "smallest_rank": 1}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--dylora_eval_ranks", "1,9"], "--dylora_eval_ranks 9: ranks are whole numbers from 1"),
        (["--dylora_r_min", "6"], "--dylora_r_min 6 is above --lora_r 5"),
        (["--dylora_train_ranks", "1,5"], "--dylora_train_ranks goes with --dylora_mode matry"),
        (
            ["--dylora_mode", "matryoshka", "--dylora_train_ranks", "1,4"],
            "--dylora_train_ranks 1,4: rising ranks are needed, from --dylora_r_min 1 on, the last",
        ),
        (["--dylora_mode", "frosen"], "did you mean frozen?"),
        (["--dylora_dist", "geometric(2)"], "use 'uniform' or 'geometric(p)'"),
    ],
)
def test_mistakes_are_one_line(home, tmp_path, capsys, words, message):
    base = ["--task_name", "mrpc", "--model_name_or_path", str(home / "bert"), "--data_dir"]
    base += [str(home), "--output_dir", str(tmp_path / "x"), *FAST]
    assert program.run_main(main, [*base, "--method", "dylora", *words]) == 2
    said = capsys.readouterr().err
    assert message in said and len(said.splitlines()) == 1
