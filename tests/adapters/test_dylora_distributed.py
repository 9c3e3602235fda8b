"""DyLoRA on two gloo processes: the same rank in every step, and the weights of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from support.processes import in_two
from torch import nn

import loralib
from peft_custom import DyLoraConfig, attach, get_peft_model

STEPS, ROWS = 12, 6


def run(rank: int, world: int) -> dict[str, Any]:
    """Trains on this process's share of every batch; returns weights and ranks."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
    options = {"r": 4, "target_modules": ["0", "2"], "dylora_mode": "frozen"}
    model: nn.Module = get_peft_model(base, DyLoraConfig(**options))
    torch.manual_seed(100 + rank)  # the global generators disagree, as dropout's should
    if world > 1:
        model = nn.parallel.DistributedDataParallel(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.1)
    attach(model, optimizer, total_steps=STEPS, seed=3)
    drawn = []
    for step in range(STEPS):
        drawn.append(loralib.get_rank(model))
        made = torch.Generator().manual_seed(step)
        x = torch.randn(ROWS, 6, generator=made)[rank::world]
        (model(x) - x[:, :3]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    weights = torch.cat([p.detach().flatten() for p in parameters])
    return {"weights": weights, "ranks": torch.tensor(drawn)}


def member(rank: int) -> dict[str, Any]:
    return run(rank, 2)


def test_two_processes_agree_and_equal_one(tmp_path: Path) -> None:
    first, second = in_two(member, tmp_path)
    alone = run(0, 1)
    assert torch.equal(first["weights"], second["weights"])
    assert torch.equal(first["ranks"], second["ranks"])
    assert torch.equal(first["ranks"], alone["ranks"]) and len(set(alone["ranks"].tolist())) > 2
    torch.testing.assert_close(first["weights"], alone["weights"], rtol=0, atol=1e-5)
