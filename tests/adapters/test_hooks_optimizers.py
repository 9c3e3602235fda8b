"""What optimisers do around a step: scalers, fused kernels, closures, subclasses, copies."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp import GradScaler

from peft_custom import TrainingHooks, attach


class Watcher(TrainingHooks):
    """Keeps the gradient it saw before every step and adds 1 to it, as a regulariser would."""

    def __init__(self, layer: nn.Linear, total_steps: int, seed: int) -> None:
        super().__init__(total_steps, seed=seed)
        self.layer = layer
        self.seen = torch.zeros(0, 3)

    def before_step(self) -> None:
        assert not torch.is_grad_enabled()
        self.seen = torch.cat([self.seen, self.layer.weight.grad.clone()])
        self.layer.weight.grad.add_(1.0)

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen = state["seen"]


class Watched(nn.Linear):
    """y = w·x with hooks."""

    def __init__(self) -> None:
        super().__init__(3, 1, bias=False)
        with torch.no_grad():
            self.weight.copy_(torch.tensor([[0.5, -0.25, 1.0]]))

    def training_hooks(self, model: Any, optimizer: Any, total_steps: Any, *, seed: int) -> Watcher:
        return Watcher(self, total_steps, seed)


X = torch.tensor([[1.0, 2.0, 3.0]])


def built(kind: type[torch.optim.Optimizer], **options: Any) -> tuple[Watched, Any, Any]:
    model = Watched()
    optimizer = kind(model.parameters(), **options)
    return model, optimizer, attach(model, optimizer, total_steps=100)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("unscale_first", [False, True])
def test_grad_scaler_skips_and_scales(fused: bool, unscale_first: bool) -> None:
    model, optimizer, hooks = built(torch.optim.SGD, lr=0.125, fused=fused)
    scaler = GradScaler("cpu", init_scale=1024.0, growth_interval=1000)

    def step(x: Tensor) -> None:
        scaler.scale(model(x).sum()).backward()
        if unscale_first:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    start = model.weight.detach().clone()
    step(X * float("inf"))
    assert hooks.t == 0 and torch.equal(model.weight, start) and len(hooks.parts[0].seen) == 0
    step(X)
    assert hooks.t == 1
    torch.testing.assert_close(hooks.parts[0].seen, X)  # unscaled
    torch.testing.assert_close(model.weight.detach(), start - 0.125 * (X + 1.0))
    step(X * float("nan"))
    step(2 * X)
    assert hooks.t == 2
    torch.testing.assert_close(hooks.parts[0].seen, torch.cat([X, 2 * X]))


def test_fused_adamw_under_a_scaler_equals_the_unfused_one() -> None:
    ends = []
    for fused in (False, True):
        model, optimizer, hooks = built(torch.optim.AdamW, lr=0.01, fused=fused)
        scaler = GradScaler("cpu", init_scale=2.0**10)
        for i in range(6):
            scale = float("inf") if i == 3 else float(i + 1)
            scaler.scale(model(X).square().sum() * scale).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        assert hooks.t == 5
        ends.append(torch.cat([model.weight.detach(), hooks.parts[0].seen]))
    torch.testing.assert_close(*ends, rtol=1e-6, atol=1e-6)


def test_optimizer_that_takes_the_scaler_itself_is_refused() -> None:
    class Own(torch.optim.SGD):
        _step_supports_amp_scaling = True

        def step(self, closure: Any = None, grad_scaler: Any = None) -> None:  # type: ignore
            super().step(closure)

    model, optimizer, hooks = built(Own, lr=0.1)
    scaler = GradScaler("cpu")
    scaler.scale(model(X).sum()).backward()
    with (
        pytest.warns(FutureWarning),
        pytest.raises(RuntimeError, match="Own unscales gradients within its own step"),
    ):
        scaler.step(optimizer)
    assert hooks.t == 0


@pytest.mark.parametrize("keyword", [False, True])
def test_closure_is_evaluated_before_the_hooks_look(keyword: bool) -> None:
    model, optimizer, hooks = built(torch.optim.SGD, lr=0.125)
    start = model.weight.detach().clone()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(X).sum()
        loss.backward()
        return loss

    loss = optimizer.step(closure=closure) if keyword else optimizer.step(closure)
    torch.testing.assert_close(loss.detach(), (start * X).sum())
    torch.testing.assert_close(hooks.parts[0].seen, X)
    torch.testing.assert_close(model.weight.detach(), start - 0.125 * (X + 1.0))
    optimizer.step(None)  # accelerate passes its closure on even when it is None
    assert hooks.t == 2


def test_closure_evaluated_several_times_counts_once() -> None:
    model, optimizer, hooks = built(torch.optim.LBFGS, lr=0.1, max_iter=5)
    points: list[Tensor] = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(X).square().sum()
        loss.backward()
        points.append(model.weight.grad.clone())
        return loss

    optimizer.step(closure)
    first = len(points)
    assert first > 1 and hooks.t == 1
    optimizer.step(closure)
    assert len(points) > first + 1 and hooks.t == 2
    torch.testing.assert_close(hooks.parts[0].seen, torch.cat([points[first - 1], points[-1]]))


def test_unevaluated_closure_is_an_error() -> None:
    class Deaf(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            return None

    model, optimizer, hooks = built(Deaf, lr=0.1)
    with pytest.raises(RuntimeError, match=r"Deaf\.step did not evaluate the closure"):
        optimizer.step(lambda: 0.0)
    assert hooks.t == 0


def test_subclass_calling_its_parents_step_is_one_step() -> None:
    torch.optim.AdamW(nn.Linear(1, 1).parameters())  # torch hooks the parent's step from here on

    class Clipped(torch.optim.AdamW):
        def step(self, closure: Any = None) -> Any:  # type: ignore[override]
            return super().step(closure)

    model, optimizer, hooks = built(Clipped, lr=0.01)
    for _ in range(3):
        model(X).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert hooks.t == 3 and len(hooks.parts[0].seen) == 3


def test_step_that_raises_is_no_step_and_the_next_one_counts() -> None:
    class Moody(torch.optim.SGD):
        moods = [True, False]

        def step(self, closure: Any = None) -> Any:  # type: ignore[override]
            if self.moods.pop(0):
                raise ArithmeticError
            return super().step(closure)

    model, optimizer, hooks = built(Moody, lr=0.1)
    model(X).sum().backward()
    with pytest.raises(ArithmeticError):
        optimizer.step()
    assert hooks.t == 0
    optimizer.step()
    assert hooks.t == 1


@pytest.mark.parametrize("how", ["copy", "another"])
def test_stepping_without_hooks_is_an_error(how: str) -> None:
    from toy_tuner import ToyConfig

    from peft_custom import get_peft_model

    model = get_peft_model(nn.Sequential(nn.Linear(3, 2)), ToyConfig(target_modules=["0"]))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    hooks = attach(model, optimizer, total_steps=5)
    other = copy.copy(optimizer) if how == "copy" else torch.optim.AdamW(parameters)
    model(X).sum().backward()
    with pytest.raises(RuntimeError, match="attached to another optimiser"):
        other.step()
    optimizer.step()
    assert hooks.t == 1
    unrelated = nn.Linear(2, 2)
    torch.optim.SGD(unrelated.parameters(), lr=0.1).step()
    hooks.remove()
    other.step()


@pytest.mark.parametrize("how", ["group", "list", "element"])
def test_parameters_that_another_optimizer_gets_later_are_seen(how: str) -> None:
    from toy_tuner import ToyConfig

    from peft_custom import get_peft_model

    model = get_peft_model(nn.Sequential(nn.Linear(3, 2)), ToyConfig(target_modules=["0"]))
    parameters = [p for p in model.parameters() if p.requires_grad]
    hooks = attach(model, torch.optim.SGD(parameters, lr=0.1), total_steps=5)
    other = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    other.step()  # harmless so far
    if how == "group":
        other.add_param_group({"params": parameters})
    elif how == "list":
        other.param_groups[0]["params"].append(parameters[0])
    else:
        other.param_groups[0]["params"][0] = parameters[0]
    with pytest.raises(RuntimeError, match="attached to another optimiser"):
        other.step()
    hooks.remove()
    other.step()


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.LBFGS])
def test_a_step_is_entered_once_before_anything_moves(kind: type[torch.optim.Optimizer]) -> None:
    model, optimizer, hooks = built(kind, lr=0.1)
    entered = []
    hooks.parts[0].enter_step = lambda: entered.append(model.weight.detach().clone())

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (model(X) - 1.0).square().sum()
        loss.backward()
        return loss

    for step in range(3):
        now = model.weight.detach().clone()
        optimizer.step(closure)
        assert len(entered) == step + 1 and torch.equal(entered[-1], now)
        assert not torch.equal(model.weight, now)


def test_deep_copy_of_model_and_optimizer_is_not_driven() -> None:
    model, optimizer, hooks = built(torch.optim.SGD, lr=0.1)
    twin, other = copy.deepcopy((model, optimizer))
    twin(X).sum().backward()
    other.step()
    assert hooks.t == 0
    mine = attach(twin, other, total_steps=5)
    other.step()
    assert (mine.t, hooks.t) == (1, 0)
