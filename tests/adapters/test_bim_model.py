"""BIM-LoRA in models: surgery, merging, several adapters, files, the known names."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from support.bim_tiny import SIZES, adamw, base, batches, frozen_bytes, logits, loss_of, tiny
from support.paths import ROOT
from torch import nn

from peft_custom import BimLoraConfig, LoraConfig, PeftModel, attach, get_peft_model
from peft_custom.tuners.bim_lora import (
    BIMLoRALinear,
    ImplicitMLP,
    MaskAllocator,
    get_bim_lora_model,
    load_bim_lora_model,
    mark_only_bim_lora_as_trainable,
    save_bim_lora_model,
)

transformers = pytest.importorskip("transformers")
warnings.filterwarnings("ignore", message="saving an adapter")


def scramble(model: nn.Module, seed: int = 1) -> nn.Module:
    """Gives every adapter and head random values, and every τ another one than at the start."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, t in model.state_dict().items():
            if ".bim." in name or "modules_to_save" in name:
                t.copy_(0.6 + 0.1 * torch.rand(())) if t.dim() == 0 else t.normal_(0, 0.3)
    return model.eval()


def test_fact_1_a_fresh_model_is_the_base() -> None:
    """Exactly: W + s·E(m)∘0 is W."""
    plain = logits(base().eval())
    model = tiny().eval()
    assert torch.equal(logits(model), plain)
    model.train()
    with torch.enable_grad():
        torch.testing.assert_close(logits(model), plain)


def test_fact_17_what_trains() -> None:
    model = tiny()
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    parts = {n.rpartition(".")[2] if ".bim." in n else "head" for n in trainable}
    assert parts == {"lora_A", "lora_B", "block_scores", "head"}
    assert all("classifier" in n for n in trainable if ".bim." not in n)
    before = frozen_bytes(model)
    optimizer = adamw(model)
    hooks = attach(model, optimizer, total_steps=4)
    hooks.prepare(batches(2), loss_of(model.train()))
    for batch in batches(4):
        model(**batch).loss.backward()
        assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
    assert frozen_bytes(model) == before
    assert not any(p.requires_grad for n, p in model.named_parameters() if "base_layer" in n)


def test_optimiser_groups() -> None:
    groups = {g["name"]: g for g in tiny(score_lr_ratio=0.5).parameter_groups(1e-3, 0.01)}
    assert set(groups) == {"lora", "scores", "head"}
    assert groups["lora"]["lr"] == 1e-3 and groups["lora"]["weight_decay"] == 0.01
    assert groups["scores"]["lr"] == 5e-4 and groups["scores"]["max_grad_norm"] == 5.0
    assert groups["head"]["lr"] == pytest.approx(3e-3) and groups["head"]["weight_decay"] == 0.0
    assert all(g["betas"] == (0.9, 0.98) for g in groups.values())
    frozen = tiny(train_mask=False)
    assert "scores" not in {g["name"] for g in frozen.parameter_groups(1e-3, 0.0)}


@pytest.mark.parametrize("kind", ["Bert", "GPT2", "Roberta", "Distil"])
def test_fact_10_merged_equals_unmerged(kind: str) -> None:
    """Linear and Conv1D (fused q/k/v), ragged blocks; twice is once; unmerging is exact."""
    torch.manual_seed(0)
    if kind == "GPT2":
        config = transformers.GPT2Config(n_layer=2, n_embd=12, n_head=2, vocab_size=50,
                                         n_positions=20, num_labels=3, pad_token_id=0)  # fmt: skip
        plain = transformers.GPT2ForSequenceClassification(config)
    elif kind == "Distil":
        config = transformers.DistilBertConfig(vocab_size=50, dim=16, n_layers=2, n_heads=2,
                                               hidden_dim=24, num_labels=3)  # fmt: skip
        plain = transformers.DistilBertForSequenceClassification(config)
    else:
        plain = base(kind)
    options = BimLoraConfig(task_type="SEQ_CLS", r=2, block_size=5)
    model = scramble(get_peft_model(plain, options))
    before, weights = logits(model), frozen_bytes(model)
    model.merge_adapter()
    merged = logits(model)
    assert float((merged - before).abs().max()) <= 1e-5 * max(1.0, float(before.abs().max()))
    model.merge_adapter()
    assert torch.equal(logits(model), merged)
    model.unmerge_adapter()
    assert frozen_bytes(model) == weights and torch.equal(logits(model), before)
    assert not torch.equal(before, logits(plain)) or plain is model.get_base_model()
    fused = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(logits(fused), before, rtol=1e-5, atol=1e-5)
    assert not any(isinstance(m, BIMLoRALinear) for m in fused.modules())
    wide = scramble(model.double())
    before = logits(wide)
    wide.merge_adapter()
    torch.testing.assert_close(logits(wide), before, rtol=1e-12, atol=1e-12)


def test_training_and_evaluation_passes_agree() -> None:
    """Evaluation's formed weights equal the training pass, and follow every change of a part."""
    model = scramble(tiny())
    seen = logits(model)
    with torch.enable_grad():
        [batch] = batches(1)
        trained = model(**batch).logits.detach()
    torch.testing.assert_close(seen, trained, rtol=1e-5, atol=1e-5)
    for part in ("lora_A", "lora_B", "block_scores", "temperature"):
        before = logits(model)
        for name, t in model.state_dict().items():
            if name.endswith(part):
                t.add_(0.2)
        after = logits(model)
        assert not torch.equal(after, before), part
        assert torch.equal(logits(copy.deepcopy(model)), after), part
    layer = next(m for m in model.modules() if isinstance(m, BIMLoRALinear))
    assert layer._effective is not None
    model.train()
    assert layer._effective is None


def test_hard_mask_in_evaluation() -> None:
    model = scramble(tiny(hard_mask_threshold=0.5))
    layer = next(m for m in model.modules() if isinstance(m, BIMLoRALinear))
    soft = torch.sigmoid(layer.block_scores / layer.mask_temperature)
    assert torch.equal(layer.factors().mask(), (soft > 0.5).float())
    x = torch.randn(3, layer.in_features)
    with torch.no_grad():
        hard = layer(x)
        wide = layer.get_block_mask(soft=False)
        delta = layer.scaling * wide * (layer.lora_B @ layer.lora_A)
        torch.testing.assert_close(hard, layer.base_layer(x) + x @ delta.T)
        torch.testing.assert_close(layer.get_delta_weight("default"), delta)
        torch.testing.assert_close(layer.train()(x), layer.base_layer(x) + x @ (
            layer.scaling * layer.get_block_mask() * (layer.lora_B @ layer.lora_A)
        ).T)  # fmt: skip
    for training in (False, True):
        with torch.enable_grad():
            assert torch.isfinite(layer.train(training)(x)).all()


def test_without_masking_it_is_lora_and_exports_as_lora(tmp_path: Path) -> None:
    """Fact 2: the same factors give the same logits in a LoRA adapter."""
    model = scramble(tiny(enable_masking=False))
    assert not any(p.requires_grad for n, p in model.named_parameters() if "block_scores" in n)
    wanted = logits(model)
    model.save_pretrained(tmp_path, as_lora=True)
    plain = PeftModel.from_pretrained(base(), tmp_path)
    assert isinstance(plain.peft_config["default"], LoraConfig)
    torch.testing.assert_close(logits(plain), wanted, rtol=1e-5, atol=1e-5)
    with torch.enable_grad():
        torch.testing.assert_close(model.train()(**batches(1)[0]).logits, wanted)


def test_export_as_lora_is_refused_with_the_reason(tmp_path: Path) -> None:
    model = scramble(tiny())
    with pytest.raises(ValueError, match=r"rank of up to r·min\(p, q\).*merge_and_unload"):
        model.save_pretrained(tmp_path, as_lora=True)
    layer = model.get_base_model().bert.encoder.layer[0].intermediate.dense
    rank = int(torch.linalg.matrix_rank(layer.get_delta_weight("default")))
    assert 2 < rank <= 2 * min(layer.n_blocks_out, layer.n_blocks_in)  # fact 12


def test_several_adapters() -> None:
    model = tiny()
    model.add_adapter("other", BimLoraConfig(task_type="SEQ_CLS", r=3, block_size=8))
    scramble(model)
    first = logits(model)
    model.set_adapter("other")
    second = logits(model)
    assert not torch.equal(first, second)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), logits(base().eval()))
    [batch] = batches(1)
    ids = {k: v for k, v in batch.items() if k != "labels"}
    with torch.no_grad():
        mixed = model(**ids, adapter_names=["default", "other", "other", "default"]).logits
    torch.testing.assert_close(mixed[[0, 3]], first[[0, 3]], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mixed[[1, 2]], second[[1, 2]], rtol=1e-5, atol=1e-5)
    model.delete_adapter("other")
    assert torch.equal(logits(model), first)


RELOAD = """
import sys, torch
sys.path[:0] = {paths!r}
from support.bim_tiny import base, logits
from safetensors.torch import save_file
from peft_custom import PeftModel
from peft_custom.tuners.bim_lora import ImplicitMLP, get_bim_lora_model, load_bim_lora_model
folder = {folder!r}
found = {{"peft": logits(PeftModel.from_pretrained(base(), folder + "/adapter"))}}
model = get_bim_lora_model(base(), r=2, block_size=5, lora_alpha=4).eval()
mlp = ImplicitMLP()
assert load_bim_lora_model(model, mlp, folder + "/one.pt") == {{"epoch": 3}}
found["one"] = logits(model)
found["mlp"] = mlp(torch.full((2, 6), 0.3)).detach()
save_file(found, folder + "/found")
"""


def test_fact_11_saved_and_loaded_in_a_new_process(tmp_path: Path) -> None:
    """Bit-equal logits, head and temperature included, by both kinds of file; no pickle."""
    from safetensors.torch import load_file

    model = scramble(tiny())
    model.save_pretrained(tmp_path / "adapter")
    wanted = {"peft": logits(model)}
    bare = scramble(get_bim_lora_model(base(), r=2, block_size=5, lora_alpha=4))
    mlp = ImplicitMLP()
    nn.init.normal_(mlp.layers[0].weight)
    path = save_bim_lora_model(bare, mlp, tmp_path / "one.pt", {"epoch": 3})
    assert path.suffix == ".safetensors" and (tmp_path / "one_metadata.json").is_file()
    wanted |= {"one": logits(bare), "mlp": mlp(torch.full((2, 6), 0.3)).detach()}
    code = RELOAD.format(paths=[str(ROOT / "tests"), str(ROOT)], folder=str(tmp_path))
    subprocess.run([sys.executable, "-c", code], check=True)
    found = load_file(tmp_path / "found")
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    other = get_bim_lora_model(base(), r=2, block_size=4)
    with pytest.raises(ValueError, match="block_size=5"):
        load_bim_lora_model(other, None, path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_bim_lora_model(other, None, tmp_path / "none.pt")


def test_known_names_of_a_single_layer() -> None:
    layer = BIMLoRALinear(9, 6, BimLoraConfig(r=2, lora_alpha=6, block_size=4), bias=False)
    assert (layer.n_blocks_out, layer.n_blocks_in, layer.n_blocks_total) == (2, 3, 6)
    assert layer.weight.shape == (6, 9) and layer.bias is None
    assert layer.scaling == 3.0 and layer.block_size == 4 and not layer.merged
    layer.mask_temperature = 0.5
    assert layer.mask_temperature == 0.5 and layer.hard_mask is None
    nn.init.normal_(layer.lora_B)
    x = torch.randn(2, 5, 9)
    wide = layer.get_block_mask()
    assert wide.shape == (6, 9)
    wanted = x @ (layer.weight + 3.0 * wide * (layer.lora_B @ layer.lora_A)).T
    torch.testing.assert_close(layer(x), wanted)
    layer.enable_masking = False
    wanted = x @ (layer.weight + 3.0 * (layer.lora_B @ layer.lora_A)).T
    torch.testing.assert_close(layer(x), wanted)
    assert {n.rpartition(".")[2] for n, p in layer.named_parameters() if p.requires_grad} == {
        "lora_A", "lora_B", "block_scores",
    }  # fmt: skip
    with pytest.raises(ValueError, match="wrap"):
        BIMLoRALinear(4, 4, fan_in_fan_out=True)


def test_known_names_of_a_model() -> None:
    model = base()
    assert get_bim_lora_model(model, r=2, block_size=5, target_modules=["query", "dense"]) is model
    assert not isinstance(model.classifier, BIMLoRALinear)
    with pytest.raises(ValueError, match="there is an adapter"):
        get_bim_lora_model(model, r=2)
    stats = MaskAllocator(model).get_sparsity_stats()
    assert stats["mean_score"] == pytest.approx(float(torch.sigmoid(torch.tensor(0.5))))
    assert stats["active_ratio"] == 1.0 and len(stats["modules"]) == len(
        MaskAllocator(model).masks()
    )
    assert float(MaskAllocator(model).histogram().sum()) == sum(
        m.numel() for m in MaskAllocator(model).masks().values()
    )
    model.requires_grad_(True)
    mark_only_bim_lora_as_trainable(model)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert all(".bim." in n or "modules_to_save" in n for n in trainable) and trainable
    with pytest.raises(ValueError, match="no BIMLoRALinear"):
        MaskAllocator(base())


def test_bfloat16_base_with_fp32_parameters() -> None:
    model = base().bfloat16()
    model = get_peft_model(model, BimLoraConfig(task_type="SEQ_CLS", r=2, block_size=5))
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    wide = scramble(tiny(lora_alpha=16))
    scramble(model)
    torch.testing.assert_close(logits(model).float(), logits(wide), rtol=0.1, atol=0.1)
    model.train()(**batches(1)[0]).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_our_own_models_take_it() -> None:
    """Padded and packed batches give the same logits."""
    import transformers_patched as patched

    torch.manual_seed(0)
    config = patched.RobertaConfig(**{**SIZES, "pad_token_id": 1})
    model = get_peft_model(
        patched.RobertaForSequenceClassification(config),
        BimLoraConfig(task_type="SEQ_CLS", r=2, block_size=5),
    )
    scramble(model)
    [batch] = batches(1)
    mask = batch["attention_mask"].bool()
    packed = {
        "input_ids": batch["input_ids"][mask],
        "cu_seqlens": torch.cat([torch.zeros(1), mask.sum(1).cumsum(0)]).int(),
        "max_seqlen": 8,
    }
    with torch.no_grad():
        torch.testing.assert_close(model(**packed).logits, logits(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("between", [False, True], ids=["after", "also before the step"])
@pytest.mark.parametrize("kind", ["fused", "data"])
def test_evaluation_in_turn_with_steps_is_never_stale(kind: str, between: bool) -> None:
    """No call of `train` or `eval`; neither way of writing raises the parameters' versions."""
    model = scramble(tiny()).eval()
    trained = [p for p in model.parameters() if p.requires_grad]
    fused = torch.optim.AdamW(trained, lr=0.05, fused=True)
    [batch] = batches(1)
    for _ in range(3):
        if between and kind == "fused":
            logits(model)
        with torch.enable_grad():
            model(**batch).loss.backward()
        if between and kind == "fused":
            logits(model)
        if kind == "fused":
            fused.step()
        else:
            for p in trained:
                p.data -= 0.5 * p.grad
        model.zero_grad()
        found = logits(model)
        with torch.enable_grad():
            exact = model(**batch).logits.detach()
        torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-5)


def test_a_move_there_and_back_drops_the_formed_weight() -> None:
    """The factors may get their old address again, with other values in it."""
    model = scramble(tiny()).eval()
    logits(model)
    layer = next(m for m in model.modules() if isinstance(m, BIMLoRALinear))
    assert layer._effective is not None
    model.double().float()
    assert layer._effective is None
    with torch.inference_mode():
        inner = scramble(tiny()).eval()  # its tensors have no versions
        [batch] = batches(1)
        inner(**batch)
