"""The block-masked map: every form equals the formula stated plainly, gradients included."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loralib.dropout_masks import masked
from peft_custom.tuners.bim_lora import functional as bim

FORMS = [
    bim.Form(fused, factored) for fused, factored in itertools.product((True, False), repeat=2)
]
UNFUSED = [form for form in FORMS if not form.fused]


def naive(x, W, c, A, B, Z, tau, s, b, transposed=False):
    """x Wᵀ + c + s·x (E(m)∘(B A))ᵀ with every matrix formed."""
    m = torch.sigmoid(Z / tau)
    wide = m[torch.arange(B.shape[0]) // b][:, torch.arange(A.shape[1]) // b]
    W = W.T if transposed else W
    return x @ W.T + c + s * x @ (wide * (B @ A)).T


def parts(out: int, into: int, r: int, b: int, n: int = 7, seed: int = 0, transposed: bool = False):
    made = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=made, dtype=torch.float64)

    W = draw(into, out) if transposed else draw(out, into)
    p, q = bim.block_counts(out, into, b)
    leaves = [draw(n, into), draw(r, into), draw(out, r), draw(p, q)]
    return W, draw(out), [t.requires_grad_() for t in leaves], draw(n, out)


def gradients(y: Tensor, g: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(y, leaves, g))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 23), st.integers(1, 23), st.integers(1, 5), st.integers(1, 9),
    st.booleans(), st.sampled_from(FORMS), st.integers(0, 2**20),
)  # fmt: skip
def test_every_form_is_the_formula(out, into, r, b, transposed, form, seed) -> None:
    """Any shape, blocks that do not divide it, and blocks larger than it."""
    W, c, leaves, g = parts(out, into, r, b, seed=seed, transposed=transposed)
    x, A, B, Z = leaves
    tau = torch.tensor(0.7, dtype=torch.float64)
    wanted = naive(x, W, c, A, B, Z, tau, 1.5, b, transposed)
    found = bim.block_masked_linear(x, W, c, A, B, Z, tau, 1.5, b, 0.0, transposed, form)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(gradients(found, g, leaves), gradients(wanted, g, leaves), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(6, 10, 2, 4), (5, 3, 2, 2), (4, 4, 3, 1)])
def test_gradcheck(form: bim.Form, shape: tuple[int, ...]) -> None:
    out, into, r, b = shape
    W, c, leaves, _ = parts(out, into, r, b, n=3)
    tau = torch.tensor(1.4, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x, A, B, Z: bim.block_masked_linear(x, W, c, A, B, Z, tau, 0.5, b, form=form), leaves
    )


@pytest.mark.parametrize("form", UNFUSED)
def test_dropout_is_on_the_increments_input_alone(form: bim.Form, monkeypatch) -> None:
    W, c, leaves, g = parts(6, 9, 2, 4)
    x, A, B, Z = leaves
    tau = torch.tensor(1.0, dtype=torch.float64)
    keep = torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) > 0.25
    monkeypatch.setattr(bim, "draw_mask", lambda x, p: keep)
    monkeypatch.setattr(bim, "scale_in_force", lambda p, device: 1.0 / 0.75)
    found = bim.block_masked_linear(x, W, c, A, B, Z, tau, 2.0, 4, 0.25, form=form)
    seen = masked(x, keep) / 0.75
    m = torch.sigmoid(Z).repeat_interleave(4, 0)[:6].repeat_interleave(4, 1)[:, :9]
    wanted = x @ W.T + c + 2.0 * seen @ (m * (B @ A)).T
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(gradients(found, g, leaves), gradients(wanted, g, leaves), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", UNFUSED)
def test_update_alone(form: bim.Form) -> None:
    _, _, leaves, g = parts(6, 9, 2, 4)
    x, A, B, Z = leaves
    tau = torch.tensor(1.0, dtype=torch.float64)
    none = torch.zeros(6, 9, dtype=torch.float64)
    found = bim.block_masked_update(x, A, B, Z, tau, 2.0, 4, form=form)
    wanted = naive(x, none, 0.0, A, B, Z, tau, 2.0, 4)
    for ours, theirs in zip(gradients(found, g, leaves), gradients(wanted, g, leaves), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", UNFUSED)
def test_bfloat16_base_keeps_the_increment(form: bim.Form) -> None:
    """An increment far below the base's spacing survives: W + ΔW is never rounded to bfloat16."""
    torch.manual_seed(0)
    x = torch.randn(40, 32).bfloat16()
    W, A, B = torch.randn(24, 32).bfloat16(), torch.randn(4, 32), 1e-3 * torch.randn(24, 4)
    Z, tau = torch.randn(3, 4), torch.tensor(1.0)
    args = (x, W, None, A, B, Z, tau, 1.0, 8)
    with torch.no_grad():
        base = (x.double() @ W.double().T).float()
        exact = naive(
            *(t.double() for t in (x, W)), 0.0, *(t.double() for t in (A, B, Z)), 1.0, 1, 8
        )
        update = bim.block_masked_update(x, A, B, Z, tau, 1.0, 8, form=form)
        assert bim.block_masked_linear(*args, form=form).dtype == torch.bfloat16
    wanted = (exact - base).float()
    assert float((update.float() - wanted).norm() / wanted.norm()) < 0.02
    assert bim.choose_form(4096, 4, 8, False).fused is False


def test_worked_example_C() -> None:
    """Masked forward and backward pass, to the printed digits."""
    f64 = {"dtype": torch.float64}
    W = torch.tensor([[1, 2, 0, 1], [-1, 0, 3, 0], [0.5, 0.5, 1, -1], [0.5, 0.5, 1, 1]], **f64)
    A = torch.tensor([[1, 2, -1, 0.5]], **f64).requires_grad_()
    B = torch.tensor([[1], [0.5], [-1], [2]], **f64).requires_grad_()
    Z = torch.tensor([[0.0, 2], [-2, 1]], **f64).requires_grad_()
    x = torch.tensor([[1, 0, -1, 2], [0.5, 1, 0, -1]], **f64).requires_grad_()
    g = torch.tensor([[1, -1, 0.5, 0], [0, 2, 1, -0.5]], **f64)
    tau = torch.tensor(0.5, **f64)
    m = bim.soft_mask(Z, tau)
    delta = bim.delta_weight(A, B, m, 2.0, 2)

    def near(found: Tensor, wanted: list) -> None:
        torch.testing.assert_close(found, torch.tensor(wanted, **f64), rtol=0, atol=6e-7)

    near(m.detach(), [[0.5, 0.982014], [0.017986, 0.880797]])
    near(delta, [[1, 2, -1.964028, 0.982014], [0.5, 1, -0.982014, 0.491007],
                 [-0.035972, -0.071945, 1.761594, -0.880797],
                 [0.071945, 0.143890, -3.523188, 1.761594]])  # fmt: skip
    assert torch.linalg.matrix_rank(delta) == 2  # of a rank-1 B A
    for form in FORMS:
        y = bim.block_masked_linear(x, W, None, A, B, Z, tau, 2.0, 2, form=form)
        near(y.detach(), [[7.928055, -1.535972, -6.059161, 8.618321],
                          [3.017986, 0.258993, 2.540866, -1.831732]])  # fmt: skip
        dA, dB, dZ, dx = torch.autograd.grad(y, [A, B, Z, x], g)
        near(dA, [[0.946041, 0.928055, -0.101217, 1.761594]])
        near(dB, [[4.928055], [-1.892083], [0.988714], [0.395433]])
        near(dZ, [[3, 0.035325], [-0.388580, 0]])
        near(dx, [[2.732014, 3.214028, -2.601217, 0.550608],
                  [-0.821945, 2.106110, 8.059161, -2.279580]])  # fmt: skip


def test_fact_2_open_and_closed_masks() -> None:
    W, c, (x, A, B, Z), _ = parts(5, 7, 2, 3)
    tau = torch.tensor(1.0, dtype=torch.float64)
    open_, shut = torch.full_like(Z, torch.inf), torch.full_like(Z, -torch.inf)
    for form in FORMS:
        y = bim.block_masked_linear(x, W, c, A, B, open_, tau, 2.0, 3, form=form)
        torch.testing.assert_close(y, x @ (W + 2.0 * B @ A).T + c, rtol=1e-12, atol=1e-12)
        y = bim.block_masked_linear(x, W, c, A, B, shut, tau, 2.0, 3, form=form)
        torch.testing.assert_close(y, x @ W.T + c, rtol=1e-12, atol=1e-12)
    assert float(torch.sigmoid(torch.tensor(17.0))) == 1.0
    assert float(torch.sigmoid(torch.tensor(37.0, dtype=torch.float64))) == 1.0


@pytest.mark.parametrize("b", [1, 3, 8])
def test_fact_3_constant_mask_is_a_scale(b: int) -> None:
    W, c, (x, A, B, Z), _ = parts(5, 7, 2, b)
    tau = torch.tensor(1.4, dtype=torch.float64)
    Z = torch.full_like(Z, 0.8)
    y = bim.block_masked_linear(x, W, c, A, B, Z, tau, 2.0, b)
    scale = 2.0 * torch.sigmoid(Z[0, 0] / tau)
    torch.testing.assert_close(y, x @ (W + scale * B @ A).T + c, rtol=1e-12, atol=1e-12)


def test_fact_8_zero_B_gives_no_gradient_to_mask_and_A() -> None:
    W, c, (x, A, B, Z), g = parts(6, 6, 2, 4)
    tau = torch.tensor(1.4, dtype=torch.float64)
    B = torch.zeros_like(B).requires_grad_()
    for form in FORMS:
        y = bim.block_masked_linear(x, W, c, A, B, Z, tau, 2.0, 4, form=form)
        dA, dB, dZ = torch.autograd.grad(y, [A, B, Z], g)
        assert not dA.any() and not dZ.any() and dB.any()


def test_nothing_of_the_weights_size_is_kept() -> None:
    torch.manual_seed(0)
    x, W = torch.randn(20, 64), torch.randn(48, 64)
    A, B = torch.randn(4, 64, requires_grad=True), torch.randn(48, 4, requires_grad=True)
    Z, tau = torch.randn(6, 8, requires_grad=True), torch.tensor(1.0)
    for form in FORMS:
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # noqa: B023
            bim.block_masked_linear(x, W, None, A, B, Z, tau, 1.0, 8, form=form)
        own = {t.data_ptr() for t in (x, W, A, B, Z, tau)}
        assert all(t.data_ptr() in own for t in kept)
