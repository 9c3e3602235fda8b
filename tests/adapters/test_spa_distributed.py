"""Pruning on two gloo processes: equal masks, and those of one process."""

from __future__ import annotations

from pathlib import Path

import torch
from support.processes import in_two
from torch import Tensor, nn

from peft_custom import BlockPruneConfig, SplopaConfig, SploraConfig, attach, get_peft_model

STEPS, ROWS = 6, 6
COMMON = {
    "mask_structure": "hybrid", "mask_block_rows": 2, "mask_block_cols": 3, "warmup_steps": 1,
    "target_modules": ["query", "intermediate.dense", "output.dense"],
}  # fmt: skip
CASES = {
    "top": SplopaConfig(**COMMON, num_prototypes=3, final_threshold=0.5),
    "gates": SploraConfig(
        **COMMON, r=2, pruning_method="l0", regularization="l0", final_lambda=5.0
    ),
    "magnitude": BlockPruneConfig(**COMMON, pruning_method="magnitude", final_threshold=0.5),
}


class Dense(nn.Module):
    """A linear map under the name that transformers' layers give theirs."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.dense = nn.Linear(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense(x)


class Net(nn.Module):
    """A matrix that is pruned by blocks, and a feed-forward part."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(6, 6)
        self.intermediate, self.output = Dense(6, 12), Dense(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(torch.relu(self.intermediate(self.query(x))))


def run(rank: int, world: int) -> dict[str, Tensor]:
    """Trains on this process's share of every batch."""
    found = {}
    for name, config in CASES.items():
        torch.manual_seed(0)
        model = get_peft_model(Net(), config)
        torch.manual_seed(100 + rank)  # the global generators disagree
        whole = nn.parallel.DistributedDataParallel(model) if world > 1 else model
        optimizer = torch.optim.AdamW(model.parameter_groups(0.01, 0.1), eps=1e-3)
        attach(whole, optimizer, total_steps=STEPS, seed=3)
        whole.train()
        for step in range(STEPS):
            x = torch.randn(ROWS, 6, generator=torch.Generator().manual_seed(step))[rank::world]
            (whole(x) - x.flip(1)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        masks = list(model.base_model.masks["default"])
        assert len(masks) == 2
        found[f"{name}: masks"] = torch.cat([m.mask.flatten() for m in masks])
        trained = [p.detach().flatten() for p in model.parameters() if p.requires_grad]
        found[f"{name}: weights"] = torch.cat(trained)
    return found


def member(rank: int) -> dict[str, Tensor]:
    return run(rank, 2)


def test_two_processes_agree_and_equal_one(tmp_path: Path) -> None:
    first, second = in_two(member, tmp_path)
    alone = run(0, 1)
    for name, values in first.items():
        assert torch.equal(values, second[name]), name
        torch.testing.assert_close(values, alone[name], rtol=0, atol=1e-5, msg=name)
    assert first["top: masks"].mean() == 0.5 and 0 < first["gates: masks"].mean() < 1
