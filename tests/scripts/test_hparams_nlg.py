"""GPT-2's sheets hold the published recipe, and what is not published is derived from what is."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.paths import ROOT

from examples.cli.fields import OptionError, read_file
from examples.config import get_default_config
from examples.data.tasks.nlg import NLG_TASKS

SIZES = ("medium", "large")
METHODS = ("lora", "dylora", "adalora", "vilora", "bim_lora", "full")
# the original recipe's arguments under our names
RECIPE = {
    "learning_rate": 2e-4, "weight_decay": 0.01, "adam_beta1": 0.9, "adam_beta2": 0.999,
    "adam_epsilon": 1e-6, "max_grad_norm": 0, "lr_scheduler_type": "linear",
    "num_warmup_steps": 500, "num_train_epochs": 5, "global_batch_size": 8,
    "per_device_train_batch_size": 8, "per_device_eval_batch_size": 4,
    "label_smoothing_factor": 0.1, "max_length": 512, "seed": 110,
    "packing": True, "eval_steps": 2000, "save_steps": 1000, "load_best_model_at_end": False,
    "method": "lora", "wiring": "loralib", "lora_r": 4, "lora_alpha": 32, "lora_dropout": 0.1,
    "obj": "clm", "num_beams": 10, "max_new_tokens": 64, "length_penalty": 0.8,
    "no_repeat_ngram_size": 4, "repetition_penalty": 1.0, "eos_token_id": ["628"],
    "decoding_rules": "lora",
}  # fmt: skip
OTHERWISE: dict[str, dict[str, object]] = {
    "e2e": {},
    "webnlg": {},
    "dart": {"weight_decay": 0, "lora_dropout": 0, "label_smoothing_factor": 0},
    "boolq": {"global_batch_size": 6},
    "xsum": {"max_length": 1024},
}


def sheet(size: str, method: str) -> Path:
    return ROOT / "hparams" / f"gpt2_{size}_{method}.yaml"


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("task", NLG_TASKS)
def test_lora_is_the_published_recipe(size: str, task: str) -> None:
    found = read_file(sheet(size, "lora"), task)
    wanted = {**RECIPE, **OTHERWISE[task]}
    assert {name: found[name] for name in wanted} == wanted


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_every_task(size: str, method: str) -> None:
    """Batches, epochs and what a loss is are the recipe's for all methods."""
    kept = ("global_batch_size", "num_train_epochs", "max_length", "label_smoothing_factor", "seed")
    for task in NLG_TASKS:
        found = read_file(sheet(size, method), task)
        assert found["method"] == method
        assert {n: found[n] for n in kept} == {n: {**RECIPE, **OTHERWISE[task]}[n] for n in kept}
    with pytest.raises(OptionError, match="no row 'mrpc' under tasks; has e2e, webnlg, dart"):
        read_file(sheet(size, method), "mrpc")


@pytest.mark.parametrize("method", METHODS)
def test_where_values_come_from_is_said(method: str) -> None:
    for size in SIZES:
        first = sheet(size, method).read_text("utf-8").splitlines()
        words = " ".join(line for line in first if line.startswith("#"))
        assert "published" in words


@pytest.mark.parametrize("task", NLG_TASKS)
def test_the_originals_configuration_is_the_sheets(task: str) -> None:
    config, row = get_default_config(task), read_file(sheet("medium", "bim_lora"), task)
    assert config.task_name == task and config.model_name_or_path == "gpt2-medium"
    same = {
        "max_seq_length": "max_length", "lora_r": "lora_r", "lora_alpha": "lora_alpha",
        "lora_dropout": "lora_dropout", "block_size": "block_size", "mlp_epochs": "mlp_epochs",
        "mlp_lr": "mlp_lr", "lora_lr": "learning_rate", "num_train_epochs": "num_train_epochs",
        "max_grad_norm": "max_grad_norm", "seed": "seed",
        "per_device_train_batch_size": "global_batch_size",
        "per_device_eval_batch_size": "per_device_eval_batch_size",
    }  # fmt: skip
    assert {n: getattr(config, n) for n in same} == {n: row[option] for n, option in same.items()}
