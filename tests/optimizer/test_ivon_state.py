"""Saving and resuming, copies, and the posterior by parameter and by name."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ivon import IVON
from peft_custom.state_files import read_tree, write_tree

OPTIONS: dict[str, Any] = {"lr": 0.2, "ess": 50.0, "beta2": 0.9}


def net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)


def two_groups(model: nn.Sequential, **options: Any) -> IVON:
    groups = [
        {"params": model[0].parameters()},
        {"params": model[2].parameters(), "lr": 0.1, "ess": 20.0},
    ]
    return IVON(groups, **{**OPTIONS, **options})


def train(model: nn.Sequential, optimizer: IVON, first: int, last: int) -> None:
    """Steps whose rows and noise depend on the step, unless the optimiser has a generator."""
    dtype = model[0].weight.dtype
    for step in range(first, last):
        torch.manual_seed(step)
        for _ in range(optimizer.mc_samples):
            x = torch.randn(8, 5).to(dtype)
            with optimizer.sampled_params(train=True):
                (model(x) - x[:, :3]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def everything(model: nn.Module, optimizer: IVON) -> list[Tensor]:
    state = [t for p in model.parameters() for t in optimizer.state[p].values()]
    return [t.detach().clone() for t in (*model.parameters(), *state)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("generator", [False, True])
@pytest.mark.parametrize("how", ["tree", "torch", "accelerate"])
def test_resuming_is_never_having_stopped(
    dtype: torch.dtype, generator: bool, how: str, tmp_path: Path
) -> None:
    def made(seed: int) -> tuple[nn.Sequential, IVON]:
        model = net(dtype)
        own = torch.Generator().manual_seed(seed) if generator else None
        return model, two_groups(model, generator=own, mc_samples=2)

    model, optimizer = made(1)
    train(model, optimizer, 0, 5)
    weights = copy.deepcopy(model.state_dict())
    if how == "tree":
        write_tree(tmp_path / "state.safetensors", optimizer.state_dict())
    else:
        torch.save(optimizer.state_dict(), tmp_path / "state")
    train(model, optimizer, 5, 10)

    other, resumed = made(2)
    other.load_state_dict(weights)
    if how == "tree":
        state = read_tree(tmp_path / "state.safetensors")
    else:
        state = torch.load(tmp_path / "state", weights_only=True)
    resumed.load_state_dict(state)
    if how == "accelerate":
        wrapped = Accelerator(cpu=True).prepare_optimizer(resumed)  # loads its state once more
        assert wrapped.optimizer is resumed
    assert [group["step"] for group in resumed.param_groups] == [5, 5]
    train(other, resumed, 5, 10)
    for one, two in zip(everything(model, optimizer), everything(other, resumed), strict=True):
        assert torch.equal(one, two)


def test_the_step_counter_matters() -> None:
    model = net()
    optimizer = two_groups(model)
    train(model, optimizer, 0, 5)
    other = copy.deepcopy(model)
    state = copy.deepcopy(optimizer.state_dict())
    for group in state["param_groups"]:
        group["step"] = 0
    resumed = two_groups(other)
    resumed.load_state_dict(state)
    train(model, optimizer, 5, 6)
    train(other, resumed, 5, 6)
    assert not torch.equal(model[0].weight, other[0].weight)


def test_a_loaded_state_is_a_copy() -> None:
    model = net()
    optimizer = two_groups(model)
    train(model, optimizer, 0, 2)
    state = optimizer.state_dict()
    resumed = two_groups(net())
    resumed.load_state_dict(state)
    before = state["state"][0]["hess"].clone()
    resumed.state[resumed.param_groups[0]["params"][0]]["hess"].zero_()
    assert torch.equal(state["state"][0]["hess"], before)


@pytest.mark.parametrize("change", ["adamw", "shape", "groups", "generator", "empty"])
def test_foreign_states_are_refused(change: str) -> None:
    model = net()
    optimizer = two_groups(model)
    state = copy.deepcopy(optimizer.state_dict())
    words = "momentum is nothing"
    if change == "adamw":
        state, words = torch.optim.AdamW(model.parameters()).state_dict(), "no state of an IVON"
    elif change == "shape":
        state["state"][0]["hess"], words = torch.ones(2, 2), r"parameter 0 has shape \(7, 5\)"
    elif change == "groups":
        state["param_groups"].pop()
        words = "number of parameter groups|different number"
    elif change == "generator":
        state["generator"], words = torch.Generator().get_state(), "IVON\\(generator="
    else:
        state["state"] = {}
    before = everything(model, optimizer)
    with pytest.raises(ValueError, match=words):
        optimizer.load_state_dict(state)
    assert all(map(torch.equal, before, everything(model, optimizer)))


def test_copies_go_on_by_themselves() -> None:
    model = net()
    optimizer = two_groups(model, mc_samples=2)
    train(model, optimizer, 0, 3)
    other, copied = copy.deepcopy((model, optimizer))
    before = everything(model, optimizer)
    train(other, copied, 3, 6)
    assert all(map(torch.equal, before, everything(model, optimizer)))
    train(model, optimizer, 3, 6)
    ends = everything(model, optimizer), everything(other, copied)
    assert all(map(torch.equal, *ends))


# --- σ --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_posterior_std(dtype: torch.dtype) -> None:
    model = net(dtype)
    optimizer = two_groups(model)
    for steps in (0, 3):
        train(model, optimizer, 0, steps)
        for group in optimizer.param_groups:
            for p in group["params"]:
                std, hess = optimizer.posterior_std(p), optimizer.state[p]["hess"]
                assert std.shape == p.shape and std.dtype == hess.dtype != torch.bfloat16
                torch.testing.assert_close(std, (group["ess"] * (hess + 1e-4)).rsqrt())
    std = optimizer.posterior_std(p)
    group["ess"] = 80.0
    torch.testing.assert_close(optimizer.posterior_std(p), std / 2)
    with pytest.raises(ValueError, match="no parameter of this optimiser"):
        optimizer.posterior_std(nn.Parameter(torch.ones(2, 9)))


def test_posterior_std_is_computed_once_per_step(monkeypatch: pytest.MonkeyPatch) -> None:
    from ivon import rule

    model = net()
    optimizer = IVON(model.parameters(), **OPTIONS)
    calls = []
    kept = rule.std
    monkeypatch.setattr(rule, "std", lambda *given: calls.append(given) or kept(*given))
    first = [optimizer.posterior_std(p) for p in model.parameters()]
    assert len(calls) == 1
    values = [std.clone() for std in first]
    train(model, optimizer, 0, 1)
    calls.clear()
    second = [optimizer.posterior_std(p) for p in model.parameters()]
    assert len(calls) == 1 and not torch.equal(first[0], second[0])
    assert all(map(torch.equal, first, values))  # what was given out does not change


def test_hess_stats() -> None:
    model = net()
    optimizer = two_groups(model)
    train(model, optimizer, 0, 3)
    for group, stats in zip(optimizer.param_groups, optimizer.hess_stats(), strict=True):
        h = torch.cat([optimizer.state[p]["hess"].flatten() for p in group["params"]])
        expected = [h.mean(), h.std(correction=0), h.min(), h.median(), h.max()]
        assert list(stats) == ["mean", "std", "min", "median", "max"]
        torch.testing.assert_close(torch.tensor(list(stats.values())), torch.stack(expected))


# --- by name --------------------------------------------------------------------------------------
def saved(tmp_path: Path) -> tuple[nn.Sequential, IVON, dict[str, Tensor], dict[str, str]]:
    model = net()
    optimizer = two_groups(model)
    train(model, optimizer, 0, 3)
    path = tmp_path / "posterior.safetensors"
    named = list(model.named_parameters())
    save_file(
        optimizer.posterior_tensors(named), path, metadata=optimizer.posterior_metadata(named)
    )
    with safe_open(path, "pt") as file:
        return model, optimizer, load_file(path), file.metadata()


def test_posterior_files(tmp_path: Path) -> None:
    model, optimizer, tensors, metadata = saved(tmp_path)
    assert list(tensors) == sorted(name for name, _ in model.named_parameters())
    other = nn.ModuleDict({"frozen": nn.Linear(2, 2), "net": net()})
    fresh = two_groups(other["net"])
    named = [(n.removeprefix("net."), p) for n, p in reversed(list(other.named_parameters()))]
    fresh.posterior_std(other["net"][0].weight)
    fresh.load_posterior(named, tensors, metadata)
    for ours, theirs in zip(model.parameters(), other["net"].parameters(), strict=True):
        assert torch.equal(optimizer.posterior_std(ours), fresh.posterior_std(theirs))
        assert fresh.state[theirs]["momentum"].count_nonzero() == 0


def test_other_posteriors_are_refused(tmp_path: Path) -> None:
    model, optimizer, tensors, metadata = saved(tmp_path)
    named = list(model.named_parameters())
    for ess, weight_decay, words in ((51.0, 1e-4, "ess=50.0"), (50.0, 1e-5, "weight_decay=0.0001")):
        other = two_groups(model, ess=ess, weight_decay=weight_decay)
        with pytest.raises(ValueError, match=f"0.weight: the posterior was learned with {words}"):
            other.load_posterior(named, tensors, metadata)
    cases = [
        ({**tensors, "0.weight": torch.ones(5, 7)}, r"0.weight: .*shape \(5, 7\), .*\(7, 5\)"),
        ({**tensors, "0.weight": torch.full((7, 5), torch.nan)}, "0.weight: .*positive"),
        ({**tensors, "2.bias": torch.full((3,), -1.0)}, "2.bias: .*positive"),
        ({**tensors, "extra": torch.ones(1)}, "extra, which is only saved"),
        ({n: t for n, t in tensors.items() if n != "2.bias"}, "2.bias, which is not saved"),
    ]
    before = everything(model, optimizer)
    for changed, words in cases:
        with pytest.raises(ValueError, match=words):
            optimizer.load_posterior(named, changed, metadata)
    with pytest.raises(ValueError, match="metadata has no 'ivon_posterior'"):
        optimizer.load_posterior(named, tensors, {})
    with pytest.raises(ValueError, match="2 of the optimiser's 4 parameters"):
        optimizer.posterior_tensors(named[:2])
    assert all(map(torch.equal, before, everything(model, optimizer)))
    assert len(json.loads(metadata["ivon_posterior"])) == 2
