"""DyLoRA on two gloo processes: the same rank in every step, and the weights of one process."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
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


def worker(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        torch.save(run(rank, 2), Path(folder) / str(rank))
    finally:
        dist.destroy_process_group()


def test_two_processes_agree_and_equal_one(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(worker, (port, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / str(rank), weights_only=True) for rank in (0, 1))
    alone = run(0, 1)
    assert torch.equal(first["weights"], second["weights"])
    assert torch.equal(first["ranks"], second["ranks"])
    assert torch.equal(first["ranks"], alone["ranks"]) and len(set(alone["ranks"].tolist())) > 2
    torch.testing.assert_close(first["weights"], alone["weights"], rtol=0, atol=1e-5)
