"""`model.add_adapter` of Transformers with this project's configurations, and its `Trainer`."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.fake_hub import TOKEN, FakeHub
from support.paths import ROOT
from support.peft_tiny import IDS, QV, ROWS, bert, rows
from torch import Tensor, nn

import peft_custom
from peft_custom import (
    AdaLoraConfig,
    BimLoraConfig,
    BlockPruneConfig,
    DyLoraConfig,
    LoraConfig,
    PeftConfig,
    PeftModel,
    SplopaConfig,
    SploraConfig,
    get_peft_model,
)
from peft_custom.hf_models import MODEL_METHODS, _load_adapter, adapters_of, patch_transformers
from peft_custom.hf_trainer import TRAINER_METHODS, _Callback

transformers = pytest.importorskip("transformers")

STEPS, KILLED = 12, 8
ADALORA: dict[str, Any] = {
    "init_r": 4, "target_r": 2, "tinit": 2, "tfinal": 4, "deltaT": 1, "total_step": STEPS,
}  # fmt: skip
HEAD = {"task_type": "SEQ_CLS", "target_modules": ["query", "value"]}
BLOCKS = {"mask_block_rows": 8, "mask_block_cols": 8}
CONFIGS: dict[str, PeftConfig] = {
    "lora": LoraConfig(r=4, **HEAD),
    "pissa": LoraConfig(r=4, init_lora_weights="pissa_niter_2", **HEAD),
    "dora": LoraConfig(r=4, use_dora=True, **HEAD),
    "dylora": DyLoraConfig(r=4, **HEAD),
    "adalora": AdaLoraConfig(**ADALORA, **HEAD),
    "bim_lora": BimLoraConfig(r=4, block_size=8, collection_steps=2, **HEAD),
    "splora": SploraConfig(task_type="SEQ_CLS"),
    "splopa": SplopaConfig(task_type="SEQ_CLS", **BLOCKS),
    "block_prune": BlockPruneConfig(task_type="SEQ_CLS", **BLOCKS),
}


@pytest.fixture(autouse=True)
def patched(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Transformers patched for one test."""
    replaced = [
        (transformers.PreTrainedModel, MODEL_METHODS),
        (transformers.Trainer, TRAINER_METHODS),
    ]
    for cls, methods in replaced:
        for name in methods:
            monkeypatch.setattr(cls, name, getattr(cls, name))  # put back afterwards
    patch_transformers()
    yield


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def shaken(model: nn.Module, seed: int = 1) -> nn.Module:
    """The model with other values in all that trains."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


# --- the models' methods --------------------------------------------------------------------------
@pytest.mark.parametrize("kind", CONFIGS)
def test_it_is_what_get_peft_model_makes(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = bert()
    torch.manual_seed(4)
    model.add_adapter(CONFIGS[kind])
    base = bert()
    torch.manual_seed(4)
    wrapped = get_peft_model(base, CONFIGS[kind])
    names = [n for n, p in wrapped.named_parameters() if p.requires_grad]
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        name.removeprefix("base_model.model.") for name in names
    ]
    assert torch.equal(outputs(shaken(model)), outputs(shaken(wrapped)))
    assert any("classifier" in name for name in names)


@pytest.mark.filterwarnings("ignore:saving an adapter")
@pytest.mark.parametrize("kind", CONFIGS)
def test_saved_files_are_those_of_the_wrapper(kind: str, tmp_path: Path) -> None:
    model = bert()
    torch.manual_seed(4)
    model.add_adapter(CONFIGS[kind])
    shaken(model).save_pretrained(tmp_path / "a")
    assert sorted(f.name for f in (tmp_path / "a").iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip
    wrapped = PeftModel.from_pretrained(bert(), tmp_path / "a")
    # PiSSA takes its start out of the base again, which rounds
    assert torch.allclose(outputs(wrapped), outputs(model), atol=1e-5 if kind == "pissa" else 0)
    wrapped.save_pretrained(tmp_path / "b")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()

    again = bert()
    again.load_adapter(str(tmp_path / "a"))
    assert torch.equal(outputs(again), outputs(wrapped))
    assert not any(p.requires_grad for p in again.parameters())
    trained = bert()
    trained.load_adapter(tmp_path / "a", is_trainable=True)
    assert any(p.requires_grad for p in trained.parameters())


def test_from_pretrained_of_an_adapter_brings_its_base(tmp_path: Path) -> None:
    pytest.importorskip("peft")  # Transformers looks for adapters where PEFT is installed
    bert().save_pretrained(tmp_path / "base")
    load = transformers.AutoModelForSequenceClassification.from_pretrained
    model = load(tmp_path / "base")
    model.add_adapter(CONFIGS["adalora"])
    with pytest.warns(UserWarning, match="has not its final form"):
        shaken(model).save_pretrained(tmp_path / "adapter")
    again, report = load(tmp_path / "adapter", output_loading_info=True)
    assert torch.equal(outputs(again), outputs(model)) and not any(report.values())
    assert isinstance(again.peft_config["default"], AdaLoraConfig)


def test_several_adapters() -> None:
    model = bert()
    plain = outputs(model)
    model.add_adapter(LoraConfig(**QV), "a")
    a = outputs(shaken(model))
    model.add_adapter(LoraConfig(**QV), "b")
    assert model.active_adapters() == ["b"] and set(model.peft_config) == {"a", "b"}
    b = outputs(shaken(model, 2))
    assert not torch.equal(a, b)
    model.set_adapter("a")
    assert torch.equal(outputs(model), a)
    model.disable_adapters()
    assert torch.equal(outputs(model), plain)
    model.enable_adapters()
    assert torch.equal(outputs(model), a)
    model.set_adapter(["a", "b"])
    with pytest.raises(ValueError, match="activate the one to save"):
        model.save_pretrained("never")
    state = model.get_adapter_state_dict("b")
    layers = [
        f"bert.encoder.layer.{i}.attention.self.{m}" for i in (0, 1) for m in QV["target_modules"]
    ]
    assert {*state} == {f"{layer}.lora_{side}.weight" for layer in layers for side in "AB"}
    with pytest.raises(ValueError, match="no adapter 'c'"):
        model.delete_adapter(["a", "c"])
    model.delete_adapter("a")
    assert model.active_adapters() == ["b"] and torch.equal(outputs(model), b)
    model.delete_adapter("b")
    assert torch.equal(outputs(model), plain) and adapters_of(model) is None
    assert not model._hf_peft_config_loaded and not hasattr(model, "peft_config")
    model.add_adapter(CONFIGS["adalora"])  # a fresh base again


def test_an_adapter_of_any_name_is_saved_where_it_is_asked_for(tmp_path: Path) -> None:
    model = bert()
    model.add_adapter(LoraConfig(**QV), "mine")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").is_file()
    other = bert()
    other.add_adapter(LoraConfig(**QV), "first")
    other.load_adapter(str(tmp_path), "second")
    assert other.active_adapters() == ["first"]
    other.set_adapter("second")
    assert torch.equal(outputs(other), outputs(model))
    with pytest.raises(ValueError, match="there is an adapter 'second' already"):
        other.load_adapter(str(tmp_path), "second")
    other.set_adapter("first")
    other.load_adapter(str(tmp_path), "first", hotswap=True)
    assert torch.equal(outputs(other), outputs(model))


def test_the_wrapper_merges_and_leaves_a_plain_model(tmp_path: Path) -> None:
    model = bert()
    model.add_adapter(LoraConfig(task_type="SEQ_CLS", **QV))
    before = outputs(shaken(model))
    adapted = adapters_of(model)
    assert adapted is not None
    adapted.merge_and_unload()
    assert torch.allclose(outputs(model), before, atol=1e-5) and adapters_of(model) is None
    model.save_pretrained(tmp_path)
    plain = transformers.BertForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(outputs(plain), outputs(model))


def test_models_without_our_adapters_are_as_before(tmp_path: Path) -> None:
    model = bert()
    with pytest.raises(ValueError, match="No adapter loaded|PEFT"):
        model.set_adapter("a")
    model.save_pretrained(tmp_path, True, None, False, "1KB")  # in parts, all by position
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    before = transformers.PreTrainedModel.add_adapter
    patch_transformers()
    assert transformers.PreTrainedModel.add_adapter is before  # patched once
    with pytest.raises(FileNotFoundError, match="no adapter_config"):
        model.load_adapter(str(tmp_path))


def test_what_cannot_be_saved_so_is_refused(tmp_path: Path) -> None:
    model = bert()
    model.add_adapter(LoraConfig(**QV))
    for option in ({"push_to_hub": True}, {"variant": "fp16"}, {"save_peft_format": False}):
        with pytest.raises(ValueError, match=f"{next(iter(option))}"):
            model.save_pretrained(tmp_path / "no", **option)
    model.save_pretrained(tmp_path / "none", is_main_process=False)
    assert not list(tmp_path.iterdir())


def test_no_mixture_with_adapters_of_others(tmp_path: Path) -> None:
    model = bert()
    model.add_adapter(LoraConfig(**QV))
    with pytest.raises(TypeError, match="carries adapters of peft_custom"):
        model.add_adapter(object())
    with pytest.raises(TypeError, match="all adapters of a model are of one type"):
        model.add_adapter(CONFIGS["adalora"], "b")
    other = bert()
    other._hf_peft_config_loaded = True  # as after PEFT's own
    with pytest.raises(ValueError, match="carries adapters of PEFT's"):
        other.add_adapter(LoraConfig(**QV))
    model.save_pretrained(tmp_path)
    asked: list[Any] = []
    _load_adapter(lambda *args, **options: asked.append(args), other, str(tmp_path), "b")
    assert asked == [(other, str(tmp_path), "b")]  # as without the patch


def test_a_release_without_the_methods_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(transformers.Trainer, "_load_best_model")
    with pytest.raises(ImportError, match=r"no Trainer\._load_best_model: use get_peft_model"):
        patch_transformers()


# --- the Trainer -------------------------------------------------------------------------------
class Killed(Exception):
    """Stands for the signal."""


class Kill(transformers.TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
        if state.global_step == KILLED:
            raise Killed


def trainer(folder: Path, kind: str, kill: bool = False, start: int = 0, **arguments: Any) -> Any:
    model = bert()
    torch.manual_seed(start)
    model.add_adapter(CONFIGS[kind])
    given = {
        "output_dir": str(folder), "num_train_epochs": 2, "save_strategy": "steps", "save_steps": 5,
        "logging_steps": 1, "report_to": [], "learning_rate": 1e-2, "use_cpu": True,
        "per_device_train_batch_size": ROWS, "disable_tqdm": True, "seed": 7, **arguments,
    }  # fmt: skip
    data = [{**row, "input_ids": row["input_ids"] % 40} for row in rows()]
    return transformers.Trainer(
        model, transformers.TrainingArguments(**given), train_dataset=data, eval_dataset=data[:8],
        callbacks=[Kill()] if kill else [],
    )  # fmt: skip


def trained(made: Any) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in made.model.named_parameters()}


@pytest.mark.filterwarnings("ignore:saving an adapter")
@pytest.mark.parametrize("kind", CONFIGS)
def test_killed_and_resumed_is_uninterrupted(kind: str, tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole", kind)
    whole.train()
    with pytest.raises(Killed):
        trainer(tmp_path / "killed", kind, kill=True).train()
    files = {path.name for path in (tmp_path / "killed" / "checkpoint-5").iterdir()}
    assert {"adapter_model.safetensors", "trained.safetensors"} <= files
    assert "model.safetensors" not in files
    resumed = trainer(tmp_path / "killed", kind)
    with torch.no_grad():
        for parameter in resumed.model.parameters():
            if parameter.requires_grad:
                parameter.zero_()  # everything comes from the checkpoint
    resumed.train(resume_from_checkpoint=True)
    ends = trained(whole)
    for name, tensor in trained(resumed).items():
        assert torch.equal(tensor, ends[name]), name
    assert torch.equal(outputs(resumed.model), outputs(whole.model))


@pytest.mark.filterwarnings("ignore:saving an adapter")
def test_a_base_that_was_split_in_another_way_is_refused(tmp_path: Path) -> None:
    """A checkpoint has the trained factors; what they were taken out of must be the same."""
    with pytest.raises(Killed):
        trainer(tmp_path, "pissa", kill=True).train()
    with pytest.raises(ValueError, match="was split in another way"):
        trainer(tmp_path, "pissa", start=1).train(resume_from_checkpoint=True)


def test_no_call_and_no_callback_are_needed(tmp_path: Path) -> None:
    made = trainer(tmp_path, "adalora")
    made.train()
    ranks = [sum(kept) for kept in _ranks(made.model).values()]
    assert sum(ranks) == 2 * 2 * 2 and len(ranks) == 4  # target_r for 2 maps of 2 layers
    logged = [line["tuner/budget"] for line in made.state.log_history if "loss" in line]
    assert logged[0] == 16 and logged[-1] == 8
    made.model.save_pretrained(tmp_path / "adapter")  # no warning: its final form
    again = bert()
    again.load_adapter(tmp_path / "adapter")
    assert torch.allclose(outputs(again), outputs(made.model), atol=1e-6)


def _ranks(model: nn.Module) -> dict[str, list[bool]]:
    from peft_custom.tuners.adalora.export import rank_pattern

    return rank_pattern(list(peft_custom.iter_adapters(model)), "default")


@pytest.mark.filterwarnings("ignore:saving an adapter")
def test_the_best_checkpoint_is_taken_back(tmp_path: Path) -> None:
    made = trainer(
        tmp_path, "adalora", eval_strategy="steps", eval_steps=5, load_best_model_at_end=True,
        metric_for_best_model="loss", greater_is_better=True,
    )  # fmt: skip
    made.train()
    assert made.state.best_model_checkpoint.endswith("checkpoint-5")
    assert made.evaluate()["eval_loss"] == pytest.approx(made.state.best_metric, rel=1e-6)


def test_a_callback_of_ones_own_is_the_only_one(tmp_path: Path) -> None:
    from peft_custom.hf_trainer import TunerCallback

    made = trainer(tmp_path, "lora")
    own = transformers.Trainer(made.model, made.args, callbacks=[TunerCallback(seed=3)])
    found = [c for c in own.callback_handler.callbacks if isinstance(c, _Callback)]
    assert len(found) == 1 and found[0].seed == 3
    plain = transformers.Trainer(bert(), made.args)
    assert not any(isinstance(c, _Callback) for c in plain.callback_handler.callbacks)


def test_weights_of_other_adapters_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        trainer(tmp_path, "lora", kill=True).train()
    with pytest.raises(ValueError, match="of other adapters than the model's"):
        trainer(tmp_path, "dora").train(resume_from_checkpoint=True)
    (tmp_path / "checkpoint-5" / "trained.safetensors").unlink()
    with pytest.raises(ValueError, match="missing or damaged"):
        trainer(tmp_path, "lora").train(resume_from_checkpoint=True)


# --- the hub -------------------------------------------------------------------------------------
BY_THE_HUB = """
import sys, torch
from transformers import AutoModelForSequenceClassification as Auto
from peft_custom import DyLoraConfig
from peft_custom.hf_models import patch_transformers
patch_transformers()
model = Auto.from_pretrained(sys.argv[1])
model.add_adapter(DyLoraConfig(r=4, task_type="SEQ_CLS", init_lora_weights=False))
model.push_to_hub("me/adapter")
again = Auto.from_pretrained(sys.argv[1])
again.load_adapter("me/adapter", "theirs", adapter_kwargs={"revision": "main"})
ids = torch.arange(28).view(4, 7)
assert again.active_adapters() == ["theirs"]
assert torch.equal(model.eval()(ids).logits, again.eval()(ids).logits)
"""


def test_to_the_hub_and_back(tmp_path: Path) -> None:
    """In a process of its own: the hub's client reads its address when it is imported."""
    bert().save_pretrained(tmp_path / "base")
    with FakeHub({}).running() as hub:
        outside = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": TOKEN}
        outside["HF_HUB_OFFLINE"] = "0"
        done = subprocess.run(
            [sys.executable, "-c", BY_THE_HUB, str(tmp_path / "base")],
            cwd=ROOT, capture_output=True, text=True, env={**os.environ, **outside},
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {*hub.repos["models/me/adapter"]}
