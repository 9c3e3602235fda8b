"""AdaLoRA's formulas beside plain statements of them: map, regulariser, schedule, top-b, scores."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor, nn

from peft_custom import CRITERIA, AdaLoraConfig, criterion, get_peft_model
from peft_custom.tuners.adalora.allocator import RankAllocator, Schedule, top
from peft_custom.tuners.adalora.criteria import inputs
from peft_custom.tuners.adalora.functional import svd_linear, svd_update
from peft_custom.tuners.adalora.orthogonality import add_gradient, penalty
from peft_custom.tuners.adalora.triplets import Triplets


def adapter(*shapes: tuple[int, int], r: int = 3, **options: Any) -> Any:
    """Linear layers (in, out) with E, A and B at random."""
    torch.manual_seed(0)
    base = nn.ModuleList(nn.Linear(i, o) for i, o in shapes)
    config = AdaLoraConfig(
        target_modules=[str(k) for k in range(len(shapes))],
        init_r=r,
        target_r=1,
        init_lora_weights=False,
        **options,
    )
    model = get_peft_model(base, config)
    return model, Triplets(model.base_model._having("default"), "default")


# --- the map --------------------------------------------------------------------------------------
def test_worked_example_of_the_scale() -> None:
    base = nn.Sequential(nn.Linear(3, 2, bias=False))
    nn.init.zeros_(base[0].weight)
    model = get_peft_model(base, AdaLoraConfig(target_modules=["0"], init_r=2, target_r=1)).double()
    A, E, B = model.base_model.model[0].triplets("default")
    with torch.no_grad():
        A.copy_(torch.tensor([[1.0, 0, 0], [1, 1, 0]]))
        E.copy_(torch.tensor([[0.5], [2.0]]))
        B.copy_(torch.tensor([[1.0, 2], [0, 1]]))
    y = model(torch.tensor([1.0, 2, 3], dtype=torch.float64))
    np.testing.assert_allclose(y.detach(), [49.99974823, 23.99987984], rtol=1e-7)


def tensors(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    made = torch.Generator().manual_seed(1)
    shapes = {"x": (2, 3, 5), "W": (7, 5), "b": (7,), "A": (4, 5), "E": (4, 1), "B": (7, 4)}
    return {n: torch.randn(s, generator=made, dtype=dtype) for n, s in shapes.items()}


@pytest.mark.parametrize("transposed", [False, True])
def test_map_and_gradients(transposed: bool) -> None:
    t = {name: value.requires_grad_() for name, value in tensors().items()}
    mask = torch.tensor([1.0, 0, 1, 1], dtype=torch.float64)
    with torch.no_grad():
        t["E"][2] = 0.0  # its gradient must not come from z·E
    W = t["W"].T.contiguous() if transposed else t["W"]

    def ours(x: Tensor, W: Tensor, b: Tensor, A: Tensor, E: Tensor, B: Tensor) -> Tensor:
        return svd_linear(x, W, b, A, E, B, mask, 1.7, 0.0, transposed)

    x, _, b, A, E, B = t.values()
    plain = x @ t["W"].T + b + 1.7 * ((x @ A.T) * (E[:, 0] * mask)) @ B.T
    torch.testing.assert_close(ours(x, W, b, A, E, B), plain)
    W = W.detach().requires_grad_()
    assert torch.autograd.gradcheck(ours, (x, W, b, A, E, B))
    update = lambda x, A, E, B: svd_update(x, A, E, B, mask, 1.7)  # noqa: E731
    assert torch.autograd.gradcheck(update, (x, A, E, B))
    torch.testing.assert_close(update(x, A, E, B), plain - x @ t["W"].T - b)
    plain.sum().backward()
    assert E.grad is not None and E.grad[2].abs() > 0 and E.grad[1] == 0
    assert B.grad is not None and not B.grad[:, 1].any() and not A.grad[1].any()


def test_map_with_dropout_is_linear_in_what_it_keeps() -> None:
    t = {name: value.requires_grad_(name in "AEB") for name, value in tensors().items()}
    ones = torch.ones(4, dtype=torch.float64)
    args = t["W"], t["b"], t["A"], t["E"], t["B"], ones, 1.7
    means = [svd_linear(t["x"], *args, 0.25) for _ in range(4000)]
    exact = svd_linear(t["x"], *args)
    spread = torch.stack(means).std(0) / 4000**0.5
    assert ((torch.stack(means).mean(0) - exact).abs() < 5 * spread + 1e-12).all()
    torch.manual_seed(3)

    def seeded(A: Tensor, E: Tensor, B: Tensor) -> Tensor:
        torch.manual_seed(3)
        return svd_linear(t["x"], t["W"], t["b"], A, E, B, ones, 1.7, 0.25)

    assert torch.autograd.gradcheck(seeded, (t["A"], t["E"], t["B"]))


def test_bf16_base_and_autocast_keep_fp32_gradients() -> None:
    t = tensors(torch.float32)
    factors = [t[name].clone().requires_grad_() for name in "AEB"]
    exact = svd_linear(t["x"], t["W"], t["b"], *factors, torch.ones(4), 0.5)
    low = svd_linear(t["x"], t["W"].bfloat16(), t["b"].bfloat16(), *factors, torch.ones(4), 0.5)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), exact, rtol=0.05, atol=0.1)
    low.float().sum().backward()
    assert all(f.grad is not None and f.grad.dtype == torch.float32 for f in factors)
    with torch.autocast("cpu", torch.bfloat16):
        assert (
            svd_linear(t["x"], t["W"], t["b"], *factors, torch.ones(4), 0.5).dtype == torch.bfloat16
        )


@pytest.mark.parametrize("r", [1, 0])
def test_empty_and_single_components(r: int) -> None:
    A, E, B = torch.randn(r, 5), torch.randn(r, 1), torch.randn(7, r)
    factors = [f.requires_grad_() for f in (A, E, B)]
    t = tensors(torch.float32)
    y = svd_linear(t["x"], t["W"], t["b"], *factors, torch.ones(r), 2.0, 0.5)
    y.sum().backward()
    assert [f.grad.shape for f in factors] == [(r, 5), (r, 1), (7, r)]
    if r == 0:
        torch.testing.assert_close(y, t["x"] @ t["W"].T + t["b"])


# --- the regulariser ------------------------------------------------------------------------------
def looped(triplets: Triplets, weight: float) -> Tensor:
    terms = []
    for layer in triplets.layers:
        A, _, B = layer.triplets("default")
        eye = torch.eye(len(A), dtype=A.dtype)
        terms += [torch.linalg.norm(A @ A.T - eye), torch.linalg.norm(B.T @ B - eye)]
    return weight * torch.stack(terms).mean()


def test_regulariser_and_its_gradient_equal_the_loop() -> None:
    model, triplets = adapter((5, 7), (7, 5), (5, 7), (4, 4))
    model.double()
    A, _, B = triplets.layers[3].triplets("default")
    with torch.no_grad():  # one matrix at the minimum, where the norm has no gradient
        A.copy_(torch.eye(3, 4))
        B.normal_(0, 10.0)
    want = looped(triplets, 0.3)
    loss = penalty(triplets, 0.3)
    torch.testing.assert_close(loss, want)
    slopes = torch.autograd.grad(want, [p for p in triplets.parameters() if p.dim() and p.numel()],
                                 allow_unused=True)  # fmt: skip
    scratch = torch.empty(2, triplets.largest, dtype=torch.float64)
    norms = []
    for p in triplets.parameters():
        p.grad = torch.ones_like(p)
    for stack in (*triplets.A, *triplets.B):
        values, gradients = stack.gather_values(scratch[0]), stack.gather_gradients(scratch[1])
        norms.append(add_gradient(stack, 0.3 / triplets.matrices, values, gradients))
    torch.testing.assert_close(torch.cat(norms).sum() * 0.3 / 8, want)
    for p, slope in zip(triplets.parameters(), slopes, strict=True):
        expected = torch.zeros_like(p) if slope is None else torch.nan_to_num(slope)
        torch.testing.assert_close(p.grad - 1, expected)


def test_regulariser_of_the_worked_example() -> None:
    A = torch.tensor([[1.0, 0, 0], [1, 1, 0]])
    model, triplets = adapter((3, 2), r=2)
    with torch.no_grad():
        triplets.layers[0].lora_A["default"].copy_(A)
        triplets.layers[0].lora_B["default"].copy_(torch.eye(2))
    assert penalty(triplets, 1.0).item() == pytest.approx(math.sqrt(3) / 2, rel=1e-6)


# --- the schedule ---------------------------------------------------------------------------------
def test_schedules_of_the_specification() -> None:
    s = Schedule(6, 4, 12, tinit=2, tfinal=3, deltaT=2)
    assert [s.budget(t)[0] for t in range(13)] == [6, 6, 6, 5] + [4] * 9
    assert [t for t in range(13) if s.budget(t)[1]] == [4, 6, 8, 10, 11, 12]
    cola = Schedule(219, 146, 6700, tinit=800, tfinal=3500, deltaT=10)
    assert {t: cola.budget(t)[0] for t in (800, 801, 810, 1000, 2000, 3000)} == {
        800: 219, 801: 218, 810: 218, 1000: 202, 2000: 155, 3000: 146,
    }  # fmt: skip
    assert min(t for t in range(6700) if cola.budget(t)[0] == 146) == 2626
    assert min(t for t in range(6700) if cola.budget(t)[1]) == 810
    four = Schedule(438, 292, 6700, tinit=800, tfinal=3500, deltaT=10)
    assert min(t for t in range(6700) if four.budget(t)[0] == 292) == 2745


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_budgets_never_rise_and_end_at_the_target(data: Any) -> None:
    target = data.draw(st.integers(1, 300))
    initial = data.draw(st.integers(target, 900))
    total = data.draw(st.integers(1, 500))
    tinit = data.draw(st.integers(0, total - 1))
    tfinal = data.draw(st.integers(0, total - tinit - 1))
    s = Schedule(initial, target, total, tinit, tfinal, data.draw(st.integers(1, 20)))
    budgets = [s.budget(t)[0] for t in range(total + 2)]
    assert all(a >= b for a, b in zip(budgets, budgets[1:], strict=False))
    assert set(budgets[: tinit + 1]) == {initial} and budgets[total - tfinal + 1] == target
    assert not any(s.budget(t)[1] for t in range(tinit + 1))
    assert tinit <= s.last < total


def test_a_schedule_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match="tinit=6 and tfinal=4 leave none of the 10 steps"):
        Schedule(6, 4, 10, tinit=6, tfinal=4, deltaT=1)


# --- exactly the b best ---------------------------------------------------------------------------
def test_top_of_the_worked_examples() -> None:
    keep = top(torch.tensor([5.0, 1, 3, 4, 2, 6]), 4)
    assert keep.tolist() == [True, False, True, True, False, True]
    assert top(torch.ones(26), 22).tolist() == [True] * 22 + [False] * 4
    assert top(torch.ones(3), 5).all() and not top(torch.ones(3), 0).any()


def test_what_is_no_number_comes_last() -> None:
    scores = torch.tensor([torch.nan, 1.0, torch.nan, torch.inf, 0.0])
    assert top(scores, 3).tolist() == [False, True, False, True, True]
    assert top(scores, 4).tolist() == [True, True, False, True, True]


def allocator_of(criterion: str, rescore: bool) -> Any:
    """An allocator of two components, its budget one, cut after steps 6 and (finally) 7."""
    _, triplets = adapter((3, 2), r=2)
    config = AdaLoraConfig(criterion=criterion, rescore_at_end=rescore)
    made = RankAllocator(triplets, config, Schedule(2, 1, 9, 0, 2, 1))
    assert made.schedule.last == 7
    return made, triplets


def take(allocator: Any, triplets: Triplets, t: int, large: int, size: float = 9.0) -> None:
    """Step t, in which E of component `large` has the larger value and gradient."""
    for p in triplets.parameters():
        p.data.fill_(1.0)
        p.grad = torch.zeros_like(p)
    [E] = triplets.E.parameters
    E.data[large] = E.grad[large] = size
    if allocator.sees(t):
        for stack in triplets.stacks:
            allocator.observe(stack, *allocator.read(stack))
    allocator.allocate(t)


@pytest.mark.parametrize("kind", ["sensitivity", "mean"])
@pytest.mark.parametrize("rescore", [True, False])
def test_rescore_at_end_says_whether_the_last_step_counts(kind: str, rescore: bool) -> None:
    """Component 0 leads until the last step, which is 1's: its averages, or its values, are new."""
    allocator, triplets = allocator_of(kind, rescore)
    for t in range(7):
        take(allocator, triplets, t, large=0)
    take(allocator, triplets, 7, large=1, size=1e4)
    [mask] = allocator._masks()
    assert allocator.finalised and mask[:, 0].tolist() == [not rescore, rescore]


def test_final_ranks_do_not_rest_on_nan() -> None:
    """Cuts before go on without a wait; the last one says what happened, and cuts nothing."""
    allocator, triplets = allocator_of("mean", True)
    take(allocator, triplets, 6, large=0)
    triplets.E.parameters[0].data[1] = torch.nan
    allocator.allocate(6)
    with pytest.raises(ValueError, match=r"step 7 makes the ranks final, but 1 of 2 .* NaN.* 0"):
        allocator.allocate(7)
    assert not allocator.finalised and all(m.all() for m in allocator._masks())


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=40), st.integers(0, 45))
def test_top_keeps_exactly_b_and_the_first_among_equals(scores: list[int], b: int) -> None:
    keep = top(torch.tensor(scores, dtype=torch.float32), b).tolist()
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    assert {i for i, kept in enumerate(keep) if kept} == set(order[:b])


# --- scores ---------------------------------------------------------------------------------------
def test_moving_averages_of_the_worked_example() -> None:
    model, triplets = adapter((3, 2), r=2)
    model.double()
    allocator = RankAllocator(triplets, AdaLoraConfig(), Schedule(2, 1, 9, 0, 0, 1))
    want = [
        (0.015, 0.01275, 1.9125e-4),
        (0.04275, 0.034425, 1.47166875e-3),
        (0.0438375, 0.030185625, 1.3232623e-3),
    ]
    for gradient, (smoothed, variation, score) in zip([0.2, -0.4, 0.1], want, strict=True):
        for p in triplets.parameters():
            p.data.fill_(0.5)
            p.grad = torch.full_like(p, gradient)
        for stack in triplets.stacks:
            allocator.observe(stack, *allocator.read(stack))
        assert float(allocator.smoothed.mean()) == pytest.approx(smoothed, rel=1e-9)
        assert float(allocator.variation.mean()) == pytest.approx(variation, rel=1e-9)
        # S adds the score of E and the two means
        assert float(allocator.rescored()[0]) == pytest.approx(3 * score, rel=1e-7)


def test_each_moving_average_has_its_own_beta() -> None:
    """Ī ← β₁Ī + (1 − β₁)I, then Ū ← β₂Ū + (1 − β₂)|I − Ī|."""
    _, triplets = adapter((3, 2), r=2)
    config = AdaLoraConfig(beta1=0.9, beta2=0.6)
    allocator = RankAllocator(triplets, config, Schedule(2, 1, 9, 0, 0, 1))
    smoothed = variation = 0.0
    for gradient in (0.2, -0.4, 0.1):
        for p in triplets.parameters():
            p.data.fill_(0.5)
            p.grad = torch.full_like(p, gradient)
        for stack in triplets.stacks:
            allocator.observe(stack, *allocator.read(stack))
        product = abs(0.5 * gradient)
        smoothed = 0.9 * smoothed + 0.1 * product
        variation = 0.6 * variation + 0.4 * abs(product - smoothed)
        assert allocator.smoothed.tolist() == pytest.approx([smoothed] * triplets.numel)
        assert allocator.variation.tolist() == pytest.approx([variation] * triplets.numel)


RATIOS = {
    0.0: 1.3236080968, 0.5: 1.3381781232, 1.0: 1.4594609952, 2.0: 2.0895068605, 3.0: 3.0076694770,
    4.0: 4.0002429596, 5.0: 5.0000027800, 8.0: 8.0,
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_snr_of_the_absolute_value(dtype: torch.dtype) -> None:
    close = 1e-6 if dtype == torch.float32 else 1e-10
    score = CRITERIA["SNR_mean_abs"]
    for r, want in RATIOS.items():
        for scale, sign in ((1.0, 1), (1e-3, -1), (7.0, 1)):
            mu = torch.tensor([sign * r * scale], dtype=dtype)
            sigma = torch.tensor([scale], dtype=dtype)
            assert float(score(mu, sigma)) == pytest.approx(want, rel=close)
    for r in (500.0, 3000.0, 4099.0, 5000.0, 1e4, 1e8):
        value = score(torch.tensor([r], dtype=dtype), torch.ones(1, dtype=dtype))
        assert float(value) == pytest.approx(r, rel=1e-6)
    one = torch.ones(3, dtype=dtype)
    means = CRITERIA["E_mean_abs"](torch.tensor([0.0, 1.0, 3.0], dtype=dtype), one)
    np.testing.assert_allclose(means, [0.7978845608, 1.1666309412, 3.0007643086], rtol=close)


@settings(max_examples=200, deadline=None)
@given(st.floats(-40, 40), st.floats(1e-3, 1e3))
def test_folded_normal_equals_scipy(r: float, sigma: float) -> None:
    mu, std = torch.tensor([[r * sigma], [sigma]], dtype=torch.float64)
    mean = float(CRITERIA["E_mean_abs"](mu, std))
    snr = float(CRITERIA["SNR_mean_abs"](mu, std))
    folded = stats.foldnorm(abs(r), scale=sigma)
    assert mean == pytest.approx(folded.mean(), rel=1e-9)
    if abs(r) < 6:  # beyond, SciPy's variance is a difference of squares
        assert snr == pytest.approx(folded.mean() / folded.std(), rel=1e-6)
    low = CRITERIA["SNR_mean_abs"](mu.float(), std.float())
    assert float(low) == pytest.approx(snr, rel=2e-6)


def test_criteria_pooled_as_in_the_worked_example() -> None:
    model, triplets = adapter((2, 2), r=1)
    for p, values in zip(
        triplets.parameters(), ([[0.1, -0.2]], [[0.05], [0.4]], [[0.3]]), strict=True
    ):
        p.data = torch.tensor(values, dtype=torch.float64)
    want = {"SNR_mean_abs": 7.4513639463, "SNR": 6.75, "mean": 0.675, "sigma": 30.0,
            "E_mean_abs": 0.7040374184}  # fmt: skip
    for name, value in want.items():
        score = CRITERIA[name]
        scores = [
            score(**{n: v for n, v in given.items() if n in inputs(score)})
            for stack in triplets.stacks
            for mu in [torch.stack([p.data for p in stack.parameters])]
            for given in [{"mu": mu, "sigma": torch.full_like(mu, 0.1)}]
        ]
        assert float(triplets.pool(scores)) == pytest.approx(value, rel=1e-9), name


def test_pooling_equals_the_loop_for_mixed_shapes_and_ranks() -> None:
    pattern = {"1.lora_E": [False] * 3, "2.lora_E": [True, False, True]}
    model, triplets = adapter((5, 7), (7, 5), (5, 7), (4, 4), rank_pattern=pattern)
    assert triplets.ranks == [3, 0, 2, 3]
    want = []
    for layer in triplets.layers:
        A, E, B = (p.detach() for p in layer.triplets("default"))
        want += [E[k, 0] + A[k].mean() + B[:, k].mean() for k in range(len(E))]
    scores = [
        stack.gather_values(torch.empty(triplets.largest)).clone() for stack in triplets.stacks
    ]
    torch.testing.assert_close(triplets.pool(scores).detach(), torch.stack(want))
    parts = triplets.split(torch.arange(8.0))
    assert [part.shape for part in parts] == [(3, 1), (0, 1), (2, 1), (3, 1)]


def test_a_new_criterion_is_one_function() -> None:
    @criterion("only I")
    def only(smoothed: Tensor) -> Tensor:
        return smoothed

    try:
        assert AdaLoraConfig(criterion="only I").criterion == "only I"
        with pytest.raises(TypeError, match="asks for gradient; there are mu, sigma"):
            criterion("bad")(lambda gradient: gradient)
    finally:
        del CRITERIA["only I"]
    with pytest.raises(ValueError, match="criterion='only I': use one of sensitivity, SNR"):
        AdaLoraConfig(criterion="only I")
