"""IVON in whole runs: predictions over the posterior, h beside the result, resuming, processes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from support.processes import launch_two
from support.runner_cases import evaluated, lines, pair_task, results, tiny_bert

from examples import program
from examples.optimizers.ivon_posterior import HESSIAN, PosteriorPredictor, average
from examples.run_glue import OPTION_CLASSES, SUMMARY, main
from examples.training.checkpoints import STATE, read_state
from ivon import IVON

OPTIONS = (
    "--optimizer ivon --learning_rate 1.0 --num_train_epochs 2 --max_length 40 --no_cache "
    "--max_grad_norm 0"
).split()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    tiny_bert(folder / "bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    pair_task(folder / "mrpc", {"train": 40, "validation": 21})
    return folder


def words(home: Path, out: Path, *more: str) -> list[str]:
    where = ["--model_name_or_path", str(home / "bert"), "--data_dir", str(home)]
    dtype = [] if "full" in more else ["--base_dtype", "float32"]
    return ["--task_name", "mrpc", *where, *OPTIONS, *dtype, "--output_dir", str(out), *more]


def run(home: Path, out: Path, *more: str) -> Path:
    assert program.run_main(main, words(home, out, *more)) == 0
    return out


def fails(home: Path, out: Path, capsys, *more: str) -> str:
    assert program.run_main(main, words(home, out, *more)) == 2
    return capsys.readouterr().err


@pytest.fixture(scope="module")
def trained(home, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "run"
    more = "--ivon_infer_mc_samples 3 --save_steps 2 --save_total_limit 0 --eval_steps 3".split()
    return run(home, out, *more)


# --- prediction ----------------------------------------------------------------------------------


def test_probabilities_are_averaged_not_logits():
    torch.manual_seed(0)
    logits, labels = torch.randn(4, 7, 3) * 3, torch.randint(3, (7,))
    outputs = [SimpleNamespace(logits=one, loss=torch.tensor(0.0)) for one in logits]
    found = average(outputs, {"labels": labels})
    wanted = logits.softmax(-1).mean(0)
    torch.testing.assert_close(found.logits.exp(), wanted)
    torch.testing.assert_close(found.loss, -wanted[torch.arange(7), labels].log().mean())
    assert average([SimpleNamespace(logits=logits[0], loss=None)], {}).loss is None


def test_a_regression_is_the_mean_of_its_outputs():
    torch.manual_seed(0)
    logits, labels = torch.randn(4, 7, 1), torch.rand(7)
    outputs = [SimpleNamespace(logits=one, loss=torch.tensor(0.0)) for one in logits]
    found = average(outputs, {"labels": labels})
    torch.testing.assert_close(found.logits, logits.mean(0))
    torch.testing.assert_close(found.loss, (logits.mean(0)[:, 0] - labels).square().mean())


def test_draws_are_those_of_the_posterior_and_repeat():
    layer = torch.nn.Linear(300, 2, bias=False)
    optimizer = IVON([layer.weight], lr=0.1, ess=50.0, hess_init=0.5, weight_decay=0.1)
    before = layer.weight.detach().clone()
    drawn = []

    class Looks:
        def variants(self, final):
            return ["", "other"]

        def outputs(self, model, arguments, variants):
            drawn.append(model.weight.detach() - before)
            return [SimpleNamespace(logits=arguments["x"] @ model.weight.T, loss=None)] * len(
                variants
            )

    predictor = PosteriorPredictor(optimizer, samples=4, seed=7, inner=Looks())
    assert predictor.variants(False) == ["", "other"]
    state = torch.get_rng_state()
    arguments = {"x": torch.randn(5, 300)}
    state = torch.get_rng_state()
    outputs = predictor.outputs(layer, arguments, predictor.variants(True))
    assert torch.equal(torch.get_rng_state(), state)  # training's draws are undisturbed
    assert torch.equal(layer.weight, before) and len(outputs) == 3 and len(drawn) == 5
    assert torch.equal(outputs[2].logits, arguments["x"] @ before.T) and not drawn[4].any()
    predictor.outputs(layer, arguments, [""])
    for first, again in zip(drawn[:4], drawn[5:], strict=True):
        assert torch.equal(first, again)
    assert not torch.equal(drawn[0], drawn[1])
    deviation = torch.stack(drawn[:4]).std()
    assert deviation == pytest.approx((50 * 0.6) ** -0.5, rel=0.06)  # 2,400 draws


def test_a_run_reports_both_predictions(trained):
    found = results(trained)
    assert {"eval_f1", "eval_nll", "eval_ece", "eval_entropy", "eval_mean_f1"} <= found.keys()
    assert found["eval_loss"] == pytest.approx(found["eval_nll"], abs=1e-6)
    assert found["eval_mean_nll"] != found["eval_nll"]
    assert "eval_mean_f1" not in lines(trained / "metrics.jsonl")[0]  # at the end alone


def test_the_result_gives_its_metrics_again_in_any_batches(home, trained):
    start = ["--lora_path", str(trained), "--ivon_infer_mc_samples", "3"]
    wanted = {k: v for k, v in results(trained).items() if k.startswith("eval_")}
    for rows in ("64", "5"):
        found = evaluated(words(home, home, *start, "--per_device_eval_batch_size", rows))
        assert found == pytest.approx(wanted, abs=1e-5)
    other = evaluated(words(home, home, *start, "--seed", "1"))
    assert other["eval_loss"] != wanted["eval_loss"]


def test_evaluations_do_not_change_training(home, trained, tmp_path):
    plain = run(home, tmp_path / "run", "--load_best_model_at_end", "false", "--calibration")
    last = trained / "checkpoint-10" / STATE
    weights = read_state(last)["weights"]
    ours = load_file(plain / "adapter" / "adapter_model.safetensors")
    for name, tensor in ours.items():
        name = name.replace(".weight", ".default.weight") if ".lora_" in name else name
        if ".lora_" in name:
            assert torch.equal(weights[name], tensor), name
    found = results(plain)
    assert "eval_nll" in found and "eval_mean_nll" not in found


# --- the file ------------------------------------------------------------------------------------


def test_h_has_the_names_and_shapes_of_the_adapter(trained):
    adapter = load_file(trained / "adapter" / "adapter_model.safetensors")
    hess = load_file(trained / "adapter" / HESSIAN)
    assert {n: t.shape for n, t in adapter.items()} == {n: t.shape for n, t in hess.items()}
    with safe_open(trained / "adapter" / HESSIAN, "pt") as file:
        [group] = json.loads(file.metadata()["ivon_posterior"])
    assert (group["ess"], group["weight_decay"]) == (40, 1e-8)  # all training rows
    for tensor in hess.values():
        assert torch.isfinite(tensor).all() and 0.99 < tensor.min() and tensor.max() < 1.01
        assert (tensor != 1).any()


@pytest.mark.parametrize("saving", ["epoch", "no"])
def test_h_is_that_of_the_best_weights(home, tmp_path, saving):
    """Nothing learns at such a rate, so the first evaluation stays the best; h moves on."""
    more = ["--learning_rate", "1e-12", "--ivon_beta2", "0.9", "--save_strategy", saving]
    short = run(home, tmp_path / "short", *more, "--eval_steps", "5")
    assert results(short)["best_step"] == 5 and results(short)["steps"] == 10
    whole = run(home, tmp_path / "whole", *more, "--load_best_model_at_end", "false")
    best, last = (load_file(path / "adapter" / HESSIAN) for path in (short, whole))
    assert any(not torch.equal(best[name], last[name]) for name in best)
    if saving == "epoch":
        state = read_state(short / "checkpoint-5" / STATE)["optimizer"]["state"]
        held = torch.cat([entry["hess"].flatten() for _, entry in sorted(state.items())])
        saved = torch.cat([tensor.flatten() for tensor in best.values()])
        assert torch.equal(held.sort().values, saved.sort().values)


def test_a_run_goes_on_with_a_saved_posterior(home, trained, tmp_path, capsys):
    start = ["--lora_path", str(trained), "--max_train_steps", "1", "--ivon_beta2", "1.0"]
    again = run(home, tmp_path / "again", *start, "--learning_rate", "0")
    assert "weights taken over" in capsys.readouterr().out
    first, second = (load_file(p / "adapter" / HESSIAN) for p in (trained, again))
    for name in first:  # a step with beta2 = 1 leaves h
        torch.testing.assert_close(first[name], second[name], rtol=1e-6, atol=0)
    said = fails(home, tmp_path / "none", capsys, *start, "--ivon_ess", "50")
    assert "ess=40" in said and "--ivon_ess" in said and HESSIAN in said


def test_an_adapter_without_h_starts_at_hess_init(home, trained, tmp_path, capsys):
    shutil.copytree(trained / "adapter", tmp_path / "bare")
    (tmp_path / "bare" / HESSIAN).unlink()
    start = ["--lora_path", str(tmp_path / "bare")]
    run(home, tmp_path / "run", *start, "--max_train_steps", "1")
    assert "h starts at --ivon_hess_init" in capsys.readouterr().out
    said = fails(
        home, tmp_path / "x", capsys, *start, "--eval_only", "--ivon_infer_mc_samples", "2"
    )
    assert "--ivon_ess must say how wide the posterior is" in said
    start += ["--ivon_infer_mc_samples", "2"]
    assert evaluated(words(home, home, *start, "--ivon_ess", "40"))


def test_full_fine_tuning_has_a_posterior_too(home, tmp_path, capsys):
    out = run(home, tmp_path / "run", "--method", "full", "--ivon_infer_mc_samples", "2")
    model, hess = load_file(out / "model" / "model.safetensors"), load_file(out / "model" / HESSIAN)
    assert {n: t.shape for n, t in model.items()} == {n: t.shape for n, t in hess.items()}
    again = ["--method", "full", "--ivon_infer_mc_samples", "2"]
    again += ["--model_name_or_path", str(out / "model")]
    found = evaluated(words(home, home, *again))
    wanted = {k: v for k, v in results(out).items() if k.startswith("eval_")}
    assert found == pytest.approx(wanted, abs=1e-5)


# --- the loop ------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", ["1", "2"])
def test_a_resumed_run_is_the_whole_one(home, tmp_path, samples):
    more = ["--ivon_train_mc_samples", samples, "--save_steps", "2", "--save_total_limit", "0"]
    whole = run(home, tmp_path / "whole", *more)
    shutil.copytree(whole, tmp_path / "cut")
    for path in (tmp_path / "cut").glob("checkpoint-*"):
        if int(path.name.split("-")[1]) > 4:
            shutil.rmtree(path)
    shutil.rmtree(tmp_path / "cut" / "adapter")
    (tmp_path / "cut" / "all_results.json").unlink()
    again = run(home, tmp_path / "cut", *more, "--resume_from_checkpoint", "auto")
    for name in ("adapter_model.safetensors", HESSIAN):
        assert (whole / "adapter" / name).read_bytes() == (again / "adapter" / name).read_bytes()


def test_two_processes_equal_one(home, tmp_path):
    small = ["--per_device_train_batch_size", "4", "--lora_alpha", "16"]
    launch_two(["-m", "examples.run_glue"], *words(home, tmp_path / "two", *small))
    run(home, tmp_path / "one", "--per_device_train_batch_size", "8", "--lora_alpha", "16")
    for name in ("adapter_model.safetensors", HESSIAN):
        one, two = (load_file(tmp_path / n / "adapter" / name) for n in ("one", "two"))
        for key in one:
            torch.testing.assert_close(one[key], two[key], atol=2e-6, rtol=1e-4)


# --- options -------------------------------------------------------------------------------------


def parsed(*more: str) -> program.Options:
    base = ["--task_name", "mrpc", "--model_name_or_path", "m", "--output_dir", "o"]
    return program.parse([*base, *more], "examples.run_glue", SUMMARY, OPTION_CLASSES, "task_name")


def test_the_originals_names():
    options = parsed(*"--apply_lora --lora_type vilora --use_ivon --criterion SNR".split())
    assert (options.method.name, options.optimizer.name) == ("vilora", "ivon")
    assert options.method_options.vilora_criterion == "SNR"
    assert parsed("--method", "full", "--use_ivon").optimizer.name == "ivon"
    assert parsed("--method", "lora").optimizer.name == "adamw"
    assert parsed("--method", "vilora").optimizer.name == "ivon"
    options = parsed("--method", "vilora")
    assert parsed("--method", "vilora", "--optimizer", "ivon").resolved() == options.resolved()
    values = options.optimizer_options
    assert (values.ivon_ess, values.ivon_weight_decay, values.ivon_clip_radius) == (0, 1e-8, 1e-3)
    with pytest.raises(
        program.OptionError, match="--method vilora ranks by .* use --optimizer ivon"
    ):
        parsed("--method", "vilora", "--optimizer", "adamw")
    with pytest.raises(program.OptionError, match="--ivon_ess is an option of optimizer ivon"):
        parsed("--method", "full", "--ivon_ess", "3")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--weight_decay", "0.1"], "is --ivon_weight_decay"),
        (["--ivon_hess_init", "0"], "hess_init=0.0: must be a number, above 0"),
        (["--mixed_precision", "fp16"], "fp16"),
    ],
)
def test_mistakes_are_said(home, tmp_path, capsys, more, message):
    assert message in fails(home, tmp_path / "run", capsys, *more)
