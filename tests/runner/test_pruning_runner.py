"""The pruning methods on the command line: the originals' words, figures, a picture, restarts."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from support.runner_cases import evaluated, lines, pair_task, results, tiny_bert

from examples import program, pruning_curve
from examples.program.encoder_time import compact_model, dense_model, milliseconds
from examples.run_glue import OPTION_CLASSES, SUMMARY, main


def parsed(*words: str) -> program.Options:
    needed = ["--task_name", "mrpc", "--model_name_or_path", "m", "--output_dir", "o"]
    options = program.parse([*needed, *words], "run_glue", SUMMARY, OPTION_CLASSES, "task_name")
    assert options is not None
    return options


def test_a_name_of_two_originals_means_the_chosen_methods_option() -> None:
    pruned = parsed("--method", "splopa", "--final_warmup", "3").method_options
    assert pruned.final_warmup == 3.0
    ranks = parsed("--method", "adalora", "--final_warmup", "0.3").method_options
    assert ranks.adalora_tfinal == 0.3
    with pytest.raises(program.OptionError, match="are the same"):
        parsed("--method", "adalora", "--final_warmup", "0.3", "--adalora_tfinal", "0.2")
    with pytest.raises(program.OptionError, match="option of method"):
        parsed("--method", "bim_lora", "--final_warmup", "0.3")


def test_the_originals_words() -> None:
    words = (
        "--initial_threshold 0 --final_threshold 0.1 --initial_warmup 1 --final_warmup 2 "
        "--pruning_method sigmoied_threshold --mask_init constant --mask_scale 0. "
        "--regularization l1 --final_lambda 50 --mask_scores_learning_rate 1e-2 "
        "--adapter_learning_rate 1e-3 --mask_block_rows 32 --mask_block_cols 32 "
        "--num_splopa_prototypes 64 --splopa_prototype_rank 2 --splopa_prototypes_not_shared "
        "--splopa_init_range 1e-4"
    )
    options = parsed("--method", "splopa", *words.split()).method_options
    assert options.splopa_prototypes_not_shared and options.final_lambda == 50
    null = parsed("--method", "splopa", "--regularization", "null").method_options
    assert null.regularization is None


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("identifier", "does nothing"), ("global_topk_frequency_compute", "every step"),
        ("ampere_pruning_method", "2:4"), ("final_ampere_temperature", "2:4"),
        ("shuffling_method", "not shuffled"), ("in_shuffling_group", "not shuffled"),
        ("do_lower_case", "tokenizer"),
    ],
)  # fmt: skip
def test_words_of_the_originals_without_a_meaning_say_why(name: str, reason: str) -> None:
    with pytest.raises(program.OptionError, match=f"--{name} has no meaning here: .*{reason}"):
        parsed("--method", "splopa", f"--{name}", "1")


def test_the_trainer_clips_the_regulariser_where_it_is_asked_for(
    setting: list[str], tmp_path: Path
) -> None:
    """A λ so large that its clipped gradient leaves the other weights hardly any step."""
    words = [*setting, "--method", "block_prune", "--pruning_method", "sigmoied_threshold"]
    words += ["--final_threshold", "0.1", "--initial_threshold", "0.1", "--regularization", "l1"]
    words += [
        "--final_lambda",
        "1e6",
        "--max_train_steps",
        "4",
        "--pruning_warmup",
        "1",
        "--mask_scores_learning_rate",
        "0",
    ]
    words += ["--learning_rate", "1e-3", "--adam_epsilon", "1e-2"]  # a step of the gradient's size
    moved = []
    for i, more in enumerate(([], ["--clip_regularization"])):
        out = tmp_path / str(i)
        assert program.run_main(main, [*words, *more, "--output_dir", str(out)]) == 0
        weights = load_file(out / "adapter" / "adapter_model.safetensors")
        [head] = [t for name, t in weights.items() if name.endswith("classifier.bias")]
        moved.append(float(head.abs().max()))
    assert 0 < moved[1] < 0.1 * moved[0]


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("pruning")
    model = tiny_bert(folder / "model")
    pair_task(folder / "data" / "mrpc", {"train": 32, "validation": 16})
    return [
        "--model_name_or_path", str(model), "--data_dir", str(folder / "data"), "--task_name",
        "mrpc", "--per_device_train_batch_size", "8", "--num_train_epochs", "2", "--disable_tqdm",
        "--no_cache", "--max_length", "40", "--logging_steps", "1", "--num_warmup_steps", "2",
        "--final_threshold", "0.5", "--mask_block_rows", "8", "--mask_block_cols", "16",
        "--base_dtype", "float32",
    ]  # fmt: skip


def test_a_run_has_the_density_that_was_asked_for(setting: list[str], tmp_path: Path) -> None:
    """The warm-up of the learning rate is that of the schedule; a run can start from the result."""
    out, method = tmp_path / "run", ["--method", "block_prune", "--mask_structure", "hybrid"]
    words = [*setting, *method, "--output_dir", str(out), "--plots"]
    assert program.run_main(main, words) == 0
    log = lines(out / "log.jsonl")
    # w = 2: of step 2 already that of the next one, half way between steps 2 and 4
    assert [row["threshold"] for row in log if row["step"] <= 2] == [1.0, 0.5 + 0.5**4]
    assert log[-1]["density"] == log[-1]["threshold"] == 0.5
    found = results(out)
    per_layer = 4 * 32 * 32 + 2 * 32 * 48
    biases, norms = 4 * 32 + 48 + 32, 4 * 32
    assert found["encoder_weights"] == 2 * (per_layer + biases + norms)
    assert found["encoder_kept"] == 2 * (per_layer // 2 + biases - 24 + norms)
    assert found["mask_bits"] == 2 * (4 * 8 + 48)
    assert (out / "plots" / "masks.png").is_file()
    shares = json.loads((out / "mask_shares.json").read_text())
    matrices = [v for name, v in shares.items() if ".attention." in name]
    assert len(matrices) == 8 and sum(matrices) / 8 == pytest.approx(0.5)
    assert len(shares) == 10  # and the units of two feed-forward layers
    again = evaluated([
        *setting, *method, "--lora_path", str(out), "--output_dir", str(tmp_path / "b")
    ])  # fmt: skip
    assert again["eval_loss"] == pytest.approx(found["eval_loss"], abs=1e-6)
    other = [*setting, "--method", "block_prune", "--lora_path", str(out)]
    with pytest.raises(AssertionError):
        evaluated([*other, "--output_dir", str(tmp_path / "c")])  # of another mask_structure


def test_the_mode_is_set_once_for_all_batches() -> None:
    """Layers of scattered blocks look for them whenever the mode is set."""

    class Counted(torch.nn.Module):
        config = SimpleNamespace(vocab_size=7)
        modes = 0

        def train(self, mode: bool = True) -> Counted:
            self.modes += 1
            return super().train(mode)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            assert not self.training and ids.shape == (2, 5)
            return ids

    models = {"one": Counted(), "two": Counted()}
    assert milliseconds(models, 2, 5, rounds=3).keys() == models.keys()
    assert [model.modes for model in models.values()] == [1, 1]


def test_seeds_are_one_point_of_a_curve() -> None:
    rows = [
        {"label": "a", "options": {"lr": lr}, "density": d, "value": v, "milliseconds": 10 * d}
        for lr, d, v in ((1, 0.5, 0.8), (1, 0.52, 0.9), (2, 0.1, 0.6))
    ]
    one, other = pruning_curve.points(rows)["a"]
    assert one == pytest.approx((0.51, 0.85, 5.1, 0.1 / 2**0.5))
    assert other == pytest.approx((0.1, 0.6, 1.0, 0.0))


def test_the_curve_over_density_and_time(
    setting: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [tmp_path / "linked", tmp_path / "lora"]
    linked = ["--method", "splora", "--mask_structure", "linked"]
    assert program.run_main(main, [*setting, *linked, "--output_dir", str(runs[0]), "--plots"]) == 0
    for name in ("masks.png", "density.png"):
        assert (runs[0] / "plots" / name).stat().st_size > 5000
    pruning = {"--final_threshold", "--mask_block_rows", "--mask_block_cols"}
    words = [w for i, w in enumerate(setting) if not pruning & {w, setting[i - 1]}]
    assert program.run_main(main, [*words, "--method", "lora", "--output_dir", str(runs[1])]) == 0
    capsys.readouterr()
    folders, out = [str(run) for run in runs], tmp_path / "curve.png"
    quick = ["--batch", "2", "--length", "8", "--rounds", "1", "--out", str(out)]
    assert program.run_main(pruning_curve.main, [*folders, "--metric", "f1", *quick]) == 0
    rows = json.loads(out.with_suffix(".json").read_text("utf-8"))
    assert [row["label"] for row in rows] == ["splora, linked, topK", "lora"]
    assert [row["density"] for row in rows] == [results(runs[0])["density"], 1.0]
    assert [row["value"] for row in rows] == [results(run)["eval_f1"] for run in runs]
    assert all(row["milliseconds"] > 0 for row in rows) and out.stat().st_size > 5000
    small = compact_model(runs[0] / "adapter", setting[1])  # what was timed
    assert small.config.layer_shapes == [[1, 24], [1, 24]]
    sizes = [sum(p.numel() for p in m.parameters()) for m in (small, dense_model(setting[1]))]
    assert sizes[0] < sizes[1]
    capsys.readouterr()
    for wrong, message in (
        (["--metric", "f1", *quick], "give a new .png"),
        (["--metric", "bleu", "--out", str(tmp_path / "b.png")], "--metric bleu"),
    ):
        assert program.run_main(pruning_curve.main, [*folders, *wrong]) == 2
        assert message in capsys.readouterr().err
    elsewhere = [str(tmp_path), "--metric", "f1", "--out", str(tmp_path / "b.png")]
    assert program.run_main(pruning_curve.main, elsewhere) == 2
    assert "is no finished run" in capsys.readouterr().err
