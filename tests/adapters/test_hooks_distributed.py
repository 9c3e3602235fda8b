"""Two gloo processes: equal masks and weights, those of one process on the whole batch; draws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from support.processes import in_two
from torch import Tensor, nn
from toy_tuner import ToyConfig

from peft_custom import attach, get_peft_model, rng
from peft_custom.distributed import reduce_mean, world_size

STEPS, ROWS = 10, 8


def run(rank: int, world: int, ddp: bool) -> dict[str, Any]:
    """Trains on this process's share of every batch; returns all that was trained or drawn."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
    model: nn.Module = get_peft_model(
        base, ToyConfig(target_modules=["0", "2"], every=2, penalty=0.01, look_first=True)
    )
    torch.manual_seed(100 + rank)  # the global generators disagree, as dropout's should
    if ddp:
        model = nn.parallel.DistributedDataParallel(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.2)
    hooks = attach(model, optimizer, total_steps=STEPS, seed=3)

    def batch(step: int) -> Tensor:
        made = torch.Generator().manual_seed(step)
        return torch.randn(ROWS, 6, generator=made)[rank::world]

    def loss(x: Tensor) -> Tensor:
        return (model(x) - x[:, :3]).square().mean()

    hooks.prepare([batch(1000), batch(1001)], loss)
    drawn = []
    for step in range(STEPS):
        loss(batch(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
        drawn.append(torch.cat([f.mask.clone() for f in hooks.parts[0].factors]))
    return {
        "weights": torch.cat([p.detach().flatten() for p in parameters]),
        "masks": torch.stack(drawn),
        "scores": hooks.parts[0].scores,
        "looked": hooks.parts[0].looked,
    }


def member(rank: int) -> dict[str, Any]:
    half = torch.tensor([rank, 4.0 * rank]).to(torch.bfloat16)
    means = reduce_mean([torch.full((2, 3), float(rank)), half])
    assert world_size() == 2 and means[1].dtype == torch.bfloat16
    return {**run(rank, 2, ddp=True), "means": means}


def test_two_processes_agree_and_equal_one(tmp_path: Path) -> None:
    first, second = in_two(member, tmp_path)
    for name in ("weights", "masks", "scores", "looked"):
        assert torch.equal(first[name], second[name]), name
    for one, two in zip(first["means"], second["means"], strict=True):
        assert torch.equal(one, two)
    assert torch.equal(first["means"][0], torch.full((2, 3), 0.5))
    assert first["means"][1].tolist() == [0.5, 2.0]

    alone = run(0, 1, ddp=False)
    assert torch.equal(alone["masks"], first["masks"])
    assert len({tuple(mask.tolist()) for mask in alone["masks"]}) > 2  # they did change
    for name in ("weights", "scores", "looked"):
        torch.testing.assert_close(first[name], alone[name], rtol=0, atol=1e-6)


def test_one_process_reduces_nothing() -> None:
    tensors = [torch.ones(2), torch.zeros(3)]
    assert world_size() == 1
    assert all(a is b for a, b in zip(reduce_mean(tensors), tensors, strict=True))


def test_draws_depend_on_seed_and_counters_alone() -> None:
    # SplitMix64's published outputs for seed 0: state φ, 2φ, … each through the finaliser
    assert rng.bits(0) == 0xE220A8397B1DCDAF
    assert rng._mix(2 * rng.GOLDEN & rng.MASK) == 0x6E789E6AA1B965F4
    keys = [(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (-1,), (2**64,)]
    draws = [rng.bits(*key) for key in keys]
    assert len(set(draws[:-1])) == 7 and draws[-1] == draws[0]
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    one, two = (torch.rand(4, generator=rng.generator(3, 8)) for _ in range(2))
    assert torch.equal(one, two) and torch.equal(torch.random.get_rng_state(), before)
    assert not torch.equal(one, torch.rand(4, generator=rng.generator(3, 9)))


def test_draws_are_uniform() -> None:
    n = 60_000
    counts = torch.bincount(torch.tensor([rng.integer(2, 7, 1, t) for t in range(n)]), minlength=8)
    assert counts[:2].sum() == 0
    chi2 = ((counts[2:] - n / 6) ** 2 / (n / 6)).sum()
    assert chi2 < 20.5  # 5 degrees of freedom, p = 0.001
    values = torch.tensor([rng.uniform(4, t) for t in range(n)], dtype=torch.float64)
    assert values.min() >= 0 and values.max() < 1
    assert abs(values.mean() - 0.5) < 4 * (1 / 12 / n) ** 0.5
    pairs = torch.corrcoef(torch.stack([values[:-1], values[1:]]))[0, 1]
    assert abs(pairs) < 4 / n**0.5
