"""The block-masked low-rank map: y = x Wᵀ + c + s·drop(x) (E(m) ∘ B A)ᵀ, m = σ(Z/τ).

    A (r, in)   B (out, r)   Z, m (p, q)   blocks of b × b, p = ⌈out/b⌉, q = ⌈in/b⌉

E(m) repeats m[o, j] over rows o·b … o·b+b-1 and columns j·b … j·b+b-1; blocks at the edges are cut
off where the matrix ends. W is frozen and of any float type; A, B and Z are fp32 parameters.

Two ways to the same numbers, D = in·out, N tokens:

* *dense*: the product B A, seen as [p, b, q, b], times m. With G = gᵀ drop(x), g = ∂L/∂y:

      ∂L/∂B = s (G∘E(m)) Aᵀ    ∂L/∂A = s Bᵀ (G∘E(m))    ∂L/∂m[o, j] = s Σ_block (G ∘ B A)

* *factored*, never anything of size D: A_j the columns of block j, B_o the rows of block o,

      U_j = drop(x)_j A_jᵀ   V = m U   y_o += s V_o B_oᵀ                    (q, N, r), (p, N, r)
      dV_o = s g_o B_o   dU = mᵀ dV
      ∂L/∂B_o = s g_oᵀ V_o   ∂L/∂A_j = dU_jᵀ drop(x)_j   ∂L/∂m = dV Uᵀ   ∂L/∂x_j += dU_j A_j

and ∂L/∂Z = ∂L/∂m · m(1 - m)/τ. Without dropout and in fp32 or wider, y and ∂L/∂x come from
one product with W + s·E(m)∘(B A) instead (*fused*). Whatever the way, backward is given x, the
parameters and the bytes of the dropout mask, and recomputes the rest; nothing of size D is kept.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from loralib.dropout_masks import draw_mask, masked, scale_in_force
from loralib.functional import compute_dtype, without_autocast


class Form(NamedTuple):
    """How a product is computed: `fused` for y and ∂L/∂x, `factored` for the rest."""

    fused: bool
    factored: bool


def block_counts(out_features: int, in_features: int, block: int) -> tuple[int, int]:
    """(p, q): blocks that cover the rows, blocks that cover the columns."""
    return -(-out_features // block), -(-in_features // block)


def soft_mask(Z: Tensor, temperature: Tensor | float) -> Tensor:
    """m = σ(Z/τ), (p, q)."""
    return torch.sigmoid(Z / temperature)


def expand(m: Tensor, out_features: int, in_features: int, block: int) -> Tensor:
    """E(m), (out, in): every entry over its block."""
    rows = m.repeat_interleave(block, 0)[:out_features]  # (out, q)
    return rows.repeat_interleave(block, 1)[:, :in_features]


def choose_form(tokens: int, r: int, block: int, can_fuse: bool) -> Form:
    """The cheapest exact form.

    Beside the base's products the factored form costs 8·N·r·D/b² operations and several passes
    over N·r/b values per feature, the dense one 2·N·D (the gradient G) and several passes over D.
    """
    factored = block * block >= 8 * r
    return Form(can_fuse and (tokens >= 384 or not factored), factored)


def _padded(t: Tensor, rows: int, columns: int) -> Tensor:
    """`t` with zeros below and to the right; itself where it has that size."""
    missing = (0, columns - t.shape[1], 0, rows - t.shape[0])
    return F.pad(t, missing) if any(missing) else t


def _masked_product(left: Tensor, right: Tensor, m: Tensor, block: int) -> Tensor:
    """(left right) ∘ E(m): left (rows, r), right (r, columns), m over the blocks; new, contiguous
    or a corner of a contiguous tensor."""
    rows, columns = left.shape[0], right.shape[1]
    p, q = m.shape
    # Padded to whole blocks, (p·b, q·b), so that a view can scale block by block.
    product = _padded(left, p * block, left.shape[1]) @ _padded(right, right.shape[0], q * block)
    product.view(p, block, q, block).mul_(m[:, None, :, None])
    return product[:rows, :columns]


def _increment(A: Tensor, B: Tensor, m: Tensor, block: int, transposed: bool) -> Tensor:
    """E(m)∘(B A) as stored: (out, in), or (in, out)."""
    if transposed:
        return _masked_product(A.T, B.T, m.T, block)
    return _masked_product(B, A, m, block)


@torch.no_grad()
def delta_weight(
    A: Tensor, B: Tensor, m: Tensor, scaling: float, block: int, fan_in_fan_out: bool = False
) -> Tensor:
    """ΔW = s·E(m)∘(B A) in at least fp32: (out, in), or (in, out) as stored."""
    dtype = torch.promote_types(A.dtype, torch.float32)
    with without_autocast(A):
        delta = _increment(A.to(dtype), B.to(dtype), m.to(dtype), block, fan_in_fan_out)
        return delta.mul_(scaling)


def effective_weight(
    weight: Tensor, A: Tensor, B: Tensor, m: Tensor, scaling: float, block: int, transposed: bool
) -> Tensor:
    """W + s·E(m)∘(B A), as stored; in W's dtype, which must be fp32 or wider."""
    dtype = weight.dtype
    m = m.to(dtype) * scaling
    delta = _increment(A.to(dtype), B.to(dtype), m, block, transposed)
    return delta.add_(weight)


class _Blocks:
    """The factors cut into blocks, in a compute dtype: A_j (q, b, r) and B_o (p, b, r)."""

    def __init__(self, A: Tensor, B: Tensor, m: Tensor, block: int, dtype: torch.dtype) -> None:
        (self.p, self.q), self.block, self.r = m.shape, block, A.shape[0]
        self.m = m.to(dtype)
        wide_A = _padded(A.to(dtype), self.r, self.q * block)  # (r, q·b)
        tall_B = _padded(B.to(dtype), self.p * block, self.r)  # (p·b, r)
        self.A = wide_A.view(self.r, self.q, block).permute(1, 2, 0)  # (q, b, r)
        self.B = tall_B.view(self.p, block, self.r)  # (p, b, r)

    def cut(self, t: Tensor, count: int) -> Tensor:
        """(N, features) as (count, N, b); copied once, as batched products would for each use."""
        t = _padded(t, t.shape[0], count * self.block)
        return t.view(t.shape[0], count, self.block).transpose(0, 1).contiguous()

    def mix(self, m: Tensor, t: Tensor) -> Tensor:
        """m (a, c) times t (c, N, r) over blocks: (a, N, r)."""
        return (m @ t.reshape(t.shape[0], -1)).view(m.shape[0], *t.shape[1:])


def _add_blocks(out: Tensor | None, left: Tensor, right: Tensor, features: int) -> Tensor:
    """out + the blocks left (count, N, r) times right (count, r, b), side by side: (N, features).

    Into `out` itself, through a view where no block is cut off; None counts as zero.
    """
    (count, n, _), block = left.shape, right.shape[-1]
    if out is not None and features == count * block:
        out.view(n, count, block).transpose(0, 1).baddbmm_(left, right)
        return out
    joined = torch.bmm(left, right).transpose(0, 1).reshape(n, count * block)[:, :features]
    return joined if out is None else out.add_(joined)


class _BlockMaskedLinear(torch.autograd.Function):
    """The map and its gradient by `form`; see the head of this file."""

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        Z: Tensor,
        temperature: Tensor,
        scaling: float,
        block: int,
        p: float,
        transposed: bool,
        form: Form,
    ) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])  # (N, in)
        m = soft_mask(Z, temperature)  # (p, q)
        keep, t = None, scaling
        if p > 0.0:
            keep, t = draw_mask(tokens, p), scaling * scale_in_force(p, x.device)
        if form.fused:
            W = effective_weight(weight, A, B, m, t, block, transposed)
            out = F.linear(tokens, W.T if transposed else W, bias)  # (N, out)
        else:
            seen, out = tokens if keep is None else masked(tokens, keep), None
            if weight is not None:
                W = weight.to(x.dtype)
                b = None if bias is None else bias.to(x.dtype)
                out = F.linear(tokens, W.T if transposed else W, b)
            out = _add_update(out, seen, A, B, m * t, block, form)
        ctx.save_for_backward(x, weight, bias, A, B, Z, temperature, keep)
        ctx.scaling, ctx.t, ctx.block = scaling, t, block
        ctx.transposed, ctx.form = transposed, form
        return out.view(*x.shape[:-1], out.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, A, B, Z, temperature, keep = ctx.saved_tensors
        need_x, need_weight, need_bias, *need_parameters = ctx.needs_input_grad[:6]
        dx = dW = db = dA = dB = dZ = None
        with without_autocast(x):
            tokens, g = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
            seen = tokens if keep is None else masked(tokens, keep)
            m = soft_mask(Z, temperature)
            if need_x:
                W = weight
                if ctx.form.fused:
                    W = effective_weight(W, A, B, m, ctx.t, ctx.block, ctx.transposed)
                if W is not None:
                    W = W.to(g.dtype)
                    dx = g @ (W.T if ctx.transposed else W)  # (N, in)
            back = need_x and not ctx.form.fused
            if back or any(need_parameters):
                find = _factored_gradients if ctx.form.factored else _dense_gradients
                into = dx if keep is None else None  # what passes the dropout is masked by itself
                dA, dB, dm, update = find(seen, g, A, B, m, ctx.t, ctx.block, back, into)
                dZ = dm.mul_(m).mul_(1.0 - m).div_(temperature)
                if back:
                    update = update if keep is None else masked(update, keep)
                    dx = update if dx is None or dx is update else dx.add_(update)
            if need_x:
                dx = dx.view(x.shape)
            if need_weight:
                dW = (tokens.T @ g if ctx.transposed else g.T @ tokens).to(weight.dtype)
            if need_bias:
                db = g.sum(0).to(bias.dtype)
        return dx, dW, db, dA, dB, dZ, None, None, None, None, None, None


def _add_update(
    out: Tensor | None, seen: Tensor, A: Tensor, B: Tensor, m: Tensor, block: int, form: Form
) -> Tensor:
    """out + seen (E(m) ∘ B A)ᵀ, (N, out) in the dtype of `seen`; m already holds the scale.

    Into `out` itself; None counts as zero.
    """
    if not form.factored:
        delta = _increment(A, B, m, block, False).to(seen.dtype)  # (out, in)
        return seen @ delta.T if out is None else out.addmm_(seen, delta.T)
    f = _Blocks(A, B, m, block, seen.dtype)
    U = torch.bmm(f.cut(seen, f.q), f.A)  # (q, N, r)
    V = f.mix(f.m, U)  # (p, N, r)
    return _add_blocks(out, V, f.B.transpose(1, 2), B.shape[0])


def _factored_gradients(
    seen: Tensor, g: Tensor, A: Tensor, B: Tensor, m: Tensor, t: float, block: int, back: bool,
    into: Tensor | None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """dA, dB, dm, and where `back` the update's part of ∂L/∂seen, added into `into` if given."""
    f = _Blocks(A, B, m * t, block, seen.dtype)
    x_blocks, g_blocks = f.cut(seen, f.q), f.cut(g, f.p)
    U = torch.bmm(x_blocks, f.A)  # (q, N, r)
    dB = torch.bmm(g_blocks.transpose(1, 2), f.mix(f.m, U))  # (p, b, r)
    dV = torch.bmm(g_blocks, f.B)  # (p, N, r)
    dm = (dV.view(f.p, -1) @ U.view(f.q, -1).T).to(m.dtype).mul_(t)
    dU = f.mix(f.m.T, dV)  # (q, N, r)
    dA = torch.bmm(dU.transpose(1, 2), x_blocks)  # (q, r, b)
    dA = dA.transpose(0, 1).reshape(f.r, -1)[:, : A.shape[1]].to(A.dtype)
    dB = dB.view(-1, f.r)[: B.shape[0]].to(B.dtype)
    dx = _add_blocks(into, dU, f.A.transpose(1, 2), A.shape[1]) if back else None
    return dA, dB, dm, dx


def _dense_gradients(
    seen: Tensor, g: Tensor, A: Tensor, B: Tensor, m: Tensor, t: float, block: int, back: bool,
    into: Tensor | None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """dA, dB, dm, and where `back` the update's part of ∂L/∂seen, added into `into` if given."""
    p, q = m.shape
    G = _padded((g.T @ seen).to(A.dtype), p * block, q * block)  # (p·b, q·b)
    A_full = _padded(A, A.shape[0], q * block)  # (r, q·b)
    B_full = _padded(B, p * block, B.shape[1])  # (p·b, r)
    product = B_full @ A_full  # (p·b, q·b)
    blocks, G_blocks = (z.view(p, block, q, block) for z in (product, G))
    dm = torch.einsum("ambn,ambn->ab", blocks, G_blocks).mul_(t)  # (p, q)
    scaled = (m * t)[:, None, :, None]
    G_blocks.mul_(scaled)  # a view: G becomes t·G∘E(m), and `product` below t·E(m)∘(B A)
    dB, dA = (G @ A_full.T)[: B.shape[0]], (B_full.T @ G)[:, : A.shape[1]]
    if not back:
        return dA, dB, dm, None
    blocks.mul_(scaled)
    delta = product[: B.shape[0], : A.shape[1]].to(g.dtype)  # (out, in)
    return dA, dB, dm, g @ delta if into is None else into.addmm_(g, delta)


def block_masked_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    Z: Tensor,
    temperature: Tensor,
    scaling: float,
    block: int,
    p: float = 0.0,
    fan_in_fan_out: bool = False,
    form: Form | None = None,
) -> Tensor:
    """x Wᵀ + c + s·drop(x) (E(σ(Z/τ)) ∘ B A)ᵀ.

    Args:
        x: (..., in).
        weight: W (out, in), or (in, out) with `fan_in_fan_out`. Usually frozen.
        bias: c (out,) or None.
        A, B, Z: (r, in), (out, r) and (p, q).
        temperature: τ, a tensor of one number.
        scaling: s.
        block: b.
        p: dropout probability (0 in evaluation), on the update's input only.
        fan_in_fan_out: whether the weight is stored transposed, as GPT-2's Conv1D does.
        form: how to compute; None chooses.

    Returns:
        (..., out) in the compute dtype: autocast's, else the weight's.
    """
    x = x.to(compute_dtype(x, weight))
    if form is None:
        wide = x.dtype == weight.dtype and x.dtype in (torch.float32, torch.float64)
        wide = wide and (bias is None or bias.dtype == x.dtype)
        form = choose_form(x.numel() // x.shape[-1], A.shape[0], block, wide and p == 0.0)
    return _BlockMaskedLinear.apply(
        x, weight, bias, A, B, Z, temperature, scaling, block, p, fan_in_fan_out, form
    )


def block_masked_update(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    Z: Tensor,
    temperature: Tensor,
    scaling: float,
    block: int,
    p: float = 0.0,
    form: Form | None = None,
) -> Tensor:
    """s·drop(x) (E(σ(Z/τ)) ∘ B A)ᵀ alone, (..., out): for a base that computes for itself."""
    x = x.to(compute_dtype(x))
    if form is None:
        form = choose_form(x.numel() // x.shape[-1], A.shape[0], block, False)
    return _BlockMaskedLinear.apply(
        x, None, None, A, B, Z, temperature, scaling, block, p, False, form
    )
