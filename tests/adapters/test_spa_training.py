"""Structured pruning through `attach` alone: masks, schedules, resuming, groups, processes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from support.bim_tiny import base, batches, logits
from support.spa_tiny import CONFIGS, PROTOTYPES, SHORT, go_on, linear, parameter, tiny, train

from peft_custom import PeftModel, SplopaConfig, attach, get_peft_model
from peft_custom.hooks import load_hooks_state, save_hooks_state

EVERY = [
    (method, structure, criterion)
    for method in ("block_prune", "splopa", "splora")
    for structure, criterion in (
        ("blocks", "topK"), ("blocks", "l0"), ("linked", "topK"), ("linked", "magnitude"),
        ("hybrid", "sigmoid_threshold"),
    )
]  # fmt: skip
each = pytest.mark.parametrize(("method", "structure", "criterion"), EVERY)


def asked(criterion: str) -> dict[str, Any]:
    soft = criterion not in ("topK", "magnitude")
    return {
        "pruning_method": criterion,
        "final_threshold": None if soft else 0.5,
        "regularization": ("l0" if criterion == "l0" else "l1") if soft else None,
        "final_lambda": 5.0 if soft else 0.0,
    }


@each
def test_masks_follow_the_schedule_and_evaluation_the_end(
    method: str, structure: str, criterion: str
) -> None:
    model = tiny(method, mask_structure=structure, **asked(criterion))
    hooks = train(model, steps=0, total=8)
    masks = model.base_model.masks["default"]
    if criterion in ("topK", "magnitude"):
        assert hooks.log() == {"density": 1.0, "threshold": 1.0}
    hooks = train(model)
    assert hooks.finished
    model.train()
    if criterion in ("topK", "magnitude"):
        assert hooks.log() == {"density": 0.5, "threshold": 0.5}
        for mask in masks:  # every matrix has its own half
            assert mask.mask.mean() == 0.5
    elif criterion == "l0":
        assert any(((m.mask > 0) & (m.mask < 1)).any() for m in masks)
    # without hooks, in training as in evaluation, at the final threshold
    out = logits(model.eval())
    hooks.remove()
    torch.testing.assert_close(logits(model.train()), out, atol=1e-5, rtol=1e-5)


def test_the_threshold_of_a_step_is_the_next_one_of_the_schedule() -> None:
    """Step t = 0 computes with τ(1); warm-up steps 2, one of them before and two times after."""
    model = tiny(warmup_steps=2)
    optimizer = torch.optim.AdamW(model.parameter_groups(1e-2, 0.0))
    hooks = attach(model, optimizer, total_steps=10)
    seen = []
    for step in range(10):
        seen.append(hooks.log()["threshold"])
        go_on(model, optimizer, step, step + 1)
    middle = [0.5 + 0.5 * (1 - (s - 2) / 4) ** 3 for s in (3, 4, 5)]
    assert seen == pytest.approx([1, 1, *middle, 0.5, 0.5, 0.5, 0.5, 0.5])


@each
def test_resuming_in_mid_schedule_is_as_if_never_stopped(
    tmp_path: Path, method: str, structure: str, criterion: str
) -> None:
    def made() -> tuple[PeftModel, torch.optim.Optimizer, Any]:
        model = tiny(method, mask_structure=structure, **asked(criterion))
        optimizer = torch.optim.AdamW(model.parameter_groups(1e-2, 0.01))
        return model, optimizer, attach(model, optimizer, total_steps=8, seed=5)

    model, optimizer, hooks = made()
    go_on(model, optimizer, 0, 5)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    save_hooks_state(tmp_path, hooks.state_dict())
    go_on(model, optimizer, 5, 8)
    again, other, more = made()
    more.load_state_dict(load_hooks_state(tmp_path))  # in any order
    again.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    go_on(again, other, 5, 8)
    whole = model.state_dict()
    assert all(torch.equal(t, whole[n]) for n, t in again.state_dict().items())
    assert hooks.log() == more.log() and torch.equal(logits(model.eval()), logits(again.eval()))


def test_the_regularisers_gradient_is_added_after_clipping() -> None:
    options = {"pruning_method": "sigmoied_threshold", "final_threshold": None}
    models = [tiny(**options), tiny(**options, regularization="l1", final_lambda=3.0)]
    moved = []
    for model in models:
        optimizer = torch.optim.SGD(model.parameter_groups(0.0, 0.0))
        hooks = attach(model, optimizer, total_steps=8)
        hooks.parts[0].threshold = 0.1  # that of the end, where λ is the final one
        go_on(model, optimizer, 0, 1)
        moved.append([m.mask_scores.detach().clone() for m in model.base_model.masks["default"]])
        assert ("sparsity" in hooks.losses()) == (model is models[1])
    matrices = len(moved[0])
    for without, with_penalty in zip(*moved, strict=True):  # the rate of scores is 0.01, S = 0
        slope = 3.0 * 0.25 / (without.numel() * matrices)
        torch.testing.assert_close(without - with_penalty, torch.full_like(without, 0.01 * slope))


def test_scores_are_clipped_with_the_others_where_their_regulariser_is() -> None:
    for options, own in (
        ({}, 0.0),
        ({"clip_regularization": True}, None),
        ({"clip_regularization": True, "mask_scores_max_grad_norm": 2.0}, 2.0),
    ):
        groups = {g["name"]: g for g in tiny(**options).parameter_groups(1e-3, 0.0)}
        assert groups["mask_scores"].get("max_grad_norm") == own


@pytest.mark.parametrize("called", [True, False], ids=["before", "after"])
def test_the_regulariser_is_clipped_where_the_loop_says_when(called: bool) -> None:
    """The originals' way: the norm is that of all gradients, λ's among them."""
    soft = {"pruning_method": "sigmoied_threshold", "final_threshold": None, "regularization": "l1"}
    model = tiny(**soft, final_lambda=300.0, clip_regularization=True)
    optimizer = torch.optim.SGD(model.parameter_groups(1.0, 0.0))
    hooks = attach(model, optimizer, total_steps=8)
    hooks.parts[0].threshold = 0.1  # that of the end
    model(**batches(1)[0]).loss.backward()
    scores = [m.mask_scores for m in model.base_model.masks["default"]]
    loss_grads = [p.grad.clone() for p in scores]
    others = [
        p for p in model.parameters() if p.grad is not None and all(p is not s for s in scores)
    ]
    other_grads = [p.grad.clone() for p in others]
    if called:
        hooks.before_clipping()
        hooks.before_clipping()  # as in a step that is repeated, with gradients made anew
        for p, g in zip(scores, loss_grads, strict=True):
            p.grad.copy_(g)
        hooks.before_clipping()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    slopes = [300.0 * 0.25 / (p.numel() * len(scores)) for p in scores]  # S = 0
    both = [g + slope for g, slope in zip(loss_grads, slopes, strict=True)]
    counted = [*other_grads, *(both if called else loss_grads)]
    assert float(norm) == pytest.approx(float(torch.cat([g.flatten() for g in counted]).norm()))
    factor = min(1.0, 1.0 / float(norm))
    for p, g, slope in zip(scores, loss_grads, slopes, strict=True):
        wanted = (g + slope) * factor if called else g * factor + slope
        torch.testing.assert_close(p.grad, wanted, atol=1e-7, rtol=1e-4)


def test_fact_22_groups_and_what_moves() -> None:
    for criterion in ("topK", "magnitude"):
        model = tiny(pruning_method=criterion)
        groups = {g["name"]: g for g in model.parameter_groups(3e-5, 0.01)}
        rates = {name: (g["lr"], g["weight_decay"]) for name, g in groups.items()}
        wanted = {"adapter": (1e-3, 0.01), "prototypes": (3e-5, 0.01), "decay": (3e-5, 0.01)}
        wanted |= {"no_decay": (3e-5, 0.0)}
        wanted |= {"mask_scores": (1e-2, 0.0)} if criterion == "topK" else {}
        assert rates == wanted
        ids = [id(p) for g in groups.values() for p in g["params"]]
        trained = {id(p) for p in model.parameters() if p.requires_grad}
        assert len(ids) == len(set(ids)) and set(ids) == trained
        before = {n: t.clone() for n, t in model.state_dict().items()}
        train(model, steps=4)
        same = {n for n, t in model.state_dict().items() if torch.equal(t, before[n])}
        frozen = {n for n in before if "base_layer" in n or "embeddings" in n}
        assert frozen <= same
        scores = {n for n in before if n.endswith("mask_scores")}
        assert scores <= same if criterion == "magnitude" else not scores & same
        assert not {n for n in before if "LayerNorm.modules_to_save" in n} & same
    assert tiny(pruning_method="l0").parameter_groups(1e-3, 0.0)[0]["lr"] == 0.1


def test_a_pruned_unit_can_come_back() -> None:
    """Its score gets a gradient although its columns are zero."""
    model = tiny("splora", mask_structure="linked")
    model.train()(**batches(1)[0]).loss.backward()
    for mask in model.base_model.masks["default"]:
        dead = mask.final == 0
        assert dead.any() and mask.mask_scores.grad[dead].all()


def test_global_ranking_shares_one_budget() -> None:
    model = tiny(global_topk=True, pruning_method="threshold", mask_init="uniform", mask_scale=1.0)
    assert model.peft_config["default"].pruning_method == "topK"
    hooks = train(model)
    masks = list(model.base_model.masks["default"])
    assert hooks.log()["density"] == 0.5
    assert len({float(m.mask.mean()) for m in masks}) > 1
    cut = torch.cat([m.mask_scores[m.mask > 0] for m in masks]).min()
    assert all((m.mask_scores[m.mask == 0] <= cut).all() for m in masks)


def test_options_that_make_no_sense_are_named() -> None:
    for options, message in (
        ({"pruning_method": "topk"}, "pruning_method='topk': use one of topK, magnitude"),
        ({"final_threshold": 1.5}, "final_threshold=1.5: from 0 to 1"),
        ({"mask_structure": "rows"}, "mask_structure='rows': use one of blocks, linked"),
        ({"mask_block_rows": 5}, "mask_block_rows=5, mask_block_cols=8 do not divide 'bert.enc"),
        ({"pruning_method": "l0", "global_topk": True}, "global_topk ranks scores"),
        ({"mask_structure": "linked", "target_modules": ["query"]}, "share their heads with bert"),
    ):
        with pytest.raises(ValueError, match=message):
            tiny(**options)
    model = tiny(warmup_steps=4)
    with pytest.raises(ValueError, match="leave none of the 8 steps to prune in"):
        train(model, steps=0, total=8)


def test_saving_and_loading(tmp_path: Path) -> None:
    for method in ("block_prune", "splopa", "splora"):
        model = tiny(method, mask_structure="hybrid")
        with pytest.warns(UserWarning, match="not its final form"):
            model.save_pretrained(tmp_path / "early")
        hooks = train(model)
        out = logits(model.eval())
        hooks.remove()
        model.save_pretrained(tmp_path / method)
        again = PeftModel.from_pretrained(base(), tmp_path / method)
        assert torch.equal(logits(again), out)
        assert again.pruning_summary() | {"trainable_parameters": 0} == (
            model.pruning_summary() | {"trainable_parameters": 0}
        )
        one = copy.deepcopy(again)
        with torch.no_grad():
            for p in again.parameters():
                p.zero_()
        assert torch.equal(logits(one), out)  # a copy's masks are its own
        with pytest.raises(ValueError, match=r"merge_and_unload\(\)"):
            one.save_pretrained(tmp_path / "lora", as_lora=True)


@pytest.mark.parametrize("method", ["block_prune", "splopa", "splora"])
@pytest.mark.parametrize("kind", ["Bert", "Roberta"])
def test_merging_and_back(method: str, kind: str) -> None:
    plain = logits(base(kind).eval())
    model = tiny(method, kind, mask_structure="linked")
    train(model).remove()
    out = logits(model.eval())
    state = {n: t.clone() for n, t in model.state_dict().items()}
    model.merge_adapter()
    torch.testing.assert_close(logits(model), out)
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    model.unmerge_adapter()
    assert torch.equal(logits(model), out)
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), out)
    layer = getattr(merged, kind.lower()).encoder.layer[0]
    dead = (layer.output.dense.weight == 0).all(0)
    assert dead.sum() == 12  # of 24 units
    assert not layer.intermediate.dense.weight[dead].any()
    assert not layer.intermediate.dense.bias[dead].any()


def test_a_changed_score_shows_in_the_next_evaluation() -> None:
    model = tiny("block_prune").eval()
    before = logits(model)
    with torch.no_grad():
        parameter(model, "layer.0.output.dense.spa.default.blocks.mask_scores").copy_(
            torch.linspace(-1, 1, 12).view(4, 3)  # of equal scores the first ones were kept
        )
    assert not torch.equal(logits(model), before)


def test_two_adapters_are_never_mixed() -> None:
    config = SplopaConfig(mask_block_rows=2, mask_block_cols=2, **PROTOTYPES)
    model = linear(config, 4, 4)
    model.add_adapter("other", config)
    one = model(torch.ones(4))
    model.set_adapter("other")
    assert not torch.equal(model(torch.ones(4)), one)
    model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="only one can be"):
        model(torch.ones(4))


@pytest.mark.parametrize("structure", ["blocks", "linked"])
@pytest.mark.parametrize("method", ["block_prune", "splopa", "splora"])
def test_low_precision(method: str, structure: str) -> None:
    """A bf16 base with fp32 adapters, and autocast around fp32: weights are formed in fp32."""
    [batch] = batches(1)
    for low in (True, False):
        config = CONFIGS[method](task_type="SEQ_CLS", mask_structure=structure, **SHORT)
        net = base().to(torch.bfloat16) if low else base()
        model = get_peft_model(net, config)
        trained = [p for p in model.parameters() if p.requires_grad]
        with torch.autocast("cpu", torch.bfloat16, enabled=not low):
            loss = model.train()(**batch).loss
        loss.backward()
        assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in trained)
        wanted = logits(model.eval())
        with torch.autocast("cpu", torch.bfloat16, enabled=not low):
            torch.testing.assert_close(logits(model).float(), wanted.float(), atol=0.02, rtol=0.05)
