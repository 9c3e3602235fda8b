"""Products of bf16 matrices by way of fp32; in another process: kernels stay replaced."""

import subprocess
import sys

CHECK = """
import torch
from torch.nn.functional import linear
from examples.methods.bf16 import multiply_bf16_in_fp32

torch.manual_seed(0)
x, W, b = torch.randn(5, 40), torch.randn(7, 40), torch.randn(7)
before = linear(x, W, b), torch.bmm(x[None], W.T[None])
multiply_bf16_in_fp32()
multiply_bf16_in_fp32()
assert torch.equal(linear(x, W, b), before[0])  # fp32 is as it was
assert torch.equal(torch.bmm(x[None], W.T[None]), before[1])

x, W, b = x.bfloat16(), W.bfloat16().requires_grad_(), b.bfloat16()
X, V, c = x.float(), W.detach().float(), b.float()
want = (X @ V.T).bfloat16()
assert torch.equal(torch.mm(x, W.T), want)
assert torch.equal(linear(x, W, b), (c + X @ V.T).bfloat16())
assert torch.equal(linear(x[None], W, b)[0], (c + X @ V.T).bfloat16())
assert torch.equal(torch.bmm(x[None], W.T[None])[0], want)
W, V = W.detach(), V
y = torch.ones(5, 7, dtype=torch.bfloat16)
half = (1 + 0.5 * (X @ V.T)).bfloat16()
assert torch.equal(torch.addmm(y, x, W.T, alpha=0.5), half)
assert torch.equal(torch.baddbmm(y[None], x[None], W.T[None], alpha=0.5)[0], half)
assert torch.equal(y.clone().addmm_(x, W.T, alpha=0.5), half)
assert torch.equal(y[None].clone().baddbmm_(x[None], W.T[None], alpha=0.5)[0], half)
filled = torch.full((5, 7), float("nan"), dtype=torch.bfloat16)
assert torch.mm(x, W.T, out=filled) is filled and torch.equal(filled, want)
filled = torch.full((1, 5, 7), float("nan"), dtype=torch.bfloat16)
torch.baddbmm(filled, x[None], W.T[None], beta=0.0, out=filled)
assert torch.equal(filled[0], want)
assert torch.equal(torch.mm(x, W.T, out=torch.empty(0, dtype=torch.bfloat16)), want)

W = W.requires_grad_()
linear(x, W).sum().backward()
assert torch.equal(W.grad, X.sum(0).bfloat16().expand(7, 40))
"""


def test_bf16_products_round_the_fp32_product_once():
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", CHECK], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
