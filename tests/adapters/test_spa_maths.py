"""Structured pruning against the formulas: criteria, schedules, penalties, increments, counts."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.spa_tiny import linear, parameter
from torch import nn

from peft_custom import (
    BlockPruneConfig,
    SplopaConfig,
    SploraConfig,
    SpparaConfig,
    get_peft_model,
)
from peft_custom.tuners.spa import criteria, regularise
from peft_custom.tuners.spa.functional import apply_blocks, masked_mixture, mixture
from peft_custom.tuners.spa.schedule import Cubic

S10 = [0.5, -1, 2, 0.1, 0, -0.3, 1.5, 0.7, -2, 0.05]


# --- criteria ------------------------------------------------------------------------------------


def kept(scores: list[float], tau: float, compat: bool = False) -> set[int]:
    S = torch.tensor([scores])
    mask = criteria.keep_largest(S, criteria.count_to_keep(tau, len(scores), compat))
    return set(mask[0].nonzero()[:, 0].tolist())


def test_example_c_top_k() -> None:
    assert kept(S10, 0.5) == {0, 2, 3, 6, 7}
    assert kept(S10, 0.35) == {2, 6, 7}
    assert kept(S10, 0.29) == {2, 6}
    assert kept(S10, 0.05, compat=True) == set() and kept(S10, 0.05) == {2}  # the floor


def test_fact_9_how_many_are_kept() -> None:
    for n, tau, count in [(576, 0.3, 172), (2304, 0.3, 691), (576, 1.0, 576), (144, 0.5, 72)]:
        assert criteria.count_to_keep(tau, n) == criteria.count_to_keep(tau, n, True) == count
    # binary fractions: 0.29·100 and 0.57·100 lie below 29 and 57
    for tau, whole in ((0.29, 29), (0.57, 57)):
        assert criteria.count_to_keep(tau, 100) == whole
        assert criteria.count_to_keep(tau, 100, compat=True) == whole - 1


def test_fact_10_soft_threshold_and_floor() -> None:
    assert criteria.logit(0.1) == pytest.approx(-2.197225, abs=1e-6)
    S = torch.tensor([[-2.19, -2.2, 0.0]])
    assert criteria.above(S, criteria.logit(0.1)).tolist() == [[1.0, 0.0, 1.0]]
    for n, few in ((576, 3), (2304, 12)):
        low = torch.full((2, n), -9.0)  # all below, all equal: the first ones stay
        low[1, -few:] = -8.0
        mask = criteria.above(low, 0.0)
        assert mask.sum(1).tolist() == [few, few]
        assert mask[0, :few].all() and mask[1, -few:].all()


@given(st.lists(st.sampled_from([-1.0, 0.0, 0.5, 2.0]), min_size=1, max_size=40), st.data())
@settings(max_examples=60, deadline=None)
def test_ties_fall_to_the_first(scores: list[float], data: st.DataObject) -> None:
    k = data.draw(st.integers(0, len(scores)))
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    mask = criteria.keep_largest(torch.tensor([scores]), k)[0]
    assert set(mask.nonzero()[:, 0].tolist()) == set(order[:k])


def test_example_c_magnitude() -> None:
    model = linear(
        BlockPruneConfig(
            pruning_method="magnitude", mask_block_rows=2, mask_block_cols=2, final_threshold=0.5
        ),
        4, 4,
    )  # fmt: skip
    W = [[1, -1, 5, 0], [1, 1, 0, 0], [0, 0, 2, 2], [0, 0.1, 2, -2]]
    with torch.no_grad():
        parameter(model, "increment.weight").copy_(torch.tensor(W))
    [mask] = model.base_model.masks["default"]
    torch.testing.assert_close(mask.magnitude(), torch.tensor([[1.0, 1.25], [0.025, 2.0]]))
    model.eval()(torch.ones(1, 4))
    assert mask.final.tolist() == [[0, 1], [0, 1]]


def test_fact_12_gates() -> None:
    S = torch.tensor([2.197, 0.0, -5.0])
    expected = torch.tensor([0.979976, 0.5, 0.0])
    torch.testing.assert_close(criteria.gates(S), expected, atol=1e-6, rtol=0)
    beta = 2 / 3
    for value, open_share in ((2.197, 0.978024), (0.0, 0.831822)):
        one = torch.tensor([[value]])
        assert regularise.penalty([one], "l0", beta) == pytest.approx(open_share, abs=1e-6)
        u = torch.rand(1_000_000, generator=torch.Generator().manual_seed(1))
        drawn = criteria.gates(torch.full_like(u, value), beta, u)
        assert (drawn > 0).double().mean() == pytest.approx(open_share, abs=1e-3)


def test_the_gates_slope_is_their_derivative() -> None:
    S = torch.linspace(-4, 4, 41, dtype=torch.float64, requires_grad=True)
    u = torch.rand(41, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for beta, uniform in ((1.0, None), (0.4, u)):
        gate = criteria.gates(S, beta, uniform)
        [slope] = torch.autograd.grad(gate.sum(), S)
        torch.testing.assert_close(criteria.gate_slope(gate.detach(), beta), slope)


@pytest.mark.parametrize("kind", ["l0", "l1"])
def test_the_penaltys_gradient_is_its_derivative(kind: str) -> None:
    """Every matrix counts the same, whatever its size."""
    torch.manual_seed(0)
    stacks = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 5), (2, 7))]
    value = 1.7 * regularise.penalty(stacks, kind, 0.5)
    mine = regularise.gradients([S.detach() for S in stacks], kind, 0.5, 1.7)
    for S, gradient in zip(torch.autograd.grad(value, stacks), mine, strict=True):
        torch.testing.assert_close(gradient, S)
    if kind == "l1":
        means = [torch.sigmoid(row).mean() for S in stacks for row in S]
        torch.testing.assert_close(value, 1.7 * torch.stack(means).mean())


# --- schedule ------------------------------------------------------------------------------------


def test_facts_13_and_14() -> None:
    cubic = Cubic.of(100, 10, 1, 2)
    for step, tau in {
        1: 1.0, 10: 1.0, 11: 0.96197697, 40: 0.26793003, 55: 0.14099854, 70: 0.10262391,
        80: 0.1, 81: 0.1, 100: 0.1,
    }.items():  # fmt: skip
        assert cubic.value(step, 1.0, 0.1) == pytest.approx(tau, abs=1e-8), step
    assert [s for s in range(101) if cubic.ended(s)] == list(range(80, 101))
    long = Cubic.of(55_330, 5400, 1, 2)
    for step, tau in {5400: 1.0, 15_000: 0.51532528, 24_965: 0.25625, 44_530: 0.15}.items():
        assert long.value(step, 1.0, 0.15) == pytest.approx(tau, abs=1e-8)
    for step, tau in {15_000: 0.05702056, 24_965: 0.0875}.items():
        assert long.value(step, 0.0, 0.1) == pytest.approx(tau, abs=1e-8)
    with pytest.raises(ValueError, match="warmup_steps=34: 1 times"):
        Cubic.of(100, 34, 1, 2)


# --- increments ----------------------------------------------------------------------------------


def test_fact_7_the_product_is_the_sum_of_kronecker_products() -> None:
    torch.manual_seed(0)
    B, C, R = torch.randn(4, 3, 2), torch.randn(4, 5, 2), torch.randn(4, 2, 6)
    P = C @ R
    delta = mixture(B, P)
    wanted = sum(torch.kron(B[k].contiguous(), P[k].contiguous()) for k in range(4))
    torch.testing.assert_close(delta, wanted)
    one = mixture(B[:1], P[:1])[5:10, 6:12]
    assert torch.linalg.matrix_rank(one) <= 2


@pytest.mark.parametrize("least", [0.0, 0.1], ids=["some blocks", "all blocks"])
@pytest.mark.parametrize("transposed", [False, True])
def test_the_masked_mixture_and_its_gradients(transposed: bool, least: float) -> None:
    """Against autograd through the formula, all blocks' masks included."""
    torch.manual_seed(0)
    fp64 = {"dtype": torch.float64}
    W = torch.randn(12, 15, **fp64).T if transposed else torch.randn(15, 12, **fp64)
    B, P = torch.randn(4, 3, 2, **fp64), torch.randn(4, 5, 6, **fp64)
    M = torch.tensor([[1.0, 0.0], [0.3, 1.0], [0.0, 1.0]], **fp64).clamp(min=least)
    B, P, M = (t.requires_grad_() for t in (B, P, M))
    plain = apply_blocks(W + mixture(B, P), M)
    fused = masked_mixture(W, B, P, M)
    torch.testing.assert_close(fused, plain)
    G = torch.randn(15, 12, **fp64)
    wanted = torch.autograd.grad(plain, (B, P, M), G)
    for found, gradient in zip(torch.autograd.grad(fused, (B, P, M), G), wanted, strict=True):
        torch.testing.assert_close(found, gradient)


def example_b(**options: Any) -> nn.Module:
    config = SplopaConfig(
        num_prototypes=2, mask_block_rows=2, mask_block_cols=2, final_threshold=0.5, **options
    )
    model = linear(config, 4, 4)
    values = {
        "position_weights": [[[1.0, 0], [2, -1]], [[0, 1], [1, 1]]],
        "prototype_cols": [[[1.0], [2]], [[0], [1]]],
        "prototype_rows": [[[1.0, -1]], [[3, 1]]],
        "mask_scores": [[0.3, -0.2], [-0.1, 0.4]],
    }
    with torch.no_grad():
        for name, value in values.items():
            parameter(model, name).copy_(torch.tensor(value))
    return model


def test_example_b() -> None:
    """ΔW, the masked output, and the gradient that reaches pruned blocks' scores (fact 11)."""
    model = example_b()
    delta = torch.tensor([[1.0, -1, 0, 0], [2, -2, 3, 1], [2, -2, -1, 1], [7, -3, 1, 3]])
    layer = model.base_model.model[0]
    assert torch.equal(layer.get_delta_weight("default"), delta)
    for mode in (True, False):  # not attached: the final masks in training as well
        assert model.train(mode)(torch.ones(4)).tolist() == [1, 9, 21, 33]
    model.train()(torch.ones(4)).sum().backward()
    assert parameter(model, "mask_scores").grad.tolist() == [[10, 22], [46, 54]]
    B = parameter(model, "position_weights").grad  # Σ of P_k on the kept blocks alone
    assert B.tolist() == [[[0, 0], [0, 0]], [[4, 0], [0, 4]]]
    counts = model.pruning_summary()
    assert counts["adapter_kept"] == 12 and counts["task_parameters"] == 16
    assert counts["mask_bits"] == 4 and counts["encoder_kept"] == 8 + 4


def test_fact_8_masked_blocks_are_zero_whatever_the_increment() -> None:
    model = example_b()
    with torch.no_grad():
        parameter(model, "position_weights").add_(100.0)
        parameter(model, "mask_scores").copy_(torch.tensor([[-1.0, 1], [1, -1]]))
    merged = model.merge_and_unload()[0].weight
    assert not merged[:2, :2].any() and not merged[2:, 2:].any() and merged[:2, 2:].all()


def test_fine_pruned_weights_get_gradients_where_they_are_kept() -> None:
    config = BlockPruneConfig(mask_block_rows=2, mask_block_cols=2, final_threshold=0.5)
    model = linear(config, 4, 4)
    with torch.no_grad():
        parameter(model, "mask_scores").copy_(torch.tensor([[0.3, -0.2], [-0.1, 0.4]]))
    model(torch.ones(4)).sum().backward()
    E = torch.block_diag(torch.ones(2, 2), torch.ones(2, 2))
    assert torch.equal(parameter(model, "increment.weight").grad, E)
    assert parameter(model, "mask_scores").grad.all()  # Σ W over each block
    assert parameter(model, "mask_scores").grad[0, 1] == 2 + 3 + 6 + 7


def trainable(model: nn.Module) -> int:
    """Numbers that train, scores apart."""
    named = model.named_parameters()
    return sum(p.numel() for n, p in named if p.requires_grad and "mask_scores" not in n)


def test_facts_1_4_and_example_a() -> None:
    model = linear(SploraConfig(r=8), 768, 3072)
    assert trainable(model) == 33_792
    assert parameter(model, "cols").abs().max() <= 1e-4
    assert 0.99 / math.sqrt(8 * 768) < parameter(model, "rows").abs().max() <= 0.012758
    assert SploraConfig(r=0.25).rank(3072) == 768 and SploraConfig(r=1.0).rank(3072) == 1

    small = linear(SploraConfig(r=1), 3, 2)
    layer = small.base_model.model[0]
    values = {"cols": [[1.0], [2]], "rows": [[1.0, 0, -1]], "default.bias": [0.5, -0.5]}
    with torch.no_grad():
        layer.base_layer.weight.copy_(torch.tensor([[1.0, 2, 3], [4, 5, 6]]))
        for name, value in values.items():
            parameter(small, name).copy_(torch.tensor(value))
        parameter(small, "mask_scores").copy_(torch.tensor([-1.0, 1.0]))
    small.peft_config["default"].final_threshold = 1.0
    x = torch.tensor([1.0, 2, 3])
    assert small(x).tolist() == small.eval()(x).tolist() == [12.5, 27.5]
    with torch.no_grad():
        assert small(x).tolist() == [12.5, 27.5]
    assert small.pruning_summary(0.5)["adapter_kept"] == 1 * (3 + 1)  # one of two rows is left
    assert small.pruning_summary(0.5)["task_parameters"] == 1 * (3 + 1) + 1


def test_fact_2_convolutions() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(64, 128, 3, padding=1)
    model = get_peft_model(nn.Sequential(conv), SploraConfig(r=8, target_modules=["0"]))
    assert trainable(model) == 8 * (64 + 128) + 128
    delta = model.base_model.model[0].get_delta_weight("default")
    around = delta.clone()
    around[:, :, 1, 1] = 0
    assert not around.any() and delta[:, :, 1, 1].all()
    other = nn.Sequential(nn.Conv2d(64, 128, 3))
    other = get_peft_model(other, SpparaConfig(target_modules=["0"]))
    assert trainable(other) == 8320
    with pytest.raises(ValueError, match=r"adapters of type SPPARA go into Conv1d, 2d and 3d"):
        linear(SpparaConfig(), 4, 4)


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv1d(4, 6, 3, stride=2),
        nn.Conv2d(4, 6, (3, 5), padding=2, dilation=2, groups=2),
        nn.Conv3d(4, 6, 3, padding="same", padding_mode="circular"),
    ],
    ids=["1d", "2d", "3d"],
)
@pytest.mark.parametrize("config", [SploraConfig, SpparaConfig])
def test_convolutions_equal_a_kernel_with_the_increment_at_its_centre(
    conv: nn.Module, config: type
) -> None:
    torch.manual_seed(1)
    options = {"r": 2} if config is SploraConfig else {}
    asked = config(target_modules=["0"], init_range=0.5, final_threshold=0.5, **options)
    model = get_peft_model(nn.Sequential(conv), asked)
    with torch.no_grad():
        parameter(model, "mask_scores").copy_(torch.tensor([1.0, -1, 1, 1, -1, -1]))
    x = torch.randn(2, 4, *(7 for _ in conv.kernel_size))
    kernel = conv.weight + model.base_model.model[0].get_delta_weight("default")
    dead = torch.tensor([1, 4, 5])
    wanted = conv._conv_forward(x, kernel, conv.bias)
    wanted[:, dead] = 0
    torch.testing.assert_close(model.train()(x), wanted)
    torch.testing.assert_close(model.eval()(x), wanted)
    torch.testing.assert_close(model.merge_and_unload()(x), wanted)


def test_facts_5_and_6_prototypes() -> None:
    model = linear(SplopaConfig(prototype_rank=2), 768, 768)
    assert trainable(model) == 45_824
    assert parameter(model, "position_weights").shape == (64, 24, 24)
    assert parameter(model, "position_weights").abs().max() <= 1 / 24
    assert parameter(model, "prototype_rows").abs().max() <= 0.125
    assert parameter(model, "prototype_cols").abs().max() <= 1e-4
    assert model.base_model.model[0].get_delta_weight("default").abs().max() < 1e-4
    nets = [nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)) for _ in range(2)]
    one, two = (get_peft_model(n, SplopaConfig(target_modules=["0", "1"])) for n in nets)
    assert trainable(one) == 4_736
    shared = {p.data_ptr() for p in one.parameters()} & {p.data_ptr() for p in two.parameters()}
    assert not shared
    apart = SplopaConfig(target_modules=["0", "1"], share_prototypes=False)
    assert trainable(
        get_peft_model(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), apart)
    ) == (4_736 + 64 * 64)


# --- counts --------------------------------------------------------------------------------------


def encoder(hidden: int, layers: int, **options: Any) -> nn.Module:
    """A BERT for answers of that size with adapters, its weights never written."""
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        model = transformers.BertForQuestionAnswering(
            transformers.BertConfig(
                vocab_size=50, hidden_size=hidden, num_hidden_layers=layers,
                num_attention_heads=12, intermediate_size=4 * hidden,
            )
        )  # fmt: skip
    config = SplopaConfig(task_type="QUESTION_ANS", prototype_rank=2, **options)
    return get_peft_model(model.to_empty(device="cpu"), config)


def test_facts_15_17_21_and_28_bert_base() -> None:
    model = encoder(768, 12, share_prototypes=False)
    before = {n: p.data_ptr() for n, p in model.named_parameters()}
    scores = {n: p.clone() for n, p in model.named_parameters() if n.endswith("mask_scores")}
    for tau, kept, learned in (
        (0.3, 25_555_968, 2_179_584),
        (0.1, 8_573_952, 1_118_208),
        (0.03, 2_651_136, 748_032),
    ):
        counts = model.pruning_summary(tau)
        assert counts["encoder_weights"] == 85_054_464 and counts["mask_bits"] == 82_944
        assert (counts["encoder_kept"], counts["adapter_kept"]) == (kept, learned)
    assert counts["trainable_parameters"] == 6_102_530
    head_and_biases = 1_538 + 82_944 + 36_864
    assert counts["task_parameters"] == 748_032 + head_and_biases
    assert {n: p.data_ptr() for n, p in model.named_parameters()} == before
    for name, p in model.named_parameters():
        assert name not in scores or torch.equal(p, scores[name])


@pytest.mark.parametrize(
    ("tau", "kept", "shared", "unshared"),
    [(0.5, 5_338_368, 339_968, 626_688), (0.3, 3_200_256, 206_336, 493_056),
     (0.1, 1_074_432, 73_472, 360_192)],
)  # fmt: skip
def test_addendum_26_minilm(tau: float, kept: int, shared: int, unshared: int) -> None:
    for share, learned in ((True, shared), (False, unshared)):
        counts = encoder(384, 6, share_prototypes=share).pruning_summary(tau)
        assert counts["encoder_weights"] == 10_646_784 and counts["mask_bits"] == 10_368
        assert (counts["encoder_kept"], counts["adapter_kept"]) == (kept, learned)


def test_fact_17_shared_prototypes_count_once() -> None:
    model = encoder(768, 2)
    counts = model.pruning_summary(1.0)
    assert counts["adapter_kept"] == 884_736 + 2 * 4_096  # rank 2
    assert counts["encoder_kept"] == counts["encoder_weights"]


def test_linked_units_are_counted_with_their_biases() -> None:
    counts = encoder(384, 6, mask_structure="linked").pruning_summary(0.5)
    per_layer = 4 * 384 * 192 + 3 * 192 + 384 + 2 * 384 * 768 + 768 + 384 + 4 * 384
    assert counts["encoder_kept"] == 6 * per_layer
    assert counts["mask_bits"] == 6 * (12 + 1536)


def test_fact_16_counting_touches_nothing() -> None:
    model = example_b()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    found = [model.pruning_summary(tau) for tau in (0.5, 0.25, None, 0.5)]
    assert found[0] == found[2] == found[3] != found[1]
    after = model.state_dict()
    assert all(torch.equal(t, after[n]) for n, t in before.items())
