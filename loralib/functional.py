"""The low-rank map itself: y = x Wᵀ + b + s·(drop(x) Aᵀ) Bᵀ, for W frozen and of any float type.

    A (r, in)   B (out, r)   s = alpha / r   ΔW = s·B A        (Hu et al. 2021, eq. 3)

This is the one place with that arithmetic; layers, tuners and models call it. A method with a map
of its own keeps it beside its layer and shares `compute_dtype`, `without_autocast` and
`input_gradient`. Common rules, of those maps too:

* The *compute dtype* is autocast's where autocast is on for the device, else the weight's. x is
  cast to it and y has it. A and B are fp32 parameters, cast for the products; their gradients are
  fp32.
* ΔW is never formed in a forward pass where the two thin products do; nothing is computed or kept
  for a frozen W, nor for an x that needs no gradient; x is kept once, a dropout mask as bytes.
* `p` is the dropout probability of this call, so callers pass 0.0 in evaluation.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .dropout_masks import draw_mask, masked, scale_in_force


class ActiveRank(NamedTuple):
    """Which of R nested components (DyLoRA) act in a pass, and which of these get a gradient.

    Attributes:
        first_trained: i; components i … b - 1 (counted from 0) get a gradient, those below i act as
            constants.
        rank: b, from 1 to R; components from b on do not act.
    """

    first_trained: int
    rank: int


# s: one number, or one per component (r,), fp32 on the device of x, without a gradient.
Scaling = float | Tensor


def compute_dtype(x: Tensor, weight: Tensor | None = None) -> torch.dtype:
    """The type the map is computed in: autocast's, else the weight's (x's where there is none)."""
    own = x.dtype if weight is None else weight.dtype
    # Autocast leaves float64 alone, and so do these maps.
    if own != torch.float64 and torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return own


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager:
    """Disables autocast inside `backward`: the operands' dtypes are already chosen."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()


class _LowRankLinear(torch.autograd.Function):
    """x Wᵀ + b, and into each enabled segment of its columns the low-rank update of that segment.

    N tokens; n enabled segments of m columns, segment j starting at column c_j. A holds the n
    blocks A_j (r, in) one above the other, B the n blocks B_j (m, r). With one dropout mask K of
    zeros and ones for all segments, t = s / (1 - p), and [c_j] for the columns c_j … c_j + m:

        h = t·(K ∘ x) Aᵀ                                        (N, n r)   one product for all A_j
        y = x Wᵀ + b;   y[:, c_j] += h_j B_jᵀ                   (N, out)   written into the slice

    Given g = ∂L/∂y, the chain rule along y ← h ← x says

        ∂L/∂B_j = g[:, c_j]ᵀ h_j                                (m, r)
        d_j     = t·g[:, c_j] B_j        (= ∂L/∂h, times t)     (N, r)
        ∂L/∂A   = dᵀ (K ∘ x)                                    (n r, in)
        ∂L/∂x   = g W + K ∘ (d A)                               (N, in)    into one buffer

    s may be a vector (r,), a scale for every component (`Scaling`); h's columns have it.

    With an active rank (i, b) of nested factors (DyLoRA), A_j[:b] and B_j[:, :b] take the place of
    A_j and B_j: the other columns of h and d are 0, and so are the gradients' rows outside i … b.
    The products keep the shapes of rank r, so that every b uses the same compiled kernels.

    Kept for backward: x, h and the bytes of K. W is looked up, never copied. Without W (None) the
    update alone is computed; ∂L/∂W and ∂L/∂b are formed only for those who unfreeze them.
    """

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        scaling: Scaling,
        p: float,
        starts: tuple[int, ...],
        fan_in_fan_out: bool,
        active: ActiveRank | None,
    ) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])  # (N, in)
        r, m = B.shape[1], B.shape[0] // len(starts)
        mask, t = None, scaling
        if p > 0.0:
            mask, t = draw_mask(tokens, p), scaling * scale_in_force(p, x.device)
        seen = tokens if mask is None else masked(tokens, mask)  # K ∘ x, (N, in)
        h = _scaled(seen @ A.to(x.dtype).T, t)  # (N, n r)
        if active is not None and active.rank < r:
            h.unflatten(1, (-1, r))[..., active.rank :] = 0
        if weight is None:
            out = h @ B.to(x.dtype).T  # (N, out)
        else:
            W = weight.to(x.dtype)
            b = None if bias is None else bias.to(x.dtype)
            out = F.linear(tokens, W.T if fan_in_fan_out else W, b)  # (N, out)
            for j, start in enumerate(starts):
                B_j = B[j * m : (j + 1) * m].to(x.dtype)  # (m, r)
                out[:, start : start + m].addmm_(h[:, j * r : (j + 1) * r], B_j.T)
        ctx.save_for_backward(x, weight, bias, A, B, h, mask)
        ctx.t, ctx.starts, ctx.fan_in_fan_out, ctx.active = t, starts, fan_in_fan_out, active
        return out.view(*x.shape[:-1], out.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, A, B, h, mask = ctx.saved_tensors
        need_x, need_weight, need_bias, need_A, need_B = ctx.needs_input_grad[:5]
        starts, r, m = ctx.starts, B.shape[1], B.shape[0] // len(ctx.starts)
        i, b = (0, r) if ctx.active is None else ctx.active
        dx = dW = db = dA = dB = None
        with without_autocast(x):
            tokens, g = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
            parts = [g[:, start : start + m] for start in starts]  # n of (N, m)
            if need_B:
                dB = torch.empty_like(B)
                for j, g_j in enumerate(parts):
                    # hᵀ g rather than gᵀ h: on a CPU several times faster
                    dB[j * m : (j + 1) * m] = (h[:, j * r : (j + 1) * r].T @ g_j).T
                if i:
                    dB[:, :i] = 0
            if need_A or need_x:
                B_low = B.to(x.dtype)
                # n of (N, r)
                products = [g_j @ B_low[j * m : (j + 1) * m] for j, g_j in enumerate(parts)]
                d = products[0] if len(starts) == 1 else torch.cat(products, dim=1)  # (N, n r)
                d = _scaled(d, ctx.t)
                if b < r:
                    d.unflatten(1, (-1, r))[..., b:] = 0
            if need_A:
                dA = (d.T @ (tokens if mask is None else masked(tokens, mask))).to(A.dtype)
                if i:
                    dA.unflatten(0, (-1, r))[:, :i] = 0
            if need_x:
                dx = input_gradient(g, d, weight, A.to(x.dtype), mask, ctx.fan_in_fan_out)
                dx = dx.view(x.shape)
            if need_weight:
                dW = (tokens.T @ g if ctx.fan_in_fan_out else g.T @ tokens).to(weight.dtype)
            if need_bias:
                db = g.sum(0).to(bias.dtype)
        return dx, dW, db, dA, dB, *(None,) * 5


def _scaled(h: Tensor, t: Scaling) -> Tensor:
    """h (N, n r) times t, in place."""
    if isinstance(t, Tensor):
        h.unflatten(1, (-1, len(t))).mul_(t)
        return h
    return h.mul_(t)


def truncate(A: Tensor, B: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """A_j[:b] and B_j[:, :b] of all n segments: (n b, in) and (m n, b), of A (n R, in), B (m n, R).

    Views, except that A's rows are gathered where there are several segments and b < R.
    """
    R = B.shape[1]
    if b == R:
        return A, B
    return A.unflatten(0, (-1, R))[:, :b].flatten(0, 1), B[:, :b]


def input_gradient(
    g: Tensor, d: Tensor, weight: Tensor | None, A: Tensor, mask: Tensor | None, transposed: bool
) -> Tensor:
    """∂L/∂x = g W + K ∘ (d A), (N, in), into one buffer where K is None; see `_LowRankLinear`.

    Args:
        g: ∂L/∂y, (N, out).
        d: ∂L/∂(x Aᵀ), (N, r), scaled.
        weight: W as stored, or None: the second term alone.
        A: (r, in), in the dtype of g.
        mask: K, the dropout mask (N, in), or None.
        transposed: W is stored (in, out).
    """
    if weight is None:
        return d @ A if mask is None else masked(d @ A, mask)
    W = weight.to(g.dtype)
    dx = g @ (W.T if transposed else W)
    return dx.addmm_(d, A) if mask is None else dx.add_(masked(d @ A, mask))


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: Scaling,
    p: float = 0.0,
    fan_in_fan_out: bool = False,
    active: ActiveRank | None = None,
) -> Tensor:
    """x Wᵀ + b + s·(drop(x) Aᵀ) Bᵀ.

    Args:
        x: (..., in).
        weight: W (out, in), or (in, out) with `fan_in_fan_out`. Usually frozen.
        bias: b (out,) or None.
        A, B: (r, in) and (out, r).
        scaling: s, or one for every component (r,).
        p: dropout probability (0 in evaluation), on the low-rank branch's input only.
        fan_in_fan_out: whether the weight is stored transposed, as GPT-2's Conv1D does.
        active: (i, b) of nested factors: A[:b] and B[:, :b] act, components from i on get
            gradients; None: all act, and all get gradients.

    Returns:
        (..., out) in the compute dtype.
    """
    x = x.to(compute_dtype(x, weight))
    return _LowRankLinear.apply(x, weight, bias, A, B, scaling, p, (0,), fan_in_fan_out, active)


def lora_update(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    scaling: Scaling,
    p: float = 0.0,
    active: ActiveRank | None = None,
) -> Tensor:
    """s·(drop(x) Aᵀ) Bᵀ alone, (..., out): the update of a base layer that computes for itself."""
    x = x.to(compute_dtype(x))
    return _LowRankLinear.apply(x, None, None, A, B, scaling, p, (0,), False, active)


def lora_merged_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: Scaling,
    enabled: Sequence[bool],
    p: float = 0.0,
    fan_in_fan_out: bool = False,
    active: ActiveRank | None = None,
) -> Tensor:
    """A linear layer whose output is several (q, k, v), some of them with an update of their own.

    y = x Wᵀ + b, and y's j-th enabled segment += s·(drop(x) A_jᵀ) B_jᵀ, one dropout mask for all.

    Args:
        x: (..., in).
        weight: W (out, in), or (in, out) with `fan_in_fan_out`.
        bias: b (out,) or None.
        A: (r·n, in), the A_j (r, in) of the n enabled segments one above the other.
        B: (m·n, r), the B_j (m, r) likewise, m = out / len(enabled).
        scaling: s.
        enabled: for each segment of the output whether it has an update.
        p: dropout probability (0 in evaluation).
        fan_in_fan_out: whether the weight is stored transposed.
        active: as in `lora_linear`, of every A_j and B_j.

    Returns:
        (..., out) in the compute dtype.
    """
    n = sum(enabled)
    if n == 0:
        x = x.to(compute_dtype(x, weight))
        return F.linear(x, weight.T if fan_in_fan_out else weight, bias)
    m = B.shape[0] // n
    starts = tuple(j * m for j, on in enumerate(enabled) if on)
    x = x.to(compute_dtype(x, weight))
    return _LowRankLinear.apply(x, weight, bias, A, B, scaling, p, starts, fan_in_fan_out, active)


def lora_batched_ranks(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: float,
    rank_scales: Tensor,
    enabled: Sequence[bool] = (True,),
    fan_in_fan_out: bool = False,
) -> Tensor:
    """`lora_merged_linear` without dropout, where every row of x has a rank of its own.

    y = x Wᵀ + b, and y's j-th enabled segment += s·((x A_jᵀ) ∘ c) B_jᵀ with c = `rank_scales`: a
    row at rank b has c = 1/b for its b components and 0 for the rest. So rows of several ranks are
    one batch: the products are those of one rank, whatever c is.

    Args:
        x: (..., in), N rows in all.
        weight, bias, A, B, scaling, enabled, fan_in_fan_out: as in `lora_merged_linear`; without a
            weight the update of a single segment alone is computed.
        rank_scales: c, (N, R) fp32.

    Returns:
        (..., out) in the compute dtype.
    """
    x = x.to(compute_dtype(x, weight))
    rows, R, n = x.reshape(-1, x.shape[-1]), B.shape[1], sum(enabled)
    m = B.shape[0] // n
    h = (rows @ A.to(x.dtype).T).unflatten(1, (n, R))  # (N, n, R)
    h = h.mul_(rank_scales[:, None])  # kept in fp32, so that 1/3 is not rounded to bf16 first
    low = B.to(x.dtype)  # (m n, R)
    if weight is None:
        out = (h[:, 0] @ low.T) * scaling
        return out.view(*x.shape[:-1], out.shape[-1])
    W, b = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    out = F.linear(rows, W.T if fan_in_fan_out else W, b)  # (N, out)
    starts = [j * m for j, on in enumerate(enabled) if on]
    for j, start in enumerate(starts):
        out[:, start : start + m].addmm_(h[:, j], low[j * m : (j + 1) * m].T, alpha=scaling)
    return out.view(*x.shape[:-1], out.shape[-1])


def lora_embedding(
    ids: Tensor,
    A: Tensor,
    B: Tensor,
    scaling: Scaling,
    *,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    active: ActiveRank | None = None,
    rank_scales: Tensor | None = None,
) -> Tensor:
    """s·Aᵀ[ids] Bᵀ, (..., dim): what a table's rows gain. A (r, num), B (dim, r).

    `active` is as in `lora_linear`, `rank_scales` as in `lora_batched_ranks` (a row for every id).
    The other keyword arguments are those of the base table's lookup; they act on the lookup in Aᵀ.
    There is no `sparse`: torch has no sparse gradient for A, whose columns are what is looked up.
    """
    found = F.embedding(ids, A.T, padding_idx, max_norm, norm_type, scale_grad_by_freq)  # (..., r)
    if rank_scales is not None:
        found = found * rank_scales.view(found.shape)
    if isinstance(scaling, Tensor):
        found, scaling = found * scaling, 1.0
    if active is None:
        return (found @ B.T) * scaling
    i, b = active
    out = found[..., i:b] @ B[:, i:b].T  # (..., dim)
    if i:  # these act, but as constants
        out = out + found[..., :i].detach() @ B[:, :i].detach().T
    return out * scaling


_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def lora_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: float,
    stride: Sequence[int] | int = 1,
    padding: Sequence[int] | int | str = 0,
    dilation: Sequence[int] | int = 1,
    groups: int = 1,
    p: float = 0.0,
) -> Tensor:
    """Convolution with the kernel W + s·(B A), B A reshaped to W's shape (out, in/groups, k, …).

    Where A is (r, in/groups·k^d) and B (out, r) the update is two thin convolutions: x to r
    channels per group with A as kernel, then 1 × 1 with B. Microsoft's factors, A (r·k, in·k) and
    B (out/groups·k, r·k), have no such form (their product, read as a kernel, has a rank of up to
    r·k²), so there the kernel is formed: its cost does not grow with the image.

    Args:
        x: (batch, in, *size) or (in, *size), already padded where `padding` cannot say how.
        weight, bias: of the base convolution; the number of kernel dimensions d is 1, 2 or 3.
        A, B, scaling: factors of either shape above, and s.
        stride, padding, dilation, groups: of the base convolution.
        p: dropout probability (0 in evaluation), on the update's input only.

    Returns:
        The base convolution's output, updated, in the compute dtype.
    """
    conv = _CONVOLUTIONS[weight.dim() - 2]
    dtype = compute_dtype(x, weight)
    x, W = x.to(dtype), weight.to(dtype)
    b = None if bias is None else bias.to(dtype)
    geometry = (stride, padding, dilation, groups)
    thin = A.shape[1] == math.prod(weight.shape[1:]) and B.shape[0] == weight.shape[0]
    if thin:
        out = conv(x, W, b, *geometry)
        ones = (1,) * (weight.dim() - 2)
        # one copy of A per group: (groups r, in/groups, k, …)
        kernel = A.to(dtype).view(-1, *weight.shape[1:]).repeat(groups, *(1,) * (weight.dim() - 1))
        h = conv(_dropped(x, p), kernel, None, *geometry)  # (batch, groups r, …)
        up = (B * scaling).to(dtype).view(*B.shape, *ones)  # (out, r, 1, …)
        return out + conv(h, up, None, 1, 0, 1, groups)
    delta = (B @ A).mul(scaling).view(weight.shape)  # (out, in/groups, k, …)
    if p == 0.0 and dtype == weight.dtype and dtype in (torch.float32, torch.float64):
        return conv(x, W + delta.to(dtype), b, *geometry)  # one convolution instead of two
    return conv(x, W, b, *geometry) + conv(_dropped(x, p), delta.to(dtype), None, *geometry)


def _dropped(x: Tensor, p: float) -> Tensor:
    return F.dropout(x, p) if p > 0.0 else x


@torch.no_grad()
def delta_weight(A: Tensor, B: Tensor, scaling: float, fan_in_fan_out: bool = False) -> Tensor:
    """ΔW = s·B A in at least fp32: (out, in), or (in, out) as stored with `fan_in_fan_out`."""
    dtype = torch.promote_types(A.dtype, torch.float32)
    A, B = A.to(dtype), B.to(dtype)
    with without_autocast(A):
        return (A.T @ B.T if fan_in_fan_out else B @ A).mul_(scaling)
