"""The area under the metric over the rank, and starts of nested adapters of another mode."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.runner_cases import pair_task, results, tiny_bert

from examples import program
from examples.methods.dylora_ranks import areas
from examples.run_glue import main

FAST = (
    "--task_name mrpc --base_dtype float32 --learning_rate 2e-2 --max_train_steps 2 --lora_r 3 "
    "--max_length 40 --no_cache --disable_tqdm"
).split()


def test_areas() -> None:
    assert areas([1, 2, 4], [0.0, 1.0, 1.0]) == pytest.approx(
        {"aurac_linear": 2.5 / 3, "aurac_log2": 0.75}
    )
    assert areas([8], [0.7]) == {"aurac_linear": 0.7, "aurac_log2": 0.7}
    constant = areas([1, 3, 7, 8], [0.25] * 4)
    assert constant == pytest.approx({"aurac_linear": 0.25, "aurac_log2": 0.25})


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    tiny_bert(folder / "bert")
    pair_task(folder / "mrpc", {"train": 12, "validation": 9})
    return folder


def words(home: Path, out: Path, *more: str) -> list[str]:
    where = ["--model_name_or_path", str(home / "bert"), "--data_dir", str(home)]
    return [*FAST, *where, "--output_dir", str(out), *more]


def test_a_run_reports_its_areas(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    nested = ["--method", "dylora", "--dylora_mode", "matryoshka"]
    assert program.run_main(main, words(home, run, *nested)) == 0
    assert "aurac linear" in capsys.readouterr().out
    found, curve = results(run), json.loads((run / "rank_curve.json").read_text())
    metric = curve["metric"].removeprefix("eval_")
    values = [found[f"eval_r{b}_{metric}"] for b in (1, 2, 3)]
    for name, value in areas([1, 2, 3], values).items():
        assert found[name] == curve[name] == pytest.approx(value)
    # such an adapter goes on in its own mode alone
    for method in (["--method", "lora"], ["--method", "dylora"]):
        other = words(home, tmp_path / "other", *method, "--lora_path", str(run))
        assert program.run_main(main, other) == 2
        assert "goes on with that mode" in capsys.readouterr().err
    same = words(home, tmp_path / "more", *nested, "--lora_path", str(run))
    assert program.run_main(main, same) == 0
