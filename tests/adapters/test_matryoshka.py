"""Nested ranks that are all trained in every step: the formula, its gradient, exports, files."""

from __future__ import annotations

import copy
from pathlib import Path

import peft
import pytest
import torch
from support.peft_tiny import IDS, bert
from torch import Tensor, nn

import loralib
from peft_custom import (
    DyLoraConfig,
    PeftModel,
    attach,
    configure_dylora,
    get_peft_model,
)

R, ALPHA, MODE = 4, 3.0, {"dylora_mode": "matryoshka"}


def net(**options: object) -> nn.Module:
    """loralib's three layers, of odd shapes."""
    torch.manual_seed(0)
    made = nn.Sequential(
        loralib.DyLoRAEmbedding(13, 7, r=R, lora_alpha=ALPHA),
        loralib.DyLoRAMergedLinear(7, 15, r=R, lora_alpha=ALPHA, enable_lora=[True, False, True]),
        nn.GELU(),
        loralib.DyLoRALinear(15, 4, r=R, lora_alpha=ALPHA, fan_in_fan_out=True),
    )
    for name, p in made.named_parameters():
        if "lora_" in name:
            nn.init.normal_(p, std=0.3)
    configure_dylora(made, **MODE, **options)
    return made


def injected(**options: object) -> PeftModel:
    """A tiny BERT and a Conv1D of GPT-2's, with nested adapters that are not zero."""
    from transformers.pytorch_utils import Conv1D

    base = bert()
    torch.manual_seed(3)
    base.classifier = nn.Sequential(Conv1D(10, 16), nn.Linear(10, 3))
    targets = ["query", "value", "word_embeddings", "classifier.0"]
    config = DyLoraConfig(r=R, lora_alpha=ALPHA, target_modules=targets, **MODE, **options)
    model = get_peft_model(base, config)
    for name, p in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(p, std=0.3)
    return model


@torch.no_grad()
def out(model: nn.Module, ids: Tensor = IDS % 13) -> Tensor:
    found = model(ids)
    return getattr(found, "logits", found)


def test_the_weights_are_the_sums_of_the_scales() -> None:
    layer = loralib.DyLoRALinear(5, 3, r=R, lora_alpha=ALPHA)
    configure_dylora(layer, **MODE)
    assert layer.nested.weights.tolist() == pytest.approx([25 / 12, 13 / 12, 7 / 12, 1 / 4])
    configure_dylora(layer, **MODE, r_min=3)
    assert layer.nested.weights.tolist() == pytest.approx([7 / 12, 7 / 12, 7 / 12, 1 / 4])
    configure_dylora(layer, **MODE, train_ranks=[1, 2, 4])  # as the authors' Algorithm 1
    assert layer.nested.weights.tolist() == pytest.approx([7 / 4, 3 / 4, 1 / 4, 1 / 4])
    configure_dylora(layer)
    assert layer.nested.weights is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({**MODE, "train_ranks": [1, 2]}, "the last r=4"),
        ({**MODE, "train_ranks": [2, 1, 4]}, "rising ranks are needed"),
        ({**MODE, "train_ranks": []}, "rising ranks are needed"),
        ({**MODE, "train_ranks": [1, 4], "r_min": 2}, "the first at least r_min=2"),
        ({"train_ranks": [1, 4]}, "use it with 'matryoshka'"),
    ],
)
def test_ranks_that_cannot_be_summed(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        DyLoraConfig(r=R, **options)


def test_some_ranks_are_summed(tmp_path: Path) -> None:
    """The increment, the file, and a run with it, where the sum has the ranks 1 and 4 alone."""
    model = injected(train_ranks=[1, R]).eval()
    layer = next(m for n, m in model.named_modules() if n.endswith("query"))
    A, B = (p["default"].weight for p in (layer.lora_A, layer.lora_B))
    whole = ALPHA * (B[:, :1] @ A[:1] + B @ A / R)
    torch.testing.assert_close(layer.get_delta_weight("default"), whole)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(model).unload(), tmp_path)
    assert again.peft_config["default"].train_ranks == [1, R]
    torch.testing.assert_close(out(again), out(model), atol=0, rtol=0)
    for made in (model, net(train_ranks=[1, R])):
        optimizer = torch.optim.SGD([p for p in made.parameters() if p.requires_grad], lr=0.1)
        attach(made, optimizer, total_steps=1)
        steps(made, optimizer, range(1))


def test_a_step_trains_the_sum_of_all_ranks() -> None:
    """Value and gradients beside Σ_b of ordinary layers at rank b, on a (5, 3) layer."""
    torch.manual_seed(0)
    layer = loralib.DyLoRALinear(5, 3, r=R, lora_alpha=ALPHA)
    nn.init.normal_(layer.lora_B)
    configure_dylora(layer, **MODE, r_min=2)
    x = torch.randn(6, 5, requires_grad=True)
    A, B = (p.detach().clone().requires_grad_() for p in (layer.lora_A, layer.lora_B))
    twin = x.detach().clone().requires_grad_()
    expected = twin @ layer.weight.T + layer.bias
    for b in (2, 3, 4):
        expected = expected + (ALPHA / b) * (twin @ A[:b].T) @ B[:, :b].T
    found = layer(x)
    torch.testing.assert_close(found, expected)
    weight = torch.randn(6, 3)
    (found * weight).sum().backward()
    (expected * weight).sum().backward()
    for mine, theirs in ((layer.lora_A, A), (layer.lora_B, B), (x, twin)):
        torch.testing.assert_close(mine.grad, theirs.grad)


@pytest.mark.parametrize("make", [net, injected])
def test_every_rank_is_a_plain_adapter(make, tmp_path: Path) -> None:
    """What PEFT, or a plain loralib model, computes at rank b; stacked and merged too."""
    model = make().eval()
    at = {}
    for b in range(1, R + 1):
        loralib.set_rank(model, b)
        at[b] = out(model)
        if make is injected:
            model.save_pretrained(tmp_path / str(b), rank=b)
            base = copy.deepcopy(model).unload()
            theirs = peft.PeftModel.from_pretrained(base, tmp_path / str(b)).eval()
            torch.testing.assert_close(out(theirs), at[b], atol=1e-5, rtol=1e-5)
            continue
        state = loralib.lora_state_dict(model, rank=b)
        kinds = (
            loralib.Embedding(13, 7, r=b, lora_alpha=ALPHA),
            *(
                kind(*sizes, r=b, lora_alpha=ALPHA, **more)
                for kind, sizes, more in (
                    (loralib.MergedLinear, (7, 15), {"enable_lora": [True, False, True]}),
                    (loralib.Linear, (15, 4), {"fan_in_fan_out": True}),
                )
            ),
        )
        plain = nn.Sequential(kinds[0], kinds[1], nn.GELU(), kinds[2]).eval()
        base = {k: v for k, v in model.state_dict().items() if "lora_" not in k}
        plain.load_state_dict({**base, **state})
        torch.testing.assert_close(out(plain), at[b], atol=1e-5, rtol=1e-5)
    assert len({round(float(v.sum()), 4) for v in at.values()}) == R
    with loralib.batched_ranks(model, [1, R, 2]):
        stacked = out(model, (IDS % 13).repeat(3, 1)).chunk(3)
    for mine, b in zip(stacked, (1, R, 2), strict=True):
        torch.testing.assert_close(mine, at[b], atol=1e-5, rtol=1e-5)
    if make is injected:
        model.set_rank(2)
        torch.testing.assert_close(out(model.merge_and_unload()), at[2], atol=1e-5, rtol=1e-5)


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, which: range) -> None:
    for step in which:
        made = torch.Generator().manual_seed(step)
        found = model.train()(torch.randint(0, 13, (6, 5), generator=made))
        getattr(found, "logits", found).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("make", [net, injected])
def test_resumed_it_is_the_whole_run(make) -> None:
    """Every component moves in every step, and nothing is drawn."""

    def begun() -> tuple[nn.Module, torch.optim.Optimizer, object]:
        model = make()
        groups = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(groups, lr=0.01)
        return model, optimizer, attach(model, optimizer, total_steps=4)

    model, optimizer, hooks = begun()
    before = copy.deepcopy(model.state_dict())
    steps(model, optimizer, range(2))
    for name, value in model.state_dict().items():
        looked_up = "embedding" in name or name.startswith("0.")  # not every id occurs
        if "lora_" in name and not looked_up:
            assert (value != before[name]).all(), name
    assert hooks.log()["rank"] == R and loralib.get_rank(model) == R
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), hooks.state_dict()))
    steps(model, optimizer, range(2, 4))
    again, other, more = begun()
    again.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    more.load_state_dict(saved[2])
    steps(again, other, range(2, 4))
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_the_mode_is_in_the_file(tmp_path: Path) -> None:
    model = injected().eval()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(model).unload(), tmp_path)
    again.set_rank(2)
    model.set_rank(2)
    torch.testing.assert_close(out(again), out(model))


def test_refusals() -> None:
    with pytest.raises(ValueError, match="draws no ranks"):
        DyLoraConfig(**MODE, dylora_dist="geometric(0.2)")
    with pytest.raises(ValueError, match="'normal', 'frozen' or 'matryoshka'"):
        DyLoraConfig(dylora_mode="sum")
