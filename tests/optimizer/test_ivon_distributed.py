"""Two gloo processes: one noise and averaged gradients, or own noise and one all-reduce a step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.processes import in_two
from torch import Tensor, nn

from ivon import IVON

STEPS, ROWS = 10, 8


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))


def batch(step: int, rank: int, world: int) -> Tensor:
    made = torch.Generator().manual_seed(step)
    return torch.randn(ROWS, 6, generator=made)[rank::world]


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) - x[:, :3]).square().mean()


def built(**options: Any) -> tuple[nn.Sequential, IVON]:
    model = net()
    given = {"lr": 0.2, "ess": 100.0, "beta2": 0.95, **options}
    return model, IVON(model.parameters(), **given)


def ends(model: nn.Module, optimizer: IVON) -> Tensor:
    state = [optimizer.state[p][name] for name in ("hess", "momentum") for p in model.parameters()]
    return torch.cat([t.detach().flatten() for t in (*model.parameters(), *state)])


def same_noise(rank: int, world: int, auto: bool) -> Tensor:
    """Mode A: DDP averages gradients; generators are seeded alike, the global ones are not."""
    model, optimizer = built(generator=torch.Generator().manual_seed(3))
    torch.manual_seed(100 + rank)
    whole = nn.parallel.DistributedDataParallel(model) if world > 1 else model
    if auto:
        optimizer.auto_sample(model)
    for step in range(STEPS):
        x = batch(step, rank, world)
        if auto:
            loss_of(whole, x).backward()
        else:
            with optimizer.sampled_params(train=True):
                loss_of(whole, x).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        torch.rand(rank + 1)  # dropout and the like
    return ends(model, optimizer)


def own_noise(rank: int, world: int, approx: str, samples: int) -> Tensor:
    """Mode B, or what it must equal: 2·`samples` samples, with the noise and rows of both."""
    noise = [torch.Generator().manual_seed(50 + r) for r in range(2)]
    model, optimizer = built(
        mc_samples=samples * 2 // world, sync=world > 1, hess_approx=approx, generator=noise[rank]
    )
    for step in range(STEPS):
        for r in range(2) if world == 1 else (rank,):
            for _ in range(samples):
                with optimizer.sampled_params(train=True, generator=noise[r]):
                    loss_of(model, batch(step, r, 2)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)  # of what is averaged already
        optimizer.step()
        optimizer.zero_grad()
    return ends(model, optimizer)


def one_sided(rank: int) -> Tensor:
    """Mode B where one process's rows do not reach a parameter."""
    a, b = (nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = IVON([a, b], lr=0.1, ess=1e10, beta1=0.0, beta2=1.0, weight_decay=0.0, sync=True)
    torch.manual_seed(rank)
    with optimizer.sampled_params(train=True):
        (a.sum() + rank * 2 * b.sum() if rank else a.sum()).backward()
    optimizer.step()
    return torch.cat([a.detach(), b.detach()])


def refused() -> str:
    _, optimizer = built()
    try:
        with optimizer.sampled_params(train=True):
            return "drawn"
    except RuntimeError as error:
        return str(error)


def undeclared() -> str:
    model, optimizer = built(sync=True)
    try:
        for _ in range(2):
            with optimizer.sampled_params(train=True):
                loss_of(model, batch(0, 0, 2)).backward()
        return "drawn"
    except RuntimeError as error:
        return str(error)


CASES: dict[str, Any] = {
    "A": lambda rank, world: same_noise(rank, world, False),
    "A auto": lambda rank, world: same_noise(rank, world, True),
    "B price": lambda rank, world: own_noise(rank, world, "price", 1),
    "B gradsq": lambda rank, world: own_noise(rank, world, "gradsq", 1),
    "B two": lambda rank, world: own_noise(rank, world, "price", 2),
}


def member(rank: int) -> dict[str, Any]:
    found = {name: case(rank, 2) for name, case in CASES.items()}
    found |= {"one-sided": one_sided(rank), "refused": refused(), "undeclared": undeclared()}
    calls: list[int] = []
    kept = dist.all_reduce
    dist.all_reduce = lambda *given: calls.append(given[0].numel()) or kept(*given)
    own_noise(rank, 2, "price", 2)
    return {**found, "calls": calls}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return in_two(member, tmp_path_factory.mktemp("processes"))


@pytest.mark.parametrize("case", CASES)
def test_processes_agree_and_equal_one(case: str, found: list[dict[str, Any]]) -> None:
    first, second = (process[case] for process in found)
    assert torch.equal(first, second)
    alone = CASES[case](0, 1)
    torch.testing.assert_close(first, alone, rtol=0, atol=3e-6)
    assert not torch.allclose(alone, ends(*built()), atol=1e-2)


def test_one_all_reduce_a_step(found: list[dict[str, Any]]) -> None:
    numbers = sum(p.numel() for p in net().parameters())
    assert all(process["calls"] == [2 * numbers] * STEPS for process in found)


def test_missing_gradients_count_as_zero(found: list[dict[str, Any]]) -> None:
    for process in found:  # mean gradients 1 and 1, lr 0.1
        torch.testing.assert_close(process["one-sided"], torch.full((4,), 0.9))


def test_silent_divergence_is_refused(found: list[dict[str, Any]]) -> None:
    for process in found:
        assert "2 processes would draw different noise" in process["refused"]
        assert "set mc_samples" in process["undeclared"]
