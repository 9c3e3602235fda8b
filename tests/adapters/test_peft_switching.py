"""Merging some of several adapters, bases that are none, and refusals that change nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.peft_tiny import IDS, QV, adapted, bert, two_adapters
from torch import Tensor, nn

import loralib
from peft_custom import (
    AdaLoraConfig,
    BimLoraConfig,
    DyLoraConfig,
    LoraConfig,
    PeftModel,
    get_model_status,
    get_peft_model,
    inject_adapter_in_model,
    iter_adapters,
)


# --- merging some of the active adapters ---------------------------------------------------------
class Net(nn.Module):
    """A table, a linear map and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 6)
        self.map = nn.Linear(6, 6)
        self.conv = nn.Conv2d(1, 2, 3)

    def forward(self, ids: Tensor) -> Tensor:  # (n,) -> (n, 2, 4)
        return self.conv(self.map(self.table(ids))[None, None].expand(1, 1, -1, -1))


LORA = {"r": 2, "init_lora_weights": False, "target_modules": ["table", "map", "conv"]}
KINDS: dict[str, tuple[type, dict[str, Any]]] = {
    "lora": (LoraConfig, LORA),
    "dylora": (DyLoraConfig, {**LORA, "target_modules": ["table", "map"]}),
    "adalora": (AdaLoraConfig, {"init_r": 3, "target_r": 2, "init_lora_weights": False,
                                "target_modules": ["map"]}),
    "bim": (BimLoraConfig, {"r": 2, "block_size": 2, "target_modules": ["map"],
                            "mask_init": "constant"}),
}  # fmt: skip


def two(kind: str, **first: Any) -> PeftModel:
    torch.manual_seed(0)
    config, options = KINDS[kind]
    model = get_peft_model(Net(), config(**{**options, **first}), "a")
    model.add_adapter("b", config(**options))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "bim" in name or "lora_" in name:
                p += 0.3 * torch.randn_like(p)
    return model.eval()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("merged", ["a", "b"])
def test_what_is_active_and_not_merged_goes_on_acting(kind: str, merged: str) -> None:
    model, ids = two(kind), torch.arange(9)
    other = "ab".replace(merged, "")
    with torch.no_grad():
        model.set_adapter(merged)
        alone = model(ids)
        model.set_adapter(["a", "b"])
        want = model(ids)
        assert (want - alone).abs().max() > 1e-2
        model.merge_adapter([merged])
        torch.testing.assert_close(model(ids), want, rtol=1e-4, atol=1e-5)
        model.train()
        torch.testing.assert_close(model(ids), want, rtol=1e-4, atol=1e-5)
        model.eval()
        model.merge_adapter([other])
        torch.testing.assert_close(model(ids), want, rtol=1e-4, atol=1e-5)
        model.unmerge_adapter()
        torch.testing.assert_close(model(ids), want)
        model.merge_adapter([merged])
        with pytest.warns(UserWarning, match="they are unmerged"):
            model.set_adapter(merged)
        torch.testing.assert_close(model(ids), alone)
        model.merge_adapter()
        torch.testing.assert_close(model(ids), alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("merged", ["a", "b"])
def test_beside_a_pissa_adapter_too(merged: str) -> None:
    model, ids = two("lora", target_modules=["map"], init_lora_weights="pissa"), torch.arange(9)
    model.set_adapter(["a", "b"])
    with torch.no_grad():
        want = model(ids)
        model.merge_adapter([merged])
        torch.testing.assert_close(model(ids), want, rtol=1e-4, atol=1e-5)
        model.set_adapter("b")
        alone = model(ids)
        model.merge_adapter(["b"])
        torch.testing.assert_close(model(ids), alone, rtol=1e-4, atol=1e-5)


def test_a_dylora_rank_changes_beside_a_merged_adapter() -> None:
    model, ids = two("dylora"), torch.arange(9)
    model.set_adapter(["a", "b"])
    with torch.no_grad():
        model.base_model.set_rank(1)
        want = model(ids)
        model.base_model.set_rank(2)
        model.merge_adapter(["a"])
        model.base_model.set_rank(1)
        torch.testing.assert_close(model(ids), want, rtol=1e-4, atol=1e-5)


# --- a base that is none -------------------------------------------------------------------------
OTHERS = [
    LoraConfig(**QV),
    AdaLoraConfig(target_modules=["query"]),
    BimLoraConfig(target_modules=["query"]),
    LoraConfig(target_modules=["key"]),
]


@pytest.mark.parametrize("other", OTHERS)
def test_a_base_with_adapters_is_no_fresh_base(other: Any, tmp_path) -> None:
    model = adapted()
    base = model.get_base_model()
    model.save_pretrained(tmp_path)
    want, names = model(input_ids=IDS).logits, [name for name, _ in base.named_modules()]
    for take in (
        lambda: get_peft_model(base, other),
        lambda: inject_adapter_in_model(other, base),
        lambda: PeftModel.from_pretrained(base, tmp_path),
        lambda: get_peft_model(nn.ModuleList([base]), other),
    ):
        with pytest.raises(ValueError, match=r"carries adapters already \(default; in 5 modules"):
            take()
    assert [name for name, _ in base.named_modules()] == names
    assert torch.equal(model(input_ids=IDS).logits, want)
    get_peft_model(model.unload(), LoraConfig(**QV))


def test_a_saved_head_alone_is_carried_as_well() -> None:
    model = adapted()
    model.get_base_model().bert = bert().bert
    with pytest.raises(ValueError, match="the first 'classifier'"):
        get_peft_model(model.get_base_model(), LoraConfig(**QV))


def test_loralibs_own_adapters_are_carried_until_they_are_merged() -> None:
    net = nn.ModuleDict({"own": loralib.Linear(4, 4, r=2), "plain": nn.Linear(4, 4)})
    with pytest.raises(ValueError, match=r"\(loralib's own; in 1 modules, the first 'own'\)"):
        get_peft_model(net, LoraConfig(target_modules=["plain"]))
    net["own"].merge()
    get_peft_model(net, LoraConfig(target_modules=["plain"]))


def test_a_base_whose_adapters_were_deleted_is_fresh() -> None:
    model = adapted()
    model.delete_adapter("default")
    base = model.get_base_model()
    want = bert().state_dict()
    assert base.state_dict().keys() == want.keys()
    assert all(torch.equal(v, want[k]) for k, v in base.state_dict().items())
    get_peft_model(base, LoraConfig(**QV))


# --- refusals leave everything as it was ---------------------------------------------------------
def snapshot(model: PeftModel) -> tuple[Any, ...]:
    """Everything that switching, merging and adding could touch."""
    return (
        list(model.active_adapters), list(model.peft_config), get_model_status(model),
        {name: p.requires_grad for name, p in model.named_parameters()},
        {name: t.clone() for name, t in model.state_dict().items()},
        model(input_ids=IDS).logits,
    )  # fmt: skip


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return a == b


def assert_refused(model: PeftModel, words: str, call: Any) -> None:
    before = snapshot(model)
    with pytest.raises(ValueError, match=words):
        call()
    after = snapshot(model)
    assert all(same(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("merged", [False, True])
def test_a_refused_switch_changes_nothing(merged: bool) -> None:
    model = two_adapters()
    if merged:
        model.merge_adapter()
    assert_refused(model, "only one of them", lambda: model.set_adapter(["default", "b"]))
    assert_refused(model, "no adapter 'c'", lambda: model.set_adapter(["b", "c"]))
    assert_refused(model, "no adapter 'c'", lambda: model.delete_adapter("c"))
    assert_refused(model, "no adapter 'c'", lambda: model.merge_adapter(["b", "c"]))


def test_an_adapter_named_twice_acts_once() -> None:
    model = adapted()
    want = model(input_ids=IDS).logits
    model.set_adapter(["default", "default"])
    assert torch.equal(model(input_ids=IDS).logits, want)


def test_a_refused_adapter_changes_nothing() -> None:
    model = adapted(modules_to_save=["classifier"])
    for words, options in (
        ("no module is called", {"modules_to_save": ["nowhere"]}),
        ("is adapted by default", {"target_modules": ["key"], "modules_to_save": ["query"]}),
        ("is adapted by default", {"target_modules": ["dense"], "modules_to_save": ["attention"]}),
        ("rank_pattern: 'key'", {"rank_pattern": {"key": 3}}),
    ):
        config = LoraConfig(task_type="SEQ_CLS", **{**QV, **options})
        assert_refused(model, words, lambda config=config: model.add_adapter("b", config))


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_biases_in_half_precision_are_refused_before_anything_is_wrapped(bias: str) -> None:
    net = nn.ModuleDict({"low": nn.Linear(3, 3).bfloat16(), "full": nn.Linear(3, 3)})
    names = [name for name, _ in net.named_modules()]
    with pytest.raises(ValueError, match="low.bias is torch.bfloat16"):
        get_peft_model(net, LoraConfig(target_modules=["low"], bias=bias))
    assert [name for name, _ in net.named_modules()] == names
    assert all(p.requires_grad for p in net.parameters())
    get_peft_model(net, LoraConfig(target_modules=["full"], bias="lora_only"))


def test_adding_and_deleting_leave_the_other_adapters_alone() -> None:
    model = adapted()
    model.set_adapter("default", inference_mode=True)
    model.merge_adapter()
    before = snapshot(model)
    model.add_adapter("b", LoraConfig(task_type="SEQ_CLS", **{**QV, "target_modules": ["key"]}))
    assert not any(p.requires_grad for p in model.parameters())
    assert torch.equal(model(input_ids=IDS).logits, before[-1])
    model.delete_adapter("b")
    after = snapshot(model)
    assert all(same(a, b) for a, b in zip(before, after, strict=True))


def test_deleting_a_merged_adapter_unmerges_all() -> None:
    model = adapted()
    del_options = {**QV, "target_modules": ["value", "key"], "modules_to_save": None}
    model.base_model.add_adapter("b", LoraConfig(**del_options))
    model.eval()
    model.set_adapter("b")
    with torch.no_grad():
        want = model(input_ids=IDS).logits
        model.merge_adapter(["default", "b"])
        with pytest.warns(UserWarning, match="'default' is merged; everything is unmerged"):
            model.delete_adapter("default")
        assert get_model_status(model).merged_adapters == []
        torch.testing.assert_close(model(input_ids=IDS).logits, want)


def test_deleting_one_of_two_active_adapters_keeps_the_other_as_it_was() -> None:
    model = adapted()
    model.base_model.add_adapter("b", LoraConfig(**QV))
    model.set_adapter(["default", "b"], inference_mode=True)
    model.delete_adapter("b")
    assert model.active_adapters == ["default"]
    assert not any(p.requires_grad for p in model.parameters())


def test_a_refused_merge_leaves_the_model_whole() -> None:
    model = two_adapters()
    model.set_adapter("default", inference_mode=True)
    last = [layer for _, layer in iter_adapters(model) if "b" in layer.adapters][-1]
    with torch.no_grad():
        last.factors("b")[1].fill_(float("nan"))
    batch = {"verify": {"input_ids": IDS}}
    for options in ({}, batch, {**batch, "tolerance": 0.0}):
        before = snapshot(model)
        with pytest.raises(ValueError, match=r"not finite|changes the logits by"):
            model.merge_and_unload(adapter_names=["b"], **options)
        after = snapshot(model)
        for a, b in zip(before[:4], after[:4], strict=True):
            assert same(a, b)
        assert torch.equal(before[-1], after[-1])
    with pytest.raises(ValueError, match="not finite"):
        model.merge_adapter(["default", "b"])
    assert get_model_status(model).merged_adapters == []


def test_a_refused_verification_goes_back_to_what_was_active() -> None:
    model = two_adapters()
    model.set_adapter("default", inference_mode=True)
    assert_refused(
        model, "changes the logits by",
        lambda: model.merge_and_unload(
            adapter_names=["b"], verify={"input_ids": IDS}, tolerance=-1.0
        ),
    )  # fmt: skip


@pytest.mark.parametrize("verify", [None, {"input_ids": IDS}])
def test_the_head_goes_with_the_merged_adapter(verify: Any) -> None:
    model = two_adapters()
    model.set_adapter("b")
    want = model(input_ids=IDS).logits
    model.set_adapter("default")
    plain = model.merge_and_unload(adapter_names=["b"], verify=verify)
    torch.testing.assert_close(plain(input_ids=IDS).logits, want, rtol=1e-4, atol=1e-5)


def test_a_refused_combination_changes_nothing() -> None:
    model = adapted()
    model.base_model.add_adapter("b", LoraConfig(**{**QV, "r": 2}))
    add = model.base_model.add_weighted_adapter
    for words, arguments in (
        ("needs equal ranks", (["default", "b"], [1.0, 1.0], "sum", "linear")),
        ("an adapter 'b' already", (["default", "b"], [1.0, 1.0], "b", "cat")),
        ("no adapter 'c'", (["default", "c"], [1.0, 1.0], "sum", "cat")),
        ("one weight each", (["default", "b"], [1.0], "sum", "cat")),
    ):
        assert_refused(model, words, lambda arguments=arguments: add(*arguments))


def test_a_refused_load_changes_nothing(tmp_path) -> None:
    two_adapters().save_pretrained(tmp_path)
    wide = adapted(r=8, target_modules=["key"])
    wide.save_pretrained(tmp_path / "wide")
    (tmp_path / "wide" / "adapter_config.json").write_bytes(
        (tmp_path / "b" / "adapter_config.json").read_bytes()
    )
    model = adapted()
    model.set_adapter("default", inference_mode=True)
    load = model.load_adapter
    assert_refused(model, "wrong shape", lambda: load(tmp_path / "wide", "other"))
    assert_refused(model, "does not fit", lambda: load(tmp_path / "wide", "default"))
    base = bert()
    before = {name: p.requires_grad for name, p in base.named_parameters()}
    with pytest.raises(ValueError, match="wrong shape"):
        PeftModel.from_pretrained(base, tmp_path / "wide")
    assert {name: p.requires_grad for name, p in base.named_parameters()} == before
    again = PeftModel.from_pretrained(base, tmp_path / "b")  # the base is as good as new
    model = two_adapters()
    model.set_adapter("b")
    assert torch.equal(again(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_loading_into_a_merged_adapter_unmerges_it(tmp_path) -> None:
    model = two_adapters()
    model.save_pretrained(tmp_path)
    want = model(input_ids=IDS).logits
    with torch.no_grad():
        for _, layer in iter_adapters(model):
            for p in layer.adapter_parameters("default"):
                p.add_(1.0)
    model.merge_adapter()
    with pytest.warns(UserWarning, match="what was loaded was merged"):
        model.load_adapter(tmp_path, "default")
    assert torch.equal(model(input_ids=IDS).logits, want)
