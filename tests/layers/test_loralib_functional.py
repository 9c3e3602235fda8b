"""loralib.functional against the plain statement of each formula, in double precision mostly."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loralib import functional as lora
from loralib.dropout_masks import draw_mask, masked, scale_in_force


def dense(weight: Tensor, A: Tensor, B: Tensor, s: float, enabled: tuple, fan: bool) -> Tensor:
    """W + ΔW written out segment by segment, in (out, in) orientation."""
    W = (weight.T if fan else weight).clone()
    n, m = sum(enabled), W.shape[0] // len(enabled)
    blocks = zip(A.chunk(n), B.chunk(n), strict=True) if n else iter(())
    for j, on in enumerate(enabled):
        if on:
            A_j, B_j = next(blocks)
            W[j * m : (j + 1) * m] += s * B_j @ A_j
    return W


def tensors(fan: bool, enabled: tuple, r: int = 2, m: int = 4, dtype=torch.float64) -> list[Tensor]:
    inputs, out, n = 7, m * len(enabled), sum(enabled)
    shapes = [(3, 5, inputs), (inputs, out) if fan else (out, inputs), (out,)]
    shapes += [(r * n, inputs), (m * n, r)]
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.booleans(), min_size=1, max_size=4), st.booleans(), st.integers(1, 3),
    st.integers(1, 5), st.booleans(),
)  # fmt: skip
def test_merged_linear_is_the_dense_formula(enabled, fan, r, m, with_bias) -> None:
    torch.manual_seed(0)
    enabled = tuple(enabled)
    values = tensors(fan, enabled, r, m)
    x, weight, bias, A, B = values
    b = bias if with_bias else None
    out = lora.lora_merged_linear(x, weight, b, A, B, 0.7, enabled, fan_in_fan_out=fan)
    expected = F.linear(x, dense(weight, A, B, 0.7, enabled, fan), b)
    torch.testing.assert_close(out, expected)
    wanted = (True, True, with_bias, any(enabled), any(enabled))
    used = [v for v, on in zip(values, wanted, strict=True) if on]
    cotangent = torch.randn_like(out)
    for ours, theirs in zip(
        torch.autograd.grad(out, used, cotangent),
        torch.autograd.grad(expected, used, cotangent),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("fan", [False, True])
def test_gradcheck(fan: bool, p: float) -> None:
    def seeded(*values: Tensor) -> Tensor:
        torch.manual_seed(1)  # the same mask at every evaluation
        return lora.lora_merged_linear(*values, 0.5, (True, False, True), p, fan)

    torch.manual_seed(0)
    assert torch.autograd.gradcheck(seeded, tensors(fan, (True, False, True)))


def test_update_alone_and_its_gradients() -> None:
    torch.manual_seed(0)
    x, _, _, A, B = tensors(False, (True,))
    assert torch.autograd.gradcheck(lambda x, A, B: lora.lora_update(x, A, B, 0.3), (x, A, B))
    torch.testing.assert_close(lora.lora_update(x, A, B, 0.3), 0.3 * x @ (B @ A).T)


def test_each_gradient_only_where_wanted() -> None:
    """Every choice of what needs a gradient gives the same gradients, and None for the rest."""
    torch.manual_seed(0)
    values = tensors(False, (True, True))
    lora.lora_merged_linear(*values, 0.5, (True, True)).square().sum().backward()
    full = [v.grad for v in values]
    for wanted in itertools.product((False, True), repeat=5):
        if not any(wanted):
            continue
        fresh = [v.detach().requires_grad_(on) for v, on in zip(values, wanted, strict=True)]
        lora.lora_merged_linear(*fresh, 0.5, (True, True)).square().sum().backward()
        for got, on, expected in zip(fresh, wanted, full, strict=True):
            assert (got.grad is not None) == on
            if on:
                torch.testing.assert_close(got.grad, expected)


def test_dropout_is_one_mask_for_all_segments() -> None:
    """y = x Wᵀ + s·(K∘x)/(1-p)·ΔWᵀ with one K: recovered by replaying the generator."""
    x, weight, bias, A, B = tensors(False, (True, False, True), dtype=torch.float32)
    torch.manual_seed(5)
    out = lora.lora_merged_linear(x, weight, bias, A, B, 0.5, (True, False, True), 0.3)
    torch.manual_seed(5)
    flat = x.detach().reshape(-1, x.shape[-1])
    seen = masked(flat, draw_mask(flat, 0.3)).view_as(x) * scale_in_force(0.3, x.device)
    delta = dense(torch.zeros_like(weight), A, B, 0.5, (True, False, True), False)
    torch.testing.assert_close(out, F.linear(x, weight, bias) + F.linear(seen, delta))
    assert not torch.equal(seen, x)


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_mask_drops_with_probability_p(p: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.ones(1000, 301, dtype=dtype)
    kept = masked(x, draw_mask(x, p))
    assert set(kept.unique().tolist()) <= {0.0, 1.0}
    share = (kept == 0).double().mean().item()
    error = 4 * (p * (1 - p) / x.numel()) ** 0.5
    assert abs(share - p) <= 0.05 * min(p, 1 - p) + error
    scale = scale_in_force(p, x.device)
    assert scale == (0.0 if p == 1.0 else pytest.approx(1 / (1 - p), rel=0.06))


def test_what_is_kept_for_backward() -> None:
    """x and the frozen weight themselves, h, and the mask as bytes: no float mask, no copy of W."""
    x, weight, bias, A, B = tensors(False, (True, True), dtype=torch.float32)
    weight.requires_grad_(False)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        lora.lora_merged_linear(x, weight, None, A, B, 0.5, (True, True), 0.2)
    own = {t.data_ptr() for t in (x, weight, A, B)}
    extra = [t for t in kept if t.data_ptr() not in own]
    assert sum(t.data_ptr() == x.data_ptr() for t in kept) == 1
    assert sorted((t.numel(), t.dtype.itemsize) for t in extra) == [(15 * 4, 4), (15 * 7, 1)]


def test_second_derivative_is_refused() -> None:
    values = tensors(False, (True,))
    (gradient,) = torch.autograd.grad(
        lora.lora_linear(*values, 0.5).square().sum(), values[3], create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_types(base: torch.dtype, autocast: bool) -> None:
    """Output in the compute dtype; gradients of the fp32 factors fp32; x's gradient in x's type."""
    torch.manual_seed(0)
    x, weight, bias, A, B = tensors(True, (True, False), dtype=torch.float32)
    weight, bias = weight.detach().to(base), bias.detach().to(base)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = lora.lora_merged_linear(x, weight, bias, A, B, 0.5, (True, False), 0.0, True)
        out.float().square().sum().backward()  # inside autocast, as some loops do
    assert out.dtype == (torch.bfloat16 if autocast else base)
    assert (x.grad.dtype, A.grad.dtype, B.grad.dtype) == (torch.float32,) * 3
    exact = F.linear(x, dense(weight.float(), A, B, 0.5, (True, False), True), bias.float())
    torch.testing.assert_close(out.float(), exact, rtol=0.03, atol=0.1)
    gradients = [t.grad.clone() for t in (x, A, B)]
    exact_gradients = torch.autograd.grad(exact.square().sum(), (x, A, B))
    for got, expected in zip(gradients, exact_gradients, strict=True):
        assert (got - expected).norm() <= 0.02 * expected.norm()


def test_double_stays_double_under_autocast() -> None:
    values = tensors(False, (True,))
    with torch.autocast("cpu", torch.bfloat16):
        assert lora.lora_linear(*values, 0.5).dtype == torch.float64


def test_delta_weight_orientations() -> None:
    A, B = torch.randn(2, 7), torch.randn(5, 2)
    torch.testing.assert_close(lora.delta_weight(A, B, 0.5), 0.5 * B @ A)
    torch.testing.assert_close(lora.delta_weight(A, B, 0.5, True), (0.5 * B @ A).T)
    assert lora.delta_weight(A.bfloat16(), B.bfloat16(), 1.0).dtype == torch.float32


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(("d", "layout"), [(1, "thin"), (2, "thin"), (3, "thin"), (2, "microsoft")])
def test_convolution_is_that_with_the_summed_kernel(d: int, groups: int, layout: str) -> None:
    torch.manual_seed(0)
    conv = (F.conv1d, F.conv2d, F.conv3d)[d - 1]
    inputs, out, k, r = 4, 6, 3, 2
    f64 = {"dtype": torch.float64, "requires_grad": True}
    x, bias = torch.randn(2, inputs, *(7, 6, 5)[:d], **f64), torch.randn(out, **f64)
    weight = torch.randn(out, inputs // groups, *(k,) * d, **f64)
    if layout == "thin":
        shapes = ((r, inputs // groups * k**d), (out, r))
    else:
        shapes = ((r * k, inputs * k), (out // groups * k, r * k))
    A, B = (torch.randn(shape, **f64) for shape in shapes)
    geometry = (2, 1, 1, groups)
    ours = lora.lora_conv(x, weight, bias, A, B, 0.5, *geometry)
    expected = conv(x, weight + 0.5 * (B @ A).view_as(weight), bias, *geometry)
    torch.testing.assert_close(ours, expected)
    everything = (x, weight, bias, A, B)
    cotangent = torch.randn_like(expected)
    for got, want in zip(
        torch.autograd.grad(ours, everything, cotangent),
        torch.autograd.grad(expected, everything, cotangent),
        strict=True,
    ):
        torch.testing.assert_close(got, want)


def test_compiles_whole_and_agrees() -> None:
    def step(*values: Tensor) -> Tensor:
        return lora.lora_merged_linear(*values, 0.5, (True, False, True))

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    results = []
    for function in (step, compiled):
        torch.manual_seed(0)
        values = tensors(False, (True, False, True), dtype=torch.float32)
        out = function(*values)
        out.square().sum().backward()
        results.append([out, *(v.grad for v in values)])
    for eager, whole in zip(*results, strict=True):
        torch.testing.assert_close(eager, whole)


def test_compiles_whole_with_dropout() -> None:
    torch.manual_seed(0)
    _, weight, _, A, B = tensors(False, (True,), dtype=torch.float32)
    x = torch.ones(4000, 7, requires_grad=True)
    step = torch.compile(
        lambda x: lora.lora_linear(x, weight.detach(), None, A, B, 0.5, 0.25),
        backend="aot_eager", fullgraph=True,
    )  # fmt: skip
    update = step(x) - x @ weight.T
    assert torch.unique(update.round(decimals=3), dim=0).shape[0] > 50  # many masks
    expected = 0.5 * x @ A.T @ B.T
    torch.testing.assert_close(update.mean(0), expected.mean(0), rtol=0, atol=0.15)
    update.sum().backward()
    assert x.grad is not None


def test_checkpointed_recomputation_draws_the_same_mask() -> None:
    from torch.utils.checkpoint import checkpoint

    torch.manual_seed(0)
    values = tensors(False, (True,), dtype=torch.float32)
    gradients = []
    for wrap in (lambda f: f(), lambda f: checkpoint(f, use_reentrant=False)):
        torch.manual_seed(3)
        out = wrap(lambda: lora.lora_linear(*values, 0.5, 0.5))
        gradients.append(torch.autograd.grad(out.square().sum(), values))
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


def test_odd_shapes() -> None:
    """No tokens, one token without batch, expanded and sliced inputs."""
    x, weight, bias, A, B = (t.detach() for t in tensors(False, (True,)))
    full = F.linear(x, weight + 0.5 * B @ A, bias)
    for pick in (
        lambda t: t[:0],
        lambda t: t[0, 0],
        lambda t: t.transpose(0, 1),
        lambda t: t[:, ::2],
    ):
        torch.testing.assert_close(lora.lora_linear(pick(x), weight, bias, A, B, 0.5), pick(full))
    A.requires_grad_()
    lora.lora_linear(x[:1, :1].expand(4, 6, 7), weight, bias, A, B, 0.5).sum().backward()
    assert A.grad.shape == A.shape
