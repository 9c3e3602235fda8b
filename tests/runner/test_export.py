"""`examples.export` on whole runs: budgets, energies, ranks, merged models, the curve."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.choice_cases import choice_task
from support.fake_hub import TOKEN, FakeHub
from support.paths import ROOT
from support.runner_cases import evaluated, pair_task, results, tiny_bert

from examples import export, program, run_multiple_choice
from examples.run_glue import main

FAST = "--task_name mrpc --max_length 40 --no_cache --disable_tqdm".split()
TRAIN = "--base_dtype float32 --learning_rate 2e-2 --max_train_steps 4 --lora_r 3".split()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    tiny_bert(folder / "bert", initializer_range=0.2)
    pair_task(folder / "mrpc", {"train": 24, "validation": 11})
    for wiring in ("peft_custom", "loralib"):
        run = words(folder, "bert", folder / wiring, *TRAIN, "--wiring", wiring)
        assert program.run_main(main, run) == 0
    return folder


def words(home: Path, model: str, out: Path, *more: str) -> list[str]:
    where = ["--model_name_or_path", str(home / model), "--data_dir", str(home)]
    return [*FAST, *where, "--output_dir", str(out), *more]


@pytest.mark.parametrize("wiring", ["peft_custom", "loralib"])
def test_uncut_it_is_the_run(home: Path, tmp_path: Path, wiring: str) -> None:
    """4 matrices of rank 3; as an adapter, and merged into the model."""
    for name, cut in (("adapter", ["--energy", "1"]), ("merged", ["--rank", "3", "--merged"])):
        assert export.main([str(home / wiring), *cut, "--out", str(tmp_path / name)]) == 0
    values = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (values["peft_type"], values["r"], values["lora_alpha"]) == ("LORA", 3, 3)
    expected = results(home / wiring)["eval_loss"]
    own = ["--lora_path", str(tmp_path / "adapter"), "--lora_r", "3", "--lora_alpha", "3"]
    found = evaluated(words(home, "bert", tmp_path / "no", *own))
    assert found["eval_loss"] == pytest.approx(expected, abs=1e-6)
    model = ["--task_name", "mrpc", "--data_dir", str(home), "--method", "full", *FAST[2:]]
    model += ["--model_name_or_path", str(tmp_path / "merged"), "--output_dir", str(tmp_path / "n")]
    assert evaluated(model)["eval_loss"] == pytest.approx(expected, abs=1e-6)


def test_a_budget_and_its_curve(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = home / "peft_custom"
    for name, more in (("adapter", []), ("cut", ["--merged"])):
        cut = [str(run), "--rank_budget", "7", *more, "--out", str(tmp_path / name)]
        assert export.main(cut) == 0
        assert "7 of 12 singular values in 4 matrices" in capsys.readouterr().out
    r = str(json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"])
    own = ["--lora_path", str(tmp_path / "adapter"), "--lora_r", r, "--lora_alpha", r]
    as_adapter = evaluated(words(home, "bert", tmp_path / "no", *own))
    model = ["--task_name", "mrpc", "--data_dir", str(home), "--method", "full", *FAST[2:]]
    model += ["--model_name_or_path", str(tmp_path / "cut"), "--output_dir", str(tmp_path / "n")]
    assert evaluated(model)["eval_loss"] == pytest.approx(as_adapter["eval_loss"], abs=1e-5)
    loss = ["--curve", "--out", str(tmp_path / "curve")]
    assert export.main([str(run), *loss]) == 0
    curve = json.loads((tmp_path / "curve" / "budget_curve.json").read_text())
    assert curve["budgets"] == [4, 8, 12] and curve["mean_ranks"] == [1, 2, 3]
    assert curve["uniform"]["parameters"] == [4 * 64, 8 * 64, 12 * 64]
    assert curve["global"]["values"][2] == curve["uniform"]["values"][2]
    eight = [str(run), "--rank_budget", "8", "--merged", "--out", str(tmp_path / "eight")]
    assert export.main(eight) == 0
    model[model.index(str(tmp_path / "cut"))] = str(tmp_path / "eight")
    assert evaluated(model)[curve["metric"]] == pytest.approx(curve["global"]["values"][1])
    assert (tmp_path / "curve" / "budget_curve.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("cut", "said"),
    [
        (["--rank_budget", "13"], "give 1 to 12"),
        (["--energy", "2"], "above 0 to 1"),
        (["--rank", "4"], "ranks 1 to 3"),
        (["--curve", "--merged"], "leave --merged out"),
        ([], "say what to write"),
        (["--merged", "--to", "compact"], "give one of them"),
        (["--rank", "2", "--to", "compact"], "takes no heads or units out"),
        (["--to", "compact"], "lora takes no heads or units out"),
    ],
)
def test_mistakes(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], cut: list[str], said: str
) -> None:
    out = tmp_path / "new"
    asked = [str(home / "peft_custom"), *cut, "--out", str(out)]
    assert program.run_main(export.main, asked) == 2
    assert said in capsys.readouterr().err and not out.exists()


def trained(home: Path, out: Path, *more: str) -> Path:
    run = words(home, "bert", out, "--base_dtype", "float32", "--learning_rate", "2e-2")
    assert program.run_main(main, [*run, "--max_train_steps", "4", *more]) == 0
    return out


def as_model(home: Path, model: Path, out: Path) -> float:
    """The loss of a whole model in a run of its own."""
    own = ["--task_name", "mrpc", "--data_dir", str(home), "--method", "full", *FAST[2:]]
    own += ["--model_name_or_path", str(model), "--output_dir", str(out)]
    return evaluated(own)["eval_loss"]


def test_whole_models_have_the_losses_of_their_runs(home: Path, tmp_path: Path) -> None:
    """Merged, of block masks and increments; compact, of linked masks; a copy, of full training."""
    prune = ["--method", "splora", "--mask_structure", "linked", "--final_threshold", "0.5"]
    small = ["--mask_block_rows", "8", "--mask_block_cols", "16"]
    kinds = {
        "merged": ["--method", "bim_lora", "--block_size", "4"],
        "compact": [*prune, *small],
        "hf": ["--method", "full"],
    }
    for to, more in kinds.items():
        run = trained(home, tmp_path / f"run-{to}", *more)
        out = tmp_path / to
        assert export.main([str(run), "--to", to, "--out", str(out)]) == 0
        found = as_model(home, out, tmp_path / "no")
        assert found == pytest.approx(results(run)["eval_loss"], abs=1e-5), to
    shapes = json.loads((tmp_path / "compact" / "config.json").read_text())["layer_shapes"]
    assert any(units < 48 for _, units in shapes)  # of the base's 48


@pytest.mark.parametrize("told", [True, False])
def test_a_run_says_which_program_made_it(home: Path, tmp_path: Path, told: bool) -> None:
    """Questions of one's own; a run of ARC from before runs said it, which resumes too."""
    data = choice_task(tmp_path / "arc_easy", {"train": 12, "validation": 6})
    run = tmp_path / "run"
    task = ["--task_name", "arc_easy", "--data_dir", str(tmp_path)]
    if told:
        task = [w for s in ("train", "validation") for w in (f"--{s}_file", f"{data / s}.jsonl")]
    own = [*task, *FAST[2:], "--model_name_or_path", str(home / "bert"), *TRAIN]
    own += ["--save_steps", "2", "--output_dir", str(run)]
    assert program.run_main(run_multiple_choice.main, own) == 0
    env = json.loads((run / "env.json").read_text())
    assert env.pop("program") == "run_multiple_choice"
    if not told:
        (run / "env.json").write_text(json.dumps(env))
    assert export.main([str(run), "--to", "merged", "--out", str(tmp_path / "out")]) == 0
    made = json.loads((tmp_path / "out" / "config.json").read_text())
    assert made["architectures"] == ["BertForMultipleChoice"]
    again = [*own, "--resume_from_checkpoint", "auto"]
    assert program.run_main(run_multiple_choice.main, again) == 0


def test_an_adapter_uncut_for_peft(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "adapter"
    assert export.main([str(home / "peft_custom"), "--to", "peft", "--out", str(out)]) == 0
    values = json.loads((out / "adapter_config.json").read_text())
    assert (values["peft_type"], values["r"]) == ("LORA", 3)


def test_a_run_writes_its_card(home: Path) -> None:
    text = (home / "peft_custom" / "adapter" / "README.md").read_text("utf-8")
    loss = results(home / "peft_custom")["eval_loss"]
    for words_ in ("# bert on mrpc, lora", "- Seed: 0", f"| loss | {loss:.4f} |", "- Licence: not"):
        assert words_ in text
    assert str(home) not in text  # no path of this machine


def test_an_adapter_goes_to_the_hub(home: Path, tmp_path: Path) -> None:
    """In processes of their own: the hub's client reads its address when it is imported."""
    with FakeHub({}).running() as hub:
        outside = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0"}
        for token, said in (("", "log in with"), ("hf_other", "the hub refused"), (TOKEN, "")):
            out = tmp_path / f"out{token}"
            ask = [sys.executable, "-m", "examples.export", str(home / "peft_custom"), "--to"]
            ask += ["peft", "--out", str(out), "--push_to_hub", "me/adapter"]
            done = subprocess.run(
                ask, cwd=ROOT, capture_output=True, text=True,
                env={**os.environ, **outside, "HF_TOKEN": token},
            )  # fmt: skip
            assert done.returncode == (2 if said else 0) and said in done.stderr, done.stderr
            assert out.exists() == (token != "")  # without a token no work is done
    assert f"uploaded: {hub.url}/me/adapter" in done.stdout
    there = {path.name: path.read_bytes() for path in out.iterdir()}
    got = hub.repos["models/me/adapter"]
    assert {name: got[name] for name in there} == there and "adapter_model.safetensors" in there
