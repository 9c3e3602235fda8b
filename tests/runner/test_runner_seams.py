"""Optimisers that sample the weights, and predictors with several variants, in whole runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support import sampling_case
from support.processes import launch_two
from support.runner_cases import lines, pair_task, results, tiny_bert

from examples import program
from examples.evaluation.prediction import summary_metrics, variant_metric
from examples.methods import registry as methods
from examples.run_glue import main
from examples.training import trainer
from examples.training.sampling import over_samples

OPTIONS = (
    "--base_dtype float32 --learning_rate 0.1 --num_train_epochs 2 --max_length 40 --no_cache "
    "--optimizer noisy --lora_dropout 0.0 --eval_strategy epoch"
).split()


@pytest.fixture(scope="module", autouse=True)
def registered():
    sampling_case.register()
    yield
    del methods.OPTIMIZERS["noisy"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    tiny_bert(folder / "bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    pair_task(folder / "mrpc", {"train": 29, "validation": 13, "test": 7})
    three = {"train": 12, "validation_matched": 12, "validation_mismatched": 9}
    three |= {"test_matched": 5, "test_mismatched": 4}
    pair_task(folder / "mnli", three, labels=3, names=("premise", "hypothesis"))
    return folder


def words(home: Path, out: Path, *more: str, task: str = "mrpc") -> list[str]:
    where = ["--model_name_or_path", str(home / "bert"), "--data_dir", str(home)]
    return ["--task_name", task, *where, *OPTIONS, "--output_dir", str(out), *more]


def run(home: Path, out: Path, *more: str, task: str = "mrpc") -> Path:
    assert program.run_main(main, words(home, out, *more, task=task)) == 0
    return out


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def assert_close(one: dict, two: dict, **tolerance: float) -> None:
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], **tolerance)


# --- sampling ------------------------------------------------------------------------------------


class Draws(sampling_case.NoisySGD):
    """Notes the first draw of each context, and those of the passes."""

    def __init__(self) -> None:
        weights = [torch.nn.Parameter(torch.zeros(3))]
        super().__init__([{"params": weights}], sampling_case.NoisyOptions(noise=1.0, samples=3))
        self.weights = weights[0]
        self.noise_drawn: list[float] = []
        self.pass_drawn: list[float] = []

    def backward(self) -> torch.Tensor:
        self.noise_drawn.append(self.weights[0].item())
        self.pass_drawn.append(torch.rand(()).item())
        (self.weights * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
        return self.weights.detach()[0].clone()


def test_processes_share_the_noise_of_the_weights_and_nothing_else():
    found = {}
    for step in (0, 1):
        for process in (0, 1):
            draws = Draws()
            torch.rand(process + 5)  # the history of the generator does not matter
            loss = over_samples(draws.backward, draws, 7, step, process)
            assert loss == pytest.approx(sum(draws.noise_drawn) / 3)
            assert draws.weights.grad.tolist() == pytest.approx([1.0, 2.0, 3.0])
            assert not draws.weights.any()  # the means are back
            found[step, process] = draws
    for step in (0, 1):
        assert found[step, 0].noise_drawn == found[step, 1].noise_drawn
    different = [d for key in found for d in found[key].pass_drawn]
    different += found[0, 0].noise_drawn + found[1, 0].noise_drawn
    assert len(set(different)) == 12 + 6


def test_an_ordinary_optimiser_has_one_pass():
    draws = Draws()
    over_samples(draws.backward, None, 7, 0, 0)
    assert draws.noise_drawn == [0.0] and draws.calls == []


def test_samples_without_noise_are_the_plain_step(home, tmp_path):
    one = run(home, tmp_path / "one", "--samples", "1")
    three = run(home, tmp_path / "three", "--samples", "3")
    assert_close(adapter(one), adapter(three), atol=1e-6, rtol=1e-5)
    noisy = run(home, tmp_path / "noisy", "--samples", "3", "--noise", "0.05")
    assert any((adapter(noisy)[n] - t).abs().max() > 1e-4 for n, t in adapter(one).items())


def test_looking_whether_compiling_pays_changes_nothing(home, tmp_path, monkeypatch):
    made = []

    def twice(model, run_passes, steps):
        run_passes()
        run_passes()
        return "compiled"

    class Kept(sampling_case.NoisySGD):
        def __init__(self, *given):
            super().__init__(*given)
            made.append(self)

    monkeypatch.setattr(trainer, "compile_and_compare", twice)
    monkeypatch.setattr(sampling_case, "NoisySGD", Kept)
    noise = ["--noise", "0.05", "--samples", "2", "--max_train_steps", "3"]
    plain = run(home, tmp_path / "plain", *noise)
    compiled = run(home, tmp_path / "compiled", *noise, "--compile")
    assert_close(adapter(plain), adapter(compiled), atol=0, rtol=0)
    assert [m.calls for m in made] == [[True] * 6, [False] * 4 + [True] * 6]


# --- variants ------------------------------------------------------------------------------------


def test_names_of_views():
    assert variant_metric("eval_f1", "") == "eval_f1"
    assert variant_metric("eval_matched_accuracy", "r4") == "eval_r4_matched_accuracy"
    names = ("eval_f1", "eval_loss", "eval_r1_f1", "eval_r1_loss", "eval_r11_f1", "steps")
    shown = summary_metrics(dict.fromkeys(names, 0.5), "eval_f1", ["r1", "r11"])
    assert list(shown) == ["eval_f1", "eval_loss", "eval_r1_f1", "eval_r11_f1", "steps"]


def test_views_have_their_metrics_and_files(home, tmp_path, capsys):
    out = run(home, tmp_path / "run", "--do_predict", task="mnli")
    found = results(out)
    for half in ("matched", "mismatched"):
        for variant in ("flat", "sharp", "same"):
            assert {f"eval_{variant}_{half}_{name}" for name in METRICS} <= found.keys()
        # the last variant stands for the plain one, which this predictor has not
        for name in METRICS:
            assert found[f"eval_{half}_{name}"] == found[f"eval_same_{half}_{name}"]
        assert found[f"eval_flat_{half}_loss"] == pytest.approx(found[f"eval_{half}_loss"] / 2)
        assert found[f"eval_{half}_nll"] == pytest.approx(found[f"eval_{half}_loss"], rel=1e-5)
        assert found[f"eval_flat_{half}_entropy"] > found[f"eval_sharp_{half}_entropy"]
    rows = lines(out / "metrics.jsonl")
    assert "eval_flat_matched_nll" in rows[0] and "eval_sharp_matched_nll" not in rows[0]
    best = max(range(len(rows)), key=lambda i: rows[i]["eval_matched_accuracy"])
    assert found["best_step"] == rows[best]["step"]
    files = sorted(str(p.relative_to(out)) for p in out.glob("submission/**/*.tsv"))
    folders = ("", "flat/", "same/", "sharp/")
    assert files == sorted(f"submission/{f}MNLI-{h}.tsv" for f in folders for h in ("m", "mm"))
    texts = {f: (out / f"submission/{f}MNLI-m.tsv").read_text() for f in folders}
    assert texts[""] == texts["same/"] and len(texts[""].splitlines()) == 6
    table = capsys.readouterr().out
    assert "eval_sharp_matched_accuracy" in table and "eval_sharp_matched_nll" not in table


METRICS = ("accuracy", "loss", "nll", "ece", "entropy")


def test_two_processes_equal_one(home, tmp_path):
    """Three rows per batch on two processes, six on one; the test set leaves one without a row."""
    noise = ["--noise", "0.05", "--samples", "2", "--do_predict", "--max_predict_samples", "2"]
    small = ["--per_device_train_batch_size", "3", "--per_device_eval_batch_size", "5"]
    launch_two([sampling_case.__file__], *words(home, tmp_path / "two", *noise, *small))
    run(home, tmp_path / "one", *noise, "--per_device_train_batch_size", "6")
    one, two = tmp_path / "one", tmp_path / "two"
    assert_close(adapter(one), adapter(two), atol=1e-6, rtol=1e-5)
    for a, b in zip(*(lines(f / "metrics.jsonl") for f in (one, two)), strict=True):
        assert a == pytest.approx(b, abs=1e-5)
    for variant in ("", "flat", "sharp", "same"):
        found = [(f / "submission" / variant / "MRPC.tsv").read_text() for f in (one, two)]
        assert found[0] == found[1]


# --- what probabilities are worth ----------------------------------------------------------------


def test_calibration_of_four_rows_by_hand():
    from examples.evaluation.calibration import calibration

    p = np.array([[0.9, 0.1], [0.92, 0.08], [0.3, 0.7], [0.5, 0.5]])
    found = calibration(np.log(p) + 3.0, np.array([0, 1, 1, 0]))
    # 15 bins: 0.9 and 0.92 share (13/15, 14/15], one of them right; 0.7 is in (10/15, 11/15]
    ece = 2 / 4 * abs(0.5 - 0.91) + 1 / 4 * (1 - 0.7) + 1 / 4 * (1 - 0.5)
    assert found["ece"] == pytest.approx(ece)
    assert found["nll"] == pytest.approx(-np.log([0.9, 0.08, 0.7, 0.5]).mean())


def test_calibration_equals_public_code():
    sklearn = pytest.importorskip("sklearn.metrics")
    stats = pytest.importorskip("scipy.stats")
    from examples.evaluation.calibration import calibration

    rng = np.random.default_rng(0)
    logits, labels = 3 * rng.standard_normal((200, 5)), rng.integers(0, 5, 200)
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    found = calibration(logits.astype(np.float32), labels)
    assert found["nll"] == pytest.approx(sklearn.log_loss(labels, p), rel=1e-6)
    assert found["entropy"] == pytest.approx(stats.entropy(p, axis=1).mean(), rel=1e-6)
    confidence, right = p.max(1), p.argmax(1) == labels
    edges, expected = np.linspace(0, 1, 16), 0.0
    for low, high in zip(edges, edges[1:], strict=False):
        inside = (confidence > low) & (confidence <= high)
        if inside.any():
            gap = abs(right[inside].mean() - confidence[inside].mean())
            expected += inside.mean() * gap
    assert found["ece"] == pytest.approx(expected, rel=1e-6)


def test_certain_predictions_have_finite_figures():
    from examples.evaluation.calibration import calibration

    found = calibration(np.array([[0.0, -np.inf], [-np.inf, 0.0]]), np.array([0, 1]))
    assert found == {"nll": 0.0, "ece": 0.0, "entropy": 0.0}
