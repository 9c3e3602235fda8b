"""AdaLoRA and ViLoRA in whole runs: ranks, files, pictures, starting from an adapter, resuming."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.runner_cases import evaluated, lines, pair_task, results, tiny_bert, tiny_deberta

from examples import program
from examples.run_glue import OPTION_CLASSES, SUMMARY, main
from peft_custom import CRITERIA

# 14 steps: ranks fall from 3 to 2 between steps 2 and 9
SCHEDULE = (
    "--adalora_init_r 3 --adalora_target_r 2 --adalora_tinit 2 --adalora_tfinal 5 "
    "--adalora_delta_t 2 --lora_alpha 6 --adalora_orth_reg_weight 0.1"
).split()
MODULES = 2 * 6  # layers × linear maps
PICTURES = {"ranks.png", "rank_trajectories.png", "posterior.png"}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    tiny_bert(folder / "bert")
    pair_task(folder / "mrpc", {"train": 56, "validation": 21})
    return folder


def words(home: Path, out: Path, *more: str) -> list[str]:
    where = ["--model_name_or_path", str(home / "bert"), "--data_dir", str(home)]
    base = "--task_name mrpc --max_length 40 --no_cache --base_dtype float32".split()
    base += "--num_train_epochs 2 --lora_modules query,key,value,dense --max_grad_norm 0".split()
    rate = ["--learning_rate", "5e-3" if "adamw" in more else "2.0"]
    return [*base, *where, *rate, *SCHEDULE, "--output_dir", str(out), *more]


def run(home: Path, out: Path, *more: str) -> Path:
    assert program.run_main(main, words(home, out, *more)) == 0
    return out


def config(folder: Path) -> dict:
    return json.loads((folder / "adapter" / "adapter_config.json").read_text())


def ranks(folder: Path) -> list[int]:
    return [sum(kept) for kept in config(folder)["rank_pattern"].values()]


KINDS = {
    "adalora": ["--method", "adalora", "--optimizer", "adamw"],
    "adalora_ivon": ["--method", "adalora", "--optimizer", "ivon"],
    "vilora": ["--method", "vilora", "--ivon_infer_mc_samples", "2"],
}


@pytest.fixture(scope="module")
def trained(home, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained")
    more = ["--save_steps", "3", "--save_total_limit", "0", "--plots", "--eval_steps", "2"]
    return {kind: run(home, out / kind, *own, *more) for kind, own in KINDS.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_the_budget_is_spent_and_files_are_cut(trained, kind):
    folder = trained[kind]
    assert len(ranks(folder)) == MODULES and sum(ranks(folder)) == 2 * MODULES
    assert config(folder)["peft_type"] == ("VILORA" if kind == "vilora" else "ADALORA")
    adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert sum(len(t) for name, t in adapter.items() if name.endswith("lora_E")) == 2 * MODULES
    if kind != "adalora":
        hess = load_file(folder / "adapter" / "ivon_hessian.safetensors")
        assert {n: t.shape for n, t in adapter.items()} == {n: t.shape for n, t in hess.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_only_final_ranks_are_candidates(trained, kind):
    """Ranks are final after step 9 (0-based), the tenth; `budget` is what the schedule says."""
    found, rows = results(trained[kind]), lines(trained[kind] / "metrics.jsonl")
    assert found["best_step"] >= 10
    assert [row["budget"] for row in rows if row["step"] in (2, 14)] == [36, 24]
    after = [row["eval_f1"] for row in rows if row["step"] >= 10]
    assert found["eval_f1"] == pytest.approx(max(after))
    assert rows[-1]["orthogonality"] > 0


@pytest.mark.parametrize("kind", KINDS)
def test_the_saved_adapter_gives_the_reported_metrics(home, trained, kind):
    """The loaded layers are really smaller; the posterior is that of what is left."""
    start = ["--lora_path", str(trained[kind])]
    found = evaluated(words(home, home / "unused", *KINDS[kind], *start))
    # fewer weights are other draws, so an average over draws is not the same to the last digit
    prefix = "eval_mean_" if kind == "vilora" else "eval_"
    wanted = {k: v for k, v in results(trained[kind]).items() if k.startswith(prefix)}
    assert wanted and {k: found[k] for k in wanted} == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("kind", ["lora", "adalora", "vilora"])
def test_a_pooler_that_no_checkpoint_has_is_trained_and_saved(home, tmp_path, kind):
    """DeBERTa's: adapted instead, it would stay random, and nobody would know it again."""
    tiny_deberta(tmp_path / "deberta")
    more = ["--model_name_or_path", str(tmp_path / "deberta"), "--packing"]
    more += ["--lora_modules", "query_proj,key_proj,value_proj,dense"]
    base = words(home, tmp_path / "run", *KINDS.get(kind, ["--method", "lora"]), *more)
    if kind == "lora":
        start = base.index(SCHEDULE[0])
        del base[start : start + len(SCHEDULE)]
    assert program.run_main(main, base) == 0
    adapter = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    inside = [name for name in adapter if "pooler" in name]
    assert [name.rpartition(".")[2] for name in inside] == ["bias", "weight"]
    adapted = [name for name in adapter if name.removesuffix(".weight").endswith(".lora_A")]
    assert len(adapted) == MODULES
    found = evaluated([*base, "--lora_path", str(tmp_path / "run")])
    prefix = "eval_mean_" if kind == "vilora" else "eval_"
    wanted = {k: v for k, v in results(tmp_path / "run").items() if k.startswith(prefix)}
    assert wanted and {k: found[k] for k in wanted} == pytest.approx(wanted, abs=1e-5)


def test_pictures_are_drawn_when_asked_for(home, trained, tmp_path, capsys):
    wanted = {"adalora": PICTURES - {"posterior.png"}, "vilora": PICTURES}
    for kind, names in wanted.items():
        assert {path.name for path in trained[kind].glob("*.png")} == {"learning_curve.png"}
        assert {path.name for path in (trained[kind] / "plots").iterdir()} == names
        for name in names:
            assert (trained[kind] / "plots" / name).read_bytes()[:4] == b"\x89PNG"
    out = run(home, tmp_path / "run", *KINDS["vilora"], "--max_train_steps", "8")
    assert {path.name for path in out.glob("*.png")} == {"learning_curve.png"}
    assert not (out / "plots").exists()
    capsys.readouterr()
    run(home, tmp_path / "run", "--overwrite_output_dir", "--plots", *KINDS["vilora"])
    assert "pictures" in capsys.readouterr().out


def test_fractions_are_steps(home, trained, tmp_path):
    """2/14 and 5/14 of the run, and the names of the AdaLoRA authors' scripts."""
    more = ["--init_warmup", "0.15", "--final_warmup", "0.35", "--mask_interval", "2"]
    more += ["--save_strategy", "no", "--eval_steps", "2"]
    out = tmp_path / "run"
    given = words(home, out, *KINDS["adalora"], *more)
    at = given.index("--adalora_tfinal")  # the same option as --final_warmup: one of them
    assert program.run_main(main, given[:at] + given[at + 2 :]) == 0
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (out / "adapter" / name).read_bytes() == (
            trained["adalora"] / "adapter" / name
        ).read_bytes()


@pytest.mark.parametrize("criterion", sorted(CRITERIA))
def test_every_criterion_is_an_option(home, tmp_path, criterion):
    more = ["--vilora_criterion", criterion, "--max_train_steps", "8", "--save_strategy", "no"]
    out = run(home, tmp_path / "run", *KINDS["vilora"], *more)
    assert sum(ranks(out)) == 2 * MODULES
    assert config(out)["criterion"] == criterion


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_resumed_in_the_schedule_is_the_whole_one(home, trained, tmp_path, kind):
    shutil.copytree(trained[kind], tmp_path / "cut")
    for path in (tmp_path / "cut").glob("checkpoint-*"):
        if int(path.name.split("-")[1]) > 6:
            shutil.rmtree(path)
    shutil.rmtree(tmp_path / "cut" / "adapter")
    (tmp_path / "cut" / "all_results.json").unlink()
    more = ["--save_steps", "3", "--save_total_limit", "0", "--eval_steps", "2"]
    again = run(home, tmp_path / "cut", *KINDS[kind], *more, "--resume_from_checkpoint", "auto")
    files = sorted(path.name for path in (trained[kind] / "adapter").iterdir())
    for name in files:
        ours = (again / "adapter" / name).read_bytes()
        assert ours == (trained[kind] / "adapter" / name).read_bytes(), name


def test_a_saved_adapter_is_trained_on_within_its_ranks(home, trained, tmp_path):
    start = ["--lora_path", str(trained["vilora"])]
    again = run(home, tmp_path / "again", *KINDS["vilora"], *start)
    assert ranks(again) == ranks(trained["vilora"])  # there is nothing above the target to cut
    first = load_file(trained["vilora"] / "adapter" / "adapter_model.safetensors")
    second = load_file(again / "adapter" / "adapter_model.safetensors")
    assert first.keys() == second.keys()
    assert any(not torch.equal(first[name], second[name]) for name in first)
    fewer = run(home, tmp_path / "fewer", *KINDS["vilora"], *start, "--adalora_target_r", "1")
    assert sum(ranks(fewer)) == MODULES
    for more, less in zip(ranks(again), ranks(fewer), strict=True):
        assert less <= more


def test_mistakes_are_said(home, trained, tmp_path, capsys):
    def said(*more: str) -> str:
        assert program.run_main(main, words(home, tmp_path / "run", *more)) == 2
        return capsys.readouterr().err

    assert "ranks are only cut" in said(*KINDS["adalora"], "--adalora_target_r", "4")
    assert "criterion='SMR': use one of" in said(*KINDS["vilora"], "--vilora_criterion", "SMR")
    assert "leave none of" in said(
        *KINDS["adalora"], "--adalora_tinit", "0.6", "--adalora_tfinal", "8"
    )
    start = ["--lora_path", str(trained["adalora"])]
    assert "give --adalora_init_r 3" in said(*KINDS["adalora"], *start, "--adalora_init_r", "4")
    assert "give --lora_alpha 6" in said(*KINDS["adalora"], *start, "--lora_alpha", "7")
    assert "no adapter" in said(*KINDS["adalora"], "--lora_path", str(tmp_path))


def parsed(*more: str) -> program.Options:
    base = ["--task_name", "mrpc", "--model_name_or_path", "m", "--output_dir", "o"]
    return program.parse([*base, *more], "examples.run_glue", SUMMARY, OPTION_CLASSES, "task_name")


def test_options_have_the_originals_names_and_defaults():
    options = parsed("--method", "vilora").method_options
    assert (options.adalora_target_r, options.adalora_init_r) == (8, 12)
    assert (options.adalora_tinit, options.adalora_tfinal, options.adalora_delta_t) == (0, 0, 100)
    assert (options.adalora_orth_reg_weight, options.lora_alpha, options.lora_dropout) == (
        0.5,
        8,
        0,
    )
    assert options.vilora_criterion == "SNR_mean_abs"
    given = parsed(*"--method adalora --adalora_tinit 0.1 --adalora_tfinal 200".split())
    assert (given.method_options.adalora_tinit, given.method_options.adalora_tfinal) == (0.1, 200)
    with pytest.raises(
        program.OptionError, match="--vilora_criterion is an option of method vilora"
    ):
        parsed("--method", "adalora", "--vilora_criterion", "SNR")
