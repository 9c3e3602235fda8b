"""The three-factor map of AdaLoRA: y = x Wᵀ + b + s·((drop(x) Aᵀ) ∘ e) Bᵀ,  e = E ∘ m.

    A (r, in)   E (r, 1)   B (out, r)   m (r,) a mask   ΔW = s·B diag(e) A

(Zhang et al. 2023, eq. 3, with P = B, Λ = diag(E) and Q = A.)

The rules of `loralib.functional` hold: W frozen and of any float type, A, E and B fp32 parameters
that are cast for the products, gradients in fp32, x kept once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from loralib.dropout_masks import draw_mask, masked, scale_in_force
from loralib.functional import compute_dtype, input_gradient, without_autocast


class _SvdLinear(torch.autograd.Function):
    """x Wᵀ + b + s·((drop(x) Aᵀ) ∘ e) Bᵀ.

    N tokens, K the dropout mask, t = s / (1 - p), e = E ∘ m as a row:

        z = (K ∘ x) Aᵀ                       (N, r)
        y = x Wᵀ + b + t·(z ∘ e) Bᵀ          (N, out)

    Given g = ∂L/∂y, the one product M = gᵀ z (out, r) serves two factors, so that E's gradient
    costs nothing that grows with N:

        ∂L/∂B = t·M ∘ e                      (out, r)
        ∂L/∂E = t·m ∘ Σ_out (B ∘ M)          (r,)
        d     = t·(g B) ∘ e                  (N, r)
        ∂L/∂A = dᵀ (K ∘ x)                   (r, in)
        ∂L/∂x = g W + K ∘ (d A)              (N, in)

    z is kept rather than z ∘ e: E starts at zero and a pruned e stays there, and z cannot be got
    back from a zero. Without W (None) the update alone is computed.
    """

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        A: Tensor,
        E: Tensor,
        B: Tensor,
        mask: Tensor,
        scaling: float,
        p: float,
        fan_in_fan_out: bool,
    ) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])  # (N, in)
        K, t = None, scaling
        if p > 0.0:
            K, t = draw_mask(tokens, p), scaling * scale_in_force(p, x.device)
        e = (E.view(-1) * mask).to(x.dtype)  # (r,)
        z = (tokens if K is None else masked(tokens, K)) @ A.to(x.dtype).T  # (N, r)
        B_low = B.to(x.dtype).T  # (r, out)
        if weight is None:
            out = (z * (e * t)) @ B_low  # (N, out)
        else:
            W = weight.to(x.dtype)
            b = None if bias is None else bias.to(x.dtype)
            out = F.linear(tokens, W.T if fan_in_fan_out else W, b)  # (N, out)
            out.addmm_(z * e, B_low, alpha=t)
        ctx.save_for_backward(x, weight, bias, A, B, z, e, mask, K)
        ctx.t, ctx.fan_in_fan_out = t, fan_in_fan_out
        return out.view(*x.shape[:-1], out.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, A, B, z, e, mask, K = ctx.saved_tensors
        need_x, need_weight, need_bias, need_A, need_E, need_B = ctx.needs_input_grad[:6]
        dx = dW = db = dA = dE = dB = None
        with without_autocast(x):
            tokens, g = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
            te = e * ctx.t  # (r,)
            if need_B or need_E:
                M = (g.T @ z).to(B.dtype)  # (out, r)
                if need_E:
                    dE = ((B * M).sum(0) * mask).mul_(ctx.t).view(-1, 1)
                if need_B:
                    dB = M.mul_(te)
            if need_A or need_x:
                d = (g @ B.to(x.dtype)).mul_(te)  # (N, r)
            if need_A:
                dA = (d.T @ (tokens if K is None else masked(tokens, K))).to(A.dtype)
            if need_x:
                dx = input_gradient(g, d, weight, A.to(x.dtype), K, ctx.fan_in_fan_out)
                dx = dx.view(x.shape)
            if need_weight:
                dW = (tokens.T @ g if ctx.fan_in_fan_out else g.T @ tokens).to(weight.dtype)
            if need_bias:
                db = g.sum(0).to(bias.dtype)
        return dx, dW, db, dA, dE, dB, None, None, None, None


def svd_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    E: Tensor,
    B: Tensor,
    mask: Tensor,
    scaling: float,
    p: float = 0.0,
    fan_in_fan_out: bool = False,
) -> Tensor:
    """x Wᵀ + b + s·((drop(x) Aᵀ) ∘ E ∘ m) Bᵀ.

    Args:
        x: (..., in).
        weight: W (out, in), or (in, out) with `fan_in_fan_out`. Usually frozen.
        bias: b (out,) or None.
        A, E, B: (r, in), (r, 1) and (out, r).
        mask: m (r,), ones and zeros: a component at 0 neither acts nor gets a gradient.
        scaling: s.
        p: dropout probability (0 in evaluation), on the low-rank branch's input only.
        fan_in_fan_out: whether the weight is stored transposed, as GPT-2's Conv1D does.

    Returns:
        (..., out) in the compute dtype.
    """
    x = x.to(compute_dtype(x, weight))
    return _SvdLinear.apply(x, weight, bias, A, E, B, mask, scaling, p, fan_in_fan_out)


def svd_update(
    x: Tensor, A: Tensor, E: Tensor, B: Tensor, mask: Tensor, scaling: float, p: float = 0.0
) -> Tensor:
    """s·((drop(x) Aᵀ) ∘ E ∘ m) Bᵀ alone: the update of a base layer that computes for itself."""
    x = x.to(compute_dtype(x))
    return _SvdLinear.apply(x, None, None, A, E, B, mask, scaling, p, False)
