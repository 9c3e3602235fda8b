"""The runs that IVON and ivon-opt make alike: a small net in fp64, 50 steps, noise of one seed.

Used by `make_ivon.py`, in a process that has ivon-opt, and by `test_ivon_golden.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

STEPS, ROWS = 50, 16
CASES: dict[str, dict[str, Any]] = {
    "price": {"lr": 0.2},
    "gradsq": {"lr": 0.05, "hess_approx": "gradsq", "beta2": 0.999},
    "clip": {"lr": 1.0, "clip_radius": 0.01, "weight_decay": 1e-3},
    "mc3": {"lr": 0.2, "mc_samples": 3, "beta2": 0.99},
    "plain": {"lr": 0.3, "debias": False, "rescale_lr": False, "hess_init": 0.5},
    "groups": {"lr": 0.2, "beta2": 0.99},
    "fp32": {"lr": 0.2, "beta2": 0.99},
}
COMMON = {"ess": 400.0, "hess_init": 1.0, "weight_decay": 1e-4, "beta2": 0.9999}
SECOND_GROUP = {"lr": 0.05, "ess": 100.0, "hess_init": 0.3, "beta1": 0.8, "beta2": 0.95,
                "weight_decay": 0.01, "clip_radius": 0.5}  # fmt: skip


def batch(step: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    made = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(ROWS, 5, generator=made, dtype=torch.float64)
    y = torch.sin(x @ torch.linspace(-1, 1, 15, dtype=torch.float64).view(5, 3))
    return x.to(dtype), y.to(dtype)


def net(dtype: torch.dtype) -> nn.Sequential:
    made = torch.Generator().manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.4 * torch.randn(p.shape, generator=made, dtype=torch.float64))
    return model


def run(kind: Any, case: str) -> dict[str, Tensor]:
    """Parameters after every fifth step, one flat vector each, and σ-independent losses."""
    dtype = torch.float32 if case == "fp32" else torch.float64
    model = net(dtype)
    parameters: Any = list(model.parameters())
    if case == "groups":
        parameters = [{"params": parameters[:2]}, {"params": parameters[2:], **SECOND_GROUP}]
    optimizer = kind(parameters, **{**COMMON, **CASES[case]})
    samples = CASES[case].get("mc_samples", 1)
    torch.manual_seed(0)
    kept, losses = [], []
    for step in range(STEPS):
        x, y = batch(step, dtype)
        for _ in range(samples):
            with optimizer.sampled_params(train=True):
                optimizer.zero_grad()
                loss = (model(x) - y).square().mean()
                loss.backward()
            losses.append(loss.detach())
        optimizer.step()
        if step % 5 == 4:
            kept.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    return {"parameters": torch.stack(kept), "losses": torch.stack(losses)}
