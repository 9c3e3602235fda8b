"""DoRA, LoRA+, OLoRA and swapped adapters: PEFT's numbers and files, both ways."""

from __future__ import annotations

import copy
from pathlib import Path

import peft
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from peft.utils.hotswap import hotswap_adapter as peft_hotswap
from support.peft_tiny import IDS, bert
from torch import Tensor, nn

from peft_custom import (
    DyLoraConfig,
    LoraConfig,
    PeftModel,
    get_peft_model,
    hotswap_adapter,
    iter_adapters,
)

pytestmark = pytest.mark.filterwarnings("ignore")
TARGETS = ["query", "intermediate.dense", "classifier.0"]  # (16, 16), (24, 16), a Conv1D (16, 10)


def base() -> nn.Module:
    """A tiny BERT whose head has a Conv1D of GPT-2's and is not square."""
    from transformers.pytorch_utils import Conv1D

    model = bert()
    torch.manual_seed(4)
    model.classifier = nn.Sequential(Conv1D(10, 16), nn.Linear(10, 3))
    return model


def randomised(model: nn.Module) -> nn.Module:
    torch.manual_seed(7)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_magnitude" in name:
                p *= 0.5 + torch.rand_like(p)
            elif "lora_" in name:
                p.normal_(std=0.3)
    return model.eval()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(IDS).logits


def same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


# --- DoRA ----------------------------------------------------------------------------------------
DORA = {"r": 3, "lora_alpha": 5, "target_modules": TARGETS, "use_dora": True}


def test_dora_files_both_ways(tmp_path: Path) -> None:
    theirs = randomised(peft.get_peft_model(base(), peft.LoraConfig(**DORA)))
    theirs.save_pretrained(tmp_path / "theirs")
    mine = PeftModel.from_pretrained(base(), tmp_path / "theirs")
    expected = logits(theirs)
    assert (expected - logits(base())).abs().max() > 1e-2
    same(logits(mine), expected)
    for name, layer in iter_adapters(mine):
        found = theirs.get_submodule(name).get_delta_weight("default")
        assert layer.magnitudes["default"].shape == (layer.out_features,), found.shape
    mine.save_pretrained(tmp_path / "ours")
    same(logits(peft.PeftModel.from_pretrained(base(), tmp_path / "ours").eval()), expected)
    mine.merge_adapter()
    same(logits(mine), expected)
    mine.unmerge_adapter()
    same(logits(copy.deepcopy(mine)), expected)
    same(logits(mine.merge_and_unload()), expected)


def test_dora_trains_as_in_peft(tmp_path: Path) -> None:
    """Both start from one file; the base model's own numbers at first; then five steps of AdamW."""
    start = get_peft_model(base(), LoraConfig(**DORA))
    same(logits(start.eval()), logits(base()))
    start.save_pretrained(tmp_path)
    models = [
        PeftModel.from_pretrained(base(), tmp_path, is_trainable=True),
        peft.PeftModel.from_pretrained(base(), tmp_path, is_trainable=True),
    ]
    for model in models:
        optimizer = torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad], lr=0.02, weight_decay=0.1
        )
        for step in range(5):
            torch.manual_seed(step)
            ids, labels = torch.randint(0, 40, (4, 6)), torch.randint(0, 3, (4,))
            model(input_ids=ids, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    ours, theirs = ({n.removesuffix(".weight"): p for n, p in m.named_parameters()} for m in models)
    trained = [n for n, p in ours.items() if p.requires_grad]
    assert len(trained) == 3 * 5 and sum("magnitude" in n for n in trained) == 5
    for name in trained:
        torch.testing.assert_close(ours[name], theirs[name], atol=2e-5, rtol=1e-4, msg=name)
    same(logits(models[0].eval()), logits(models[1].eval()))


def test_dora_kept_lengths_follow_every_change() -> None:
    model = randomised(get_peft_model(base(), LoraConfig(**DORA)))
    logits(model)  # n is kept now
    twin = copy.deepcopy(model)
    for changed in (model, twin):
        with torch.no_grad():
            for name, p in changed.named_parameters():
                if "lora_B" in name:
                    p.mul_(3.0)
    same(logits(model), logits(twin.train().eval()))
    assert (logits(model) - logits(randomised(twin))).abs().max() > 1e-3


def test_dora_beside_other_adapters() -> None:
    """Switched, and both active at once: the sum of what each adds."""
    model = get_peft_model(base(), LoraConfig(**DORA))
    plain = {**DORA, "use_dora": False, "r": 2}
    model.add_adapter("plain", LoraConfig(**plain))
    randomised(model)
    layer = next(layer for _, layer in iter_adapters(model))
    x = torch.randn(5, layer.in_features)
    outs = {}
    for names in (["default"], ["plain"], ["default", "plain"]):
        model.set_adapter(names)
        outs[len(names), names[0]] = layer(x)
    frozen = layer.base_layer(x)
    both = outs[1, "default"] + outs[1, "plain"] - frozen
    same(outs[2, "default"], both)
    model.merge_adapter(["plain"])
    same(layer(x), both)
    with pytest.raises(ValueError, match="cannot be combined"):
        model.base_model.add_weighted_adapter(["default", "plain"], [1.0, 1.0], "sum", "cat")


def test_dora_dropout_acts_on_the_increment_alone() -> None:
    model = randomised(get_peft_model(base(), LoraConfig(**{**DORA, "lora_dropout": 0.5})))
    layer = next(layer for _, layer in iter_adapters(model))
    x = torch.randn(5, layer.in_features)
    expected = layer(x)
    layer.train()
    draws = torch.stack([layer(x) for _ in range(4000)])
    assert draws.std(0).min() > 0
    error = draws.std(0) / 4000**0.5
    assert ((draws.mean(0) - expected).abs() < 5 * error).all()
    layer.lora_dropout["default"] = 0.0
    layer.rebind()
    same(layer(x), expected)


def test_dora_on_packed_rows_is_dora_on_padded_ones() -> None:
    from transformers_patched import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3}
    config = BertConfig(vocab_size=31, intermediate_size=20, initializer_range=0.3, **sizes)
    torch.manual_seed(0)
    options = {**DORA, "target_modules": ["query", "dense"]}
    model = randomised(get_peft_model(BertForSequenceClassification(config), LoraConfig(**options)))
    ids, mask = torch.arange(10).view(2, 5) + 4, torch.ones(2, 5, dtype=torch.long)
    mask[1, 3:] = 0
    packed = {"cu_seqlens": torch.tensor([0, 5, 8], dtype=torch.int32), "max_seqlen": 5}
    with torch.no_grad():
        same(model(ids[mask.bool()], **packed).logits, model(ids, attention_mask=mask).logits)


def test_what_dora_is_not_for() -> None:
    with pytest.raises(NotImplementedError, match="linear layers, not Embedding"):
        get_peft_model(base(), LoraConfig(**{**DORA, "target_modules": ["word_embeddings"]}))
    for config in (DyLoraConfig,):
        with pytest.raises(NotImplementedError, match="use_dora"):
            config(use_dora=True)
    with pytest.raises(NotImplementedError, match="DoRA scales the base weight"):
        LoraConfig(use_dora=True, init_lora_weights="pissa")


# --- LoRA+ ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("dora", [False, True])
def test_loraplus_groups_are_those_of_peft(dora: bool) -> None:
    options = {"r": 3, "task_type": "SEQ_CLS", "target_modules": ["query", "word_embeddings"]}
    if dora:
        options |= {"use_dora": True, "target_modules": ["query"]}
    theirs = peft.get_peft_model(bert(), peft.LoraConfig(**options))
    mine = get_peft_model(bert(), LoraConfig(**options, loraplus_lr_ratio=16))
    peer = create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16, loraplus_weight_decay=0.1
    )

    def rates(model: nn.Module, groups: list[dict]) -> dict[str, tuple[float, float]]:
        names = {id(p): n.removesuffix(".weight") for n, p in model.named_parameters()}
        pairs = [(names[id(p)], g) for g in groups for p in g["params"]]
        return {name: (round(g["lr"], 9), g["weight_decay"]) for name, g in pairs}

    found = rates(mine, mine.parameter_groups(1e-3, 0.1))
    assert found == rates(theirs, peer.param_groups)
    assert {lr for lr, _ in found.values()} >= {1e-3, 16e-3}


def test_a_ratio_is_not_written_and_must_be_above_zero(tmp_path: Path) -> None:
    model = get_peft_model(base(), LoraConfig(r=2, target_modules=TARGETS, loraplus_lr_ratio=4))
    model.save_pretrained(tmp_path)
    assert "loraplus" not in (tmp_path / "adapter_config.json").read_text()
    with pytest.raises(ValueError, match="loraplus_lr_ratio=0"):
        LoraConfig(loraplus_lr_ratio=0)


# --- OLoRA ---------------------------------------------------------------------------------------
def test_olora(tmp_path: Path) -> None:
    """PEFT's start (on nn.Linear: its Conv1D takes none), files both ways, and back to plain."""
    options = {"r": 3, "lora_alpha": 5, "target_modules": TARGETS[:2], "init_lora_weights": "olora"}
    theirs = peft.get_peft_model(base(), peft.LoraConfig(**options)).eval()
    mine = get_peft_model(base(), LoraConfig(**options)).eval()
    same(logits(mine), logits(base()))
    ours = dict(mine.named_parameters())
    for name, p in theirs.named_parameters():
        if "lora_" in name or name.endswith("base_layer.weight"):
            same(ours[name], p)
    with torch.no_grad():
        for p in (p for n, p in sorted(theirs.named_parameters()) if "lora_B" in n):
            p += 0.1 * torch.randn_like(p)
    expected = logits(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    again = PeftModel.from_pretrained(base(), tmp_path / "theirs")
    same(logits(again), expected)
    again.save_pretrained(tmp_path / "plain", convert_pissa_to_lora=True)
    same(logits(peft.PeftModel.from_pretrained(base(), tmp_path / "plain").eval()), expected)
    whole = again.unload()
    same(logits(whole), logits(base()))


def test_olora_on_conv1d() -> None:
    mine = get_peft_model(
        base(), LoraConfig(r=3, target_modules=["classifier.0"], init_lora_weights="olora")
    ).eval()
    same(logits(mine), logits(base()))
    with pytest.raises(ValueError, match="rank 11 exceeds"):
        get_peft_model(
            base(), LoraConfig(r=11, target_modules=["classifier.0"], init_lora_weights="olora")
        )


# --- swapping ------------------------------------------------------------------------------------
def test_hotswap(tmp_path: Path) -> None:
    """Equal ranks: in place, what PEFT computes; other ranks and α; other modules are refused."""
    made = {}
    for name, options in {
        "a": {"r": 3, "lora_alpha": 5},
        "b": {"r": 3, "lora_alpha": 9},
        "c": {"r": 2, "lora_alpha": 4, "rank_pattern": {"query": 4}, "use_rslora": True},
        "dora": {"use_dora": True},
        "other": {"target_modules": TARGETS[1:]},
        "head": {"r": 2, "modules_to_save": ["classifier.1"]},
    }.items():
        torch.manual_seed(len(made))
        config = LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": TARGETS, **options})
        model = get_peft_model(base(), config).eval()
        for parameter, p in model.named_parameters():
            if "lora_" in parameter:
                nn.init.normal_(p, std=0.3)
        model.save_pretrained(tmp_path / name)
        made[name] = logits(model)
    model = PeftModel.from_pretrained(base(), tmp_path / "a")
    before = {n: p.data_ptr() for n, p in model.named_parameters()}
    hotswap_adapter(model, tmp_path / "b")
    same(logits(model), made["b"])
    assert before == {n: p.data_ptr() for n, p in model.named_parameters()}
    theirs = peft.PeftModel.from_pretrained(base(), tmp_path / "a").eval()
    peft_hotswap(theirs, str(tmp_path / "b"), "default", torch_device="cpu")
    same(logits(model), logits(theirs))
    hotswap_adapter(model, tmp_path / "c")
    same(logits(model), made["c"])
    model.save_pretrained(tmp_path / "again")
    same(logits(PeftModel.from_pretrained(base(), tmp_path / "again")), made["c"])
    for wrong, said in (
        ("dora", "use_dora=True"),
        ("other", "is of other modules"),
        ("head", "in full is not the same here: .*classifier.1.weight': .3, 10"),
    ):
        with pytest.raises(ValueError, match=said):
            hotswap_adapter(model, tmp_path / wrong)
    same(logits(model), made["c"])
