"""BIM-LoRA on the command line: options, the original's names and values, a run with pictures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.runner_cases import evaluated, lines, pair_task, results, tiny_bert
from transformers import RobertaConfig, RobertaForSequenceClassification

from examples import program
from examples.config import OptionError, get_default_config
from examples.run_glue import main
from peft_custom.tuners.bim_lora import BIMLoRALinear, MaskAllocator, get_bim_lora_model


def test_the_originals_minimal_example() -> None:
    """Its README's lines with the import path changed, on a small random model."""
    config = get_default_config("mrpc")
    torch.manual_seed(0)
    base = RobertaForSequenceClassification(
        RobertaConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                      intermediate_size=64, vocab_size=60, max_position_embeddings=40)
    )  # fmt: skip
    model = get_bim_lora_model(base, config)
    layers = [m for m in model.modules() if isinstance(m, BIMLoRALinear)]
    assert len(layers) == 12  # the head is trained in full, not adapted
    assert {(m.block_size, m.lora_A.shape[0], m.scaling) for m in layers} == {(4, 16, 1.0)}
    ids = torch.randint(2, 60, (3, 9))
    loss = model(input_ids=ids, labels=torch.tensor([0, 1, 1])).loss
    loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert MaskAllocator(model, config).get_sparsity_stats()["active_ratio"] == 1.0


def test_the_originals_values_per_task(tmp_path: Path) -> None:
    mrpc, qnli, qqp = (get_default_config(task) for task in ("mrpc", "qnli", "qqp"))
    assert (mrpc.num_train_epochs, mrpc.learning_rate, mrpc.lora_dropout) == (22, 1e-5, 0.1)
    assert (mrpc.collection_steps, mrpc.mlp_epochs, mrpc.eval_steps) == (1200, 12, 10)
    assert qnli.max_seq_length == 256 and qqp.per_device_eval_batch_size == 128
    assert (mrpc.lora_r, mrpc.lora_alpha, mrpc.block_size, mrpc.seed) == (16, 16, 4, 42)
    mrpc.save(tmp_path / "config.json")
    assert type(mrpc).load(tmp_path / "config.json") == mrpc
    (tmp_path / "bad.json").write_text('{"what": 1}')
    with pytest.raises(OptionError, match="what"):
        type(mrpc).load(tmp_path / "bad.json")
    with pytest.raises(OptionError, match="cola, mnli"):
        get_default_config("nothing")
    squad = get_default_config("squad")
    assert (squad.task_name, squad.max_seq_length, squad.num_train_epochs) == ("squad", 384, 10)


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("bim")
    model = tiny_bert(folder / "model")
    pair_task(folder / "data" / "mrpc", {"train": 32, "validation": 16})
    return [
        "--model_name_or_path", str(model), "--data_dir", str(folder / "data"),
        "--task_name", "mrpc", "--method", "bim_lora", "--lora_r", "2", "--block_size", "5",
        "--per_device_train_batch_size", "8", "--num_train_epochs", "2", "--disable_tqdm",
        "--base_dtype", "float32", "--learning_rate", "1e-2", "--max_length", "40",
    ]  # fmt: skip


def test_a_run_with_pictures_starts_another(setting: list[str], tmp_path: Path) -> None:
    """Temperatures in the log, features in their file, pictures; its adapter is a start."""
    features = tmp_path / "features.safetensors"
    words = [*setting, "--output_dir", str(tmp_path / "one"), "--plots",
             "--features_path", str(features), "--collection_steps", "2"]  # fmt: skip
    assert program.run_main(main, words) == 0
    rows = lines(tmp_path / "one" / "metrics.jsonl")
    assert rows[0]["temperature"] > rows[-1]["temperature"] == pytest.approx(0.45)
    assert {"mask_mean", "mask_std", "mask_open"} <= set(rows[0])
    shares = json.loads((tmp_path / "one" / "mask_shares.json").read_text())
    # 7 × 7 blocks, of the feed-forward maps 7 × 10
    blocks = {n: 49 if "attention" in n or "pooler" in n else 70 for n in shares}
    mean = sum(blocks[n] * share for n, share in shares.items()) / sum(blocks.values())
    assert any(mean == pytest.approx(row["mask_mean"], abs=1e-5) for row in rows)  # best epoch's
    assert all(name.startswith("bert.") for name in shares)
    assert 0 < min(shares.values())
    assert features.is_file() and results(tmp_path / "one")["trainable_parameters"] > 0
    pytest.importorskip("matplotlib")
    for name in ("block_masks", "mask_history", *(f"block_features_{k}" for k in (1, 2, 3, 4))):
        assert (tmp_path / "one" / "plots" / f"{name}.png").stat().st_size > 5_000

    again = [*setting, "--output_dir", str(tmp_path / "two"), "--num_train_epochs", "0.25",
             "--lora_path", str(tmp_path / "one"), "--learning_rate", "0"]  # fmt: skip
    assert program.run_main(main, again) == 0
    from safetensors.torch import load_file

    one, two = (
        load_file(tmp_path / run / "adapter" / "adapter_model.safetensors")
        for run in ("one", "two")
    )
    same = [name for name in one if name.endswith(("lora_B", "block_scores"))]
    assert same and all(torch.equal(one[name], two[name]) for name in same)


def as_lora(setting: list[str]) -> list[str]:
    """The same for plain LoRA, which has no blocks."""
    at = setting.index("--block_size")
    return [*setting[:at], *setting[at + 2 :], "--method", "lora"]


def test_the_saved_adapter_gives_the_reported_metrics(setting: list[str], tmp_path: Path) -> None:
    """Its temperature comes with it: the mask is σ(Z/τ), and τ has fallen."""
    words = [*setting, "--output_dir", str(tmp_path / "run"), "--mask_init", "random"]
    assert program.run_main(main, words) == 0
    found = evaluated(
        [*setting, "--output_dir", str(tmp_path / "x"), "--lora_path", str(tmp_path / "run")]
    )
    said = {name: results(tmp_path / "run")[name] for name in found}
    assert found == pytest.approx(said, abs=1e-6)


def test_a_plain_lora_adapter_is_a_start(setting: list[str], tmp_path: Path) -> None:
    lora = [*as_lora(setting), "--output_dir", str(tmp_path / "lora"), "--lora_modules", "query"]
    assert program.run_main(main, lora) == 0
    words = [*setting, "--output_dir", str(tmp_path / "bim"), "--lora_modules", "query"]
    words += ["--lora_path", str(tmp_path / "lora"), "--learning_rate", "0", "--max_steps", "1"]
    assert program.run_main(main, [*words, "--mask_init", "constant"]) == 0
    from safetensors.torch import load_file

    first, second = (
        load_file(tmp_path / run / "adapter" / "adapter_model.safetensors")
        for run in ("lora", "bim")
    )
    factors = [name for name in first if name.endswith("lora_B.weight")]
    assert factors
    for name in factors:
        layer = name.removesuffix(".lora_B.weight")
        assert torch.equal(first[name], second[f"{layer}.bim.lora_B"])


def test_overwriting_leaves_no_picture_of_the_run_before(
    setting: list[str], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    words = [*setting, "--output_dir", str(tmp_path), "--max_steps", "1", "--mask_init", "constant"]
    assert program.run_main(main, [*words, "--plots"]) == 0
    assert list(tmp_path.rglob("block_masks.png"))
    words = [*as_lora(setting), "--output_dir", str(tmp_path), "--max_steps", "1"]
    assert program.run_main(main, [*words, "--overwrite_output_dir"]) == 0
    assert [path.name for path in tmp_path.rglob("*.png")] == ["learning_curve.png"]


def test_a_folder_of_pictures_that_is_no_runs_stays(setting: list[str], tmp_path: Path) -> None:
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "mine.png").touch()
    words = [*setting, "--output_dir", str(tmp_path), "--max_steps", "1", "--mask_init", "constant"]
    assert program.run_main(main, words) == 0
    assert (tmp_path / "plots" / "mine.png").exists()


@pytest.mark.parametrize("init", ["constant", "random", "features"])
def test_other_starts_of_the_mask(setting: list[str], tmp_path: Path, init: str) -> None:
    words = [*setting, "--output_dir", str(tmp_path), "--mask_init", init, "--max_steps", "2",
             "--train_mask", "false", "--mask_temperature", "0.7",
             "--temperature_schedule", "constant"]  # fmt: skip
    assert program.run_main(main, words) == 0
    assert lines(tmp_path / "metrics.jsonl")[-1]["temperature"] == pytest.approx(0.7)
