"""`attach`: what is driven, when and by what; the method is the toy tuner in `tests/toy_tuner`."""

from __future__ import annotations

import copy
import gc
import json
import warnings
import weakref
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from toy_tuner import ToyConfig

from peft_custom import LoraConfig, PeftModel, TrainingHooks, attach, attached_hooks, get_peft_model
from peft_custom.hook_files import load_hooks_state, save_hooks_state, saved_token
from peft_custom.hooks import schedule_finished


class Recorder(TrainingHooks):
    """Notes every call with t."""

    def __init__(self, total_steps: int | None, seed: int = 0) -> None:
        super().__init__(total_steps, seed=seed)
        self.calls: list[tuple[str, int]] = []

    def begin_step(self) -> None:
        self.calls.append(("begin", self.t))

    def before_step(self) -> None:
        assert not torch.is_grad_enabled()
        self.calls.append(("before", self.t))

    def after_step(self) -> None:
        self.calls.append(("after", self.t))


class Recorded(nn.Linear):
    """A module that brings hooks without being a tuner, as a layer of one's own may."""

    def __init__(self) -> None:
        super().__init__(3, 2)

    def training_hooks(
        self, model: Any, optimizer: Any, total_steps: Any, *, seed: int
    ) -> Recorder:
        return Recorder(total_steps, seed)


def toy(**options: Any) -> PeftModel:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    return get_peft_model(base, ToyConfig(target_modules=["0", "2"], **options))


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int = 0) -> None:
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(seed))
    (model(x) - 1.0).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def masks(model: nn.Module) -> Tensor:
    return torch.cat([b for name, b in model.named_buffers() if name.endswith("mask")])


def test_order_and_counter_with_accumulation() -> None:
    model = Recorded()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    hooks = attach(model, optimizer, total_steps=2)
    for _ in range(2):
        for _ in range(3):  # micro-batches
            model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert hooks.parts[0].calls == [
        ("begin", 0),
        ("before", 0),
        ("after", 0),
        ("begin", 1),
        ("before", 1),
        ("after", 1),
        ("begin", 2),
    ]
    assert hooks.t == 2 and hooks.finished


def test_nothing_adapts_nothing_happens() -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(target_modules=["0"]))
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    with attach(model, optimizer) as hooks:
        assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks
        assert not hooks.adapts and hooks.finished and hooks.prepared
        hooks.prepare([], lambda batch: batch)
        hooks.load_state_dict(hooks.state_dict())
        assert hooks.log() == hooks.losses() == {}
    plain = nn.Linear(2, 2)
    assert not attach(plain, torch.optim.SGD(plain.parameters(), lr=0.1), total_steps=3).adapts
    with pytest.raises(TypeError, match="tinit given, but nothing in this Linear adapts"):
        attach(plain, torch.optim.SGD(plain.parameters(), lr=0.1), total_steps=3, tinit=0.1)


@pytest.mark.parametrize("steps", [None, 0, -3, 2.5, True, "10"])
def test_total_steps_must_be_known(steps: Any) -> None:
    model = toy()
    with pytest.raises(ValueError, match="total_steps="):
        attach(model, torch.optim.SGD(trainable(model), lr=0.1), total_steps=steps)


def test_missing_adapter_parameters_are_named() -> None:
    model = toy()
    some = [
        p for n, p in model.named_parameters() if p.requires_grad and "2.toy.default.B" not in n
    ]
    with pytest.raises(ValueError, match=r"base_model\.model\.2\.toy\.default\.B"):
        attach(model, torch.optim.SGD(some, lr=0.1), total_steps=5)
    with pytest.raises(TypeError, match="not a list"):
        attach(model, some, total_steps=5)


def test_several_groups() -> None:
    model = toy()
    a = [p for n, p in model.named_parameters() if n.endswith("default.A")]
    b = [p for n, p in model.named_parameters() if n.endswith("default.B")]
    optimizer = torch.optim.SGD([{"params": a, "lr": 0.1}, {"params": b, "lr": 0.2}])
    hooks = attach(model, optimizer, total_steps=5)
    step(model, optimizer)
    assert hooks.t == 1
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # hooks stay
    step(model, optimizer)
    assert hooks.t == 2


def test_attaching_again_replaces() -> None:
    model = toy()
    first, second = (torch.optim.SGD(trainable(model), lr=0.1) for _ in range(2))
    old = attach(model, first, total_steps=5)
    step(model, first)
    new = attach(model, second, total_steps=5)
    step(model, second)
    assert (old.t, new.t) == (1, 1) and attached_hooks(model) is new
    assert not first._optimizer_step_pre_hooks
    again = attach(model, second, total_steps=5)
    step(model, second)
    assert (new.t, again.t) == (1, 1)


def test_remove_and_context_manager() -> None:
    model = toy()
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    with attach(model, optimizer, total_steps=5) as hooks:
        step(model, optimizer)
    hooks.remove()
    step(model, optimizer)
    assert hooks.t == 1 and attached_hooks(model) is None
    assert not schedule_finished(model.base_model)


def test_hooks_live_and_die_with_the_optimizer() -> None:
    model = toy()
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    hooks = weakref.ref(attach(model, optimizer, total_steps=5))
    gc.collect()
    assert attached_hooks(model) is hooks()
    del optimizer
    gc.collect()
    assert hooks() is None and attached_hooks(model) is None


def test_accelerate_wrapper_is_unwrapped_and_survives_prepare() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = toy()
    inner = torch.optim.SGD(trainable(model), lr=0.1)
    accelerator = accelerate.Accelerator(cpu=True)
    before = attach(model, inner, total_steps=5)
    wrapped = accelerator.prepare(inner)
    step(model, wrapped)
    assert before.t == 1
    after = attach(model, wrapped, total_steps=5)
    step(model, wrapped)
    assert (before.t, after.t) == (1, 1)


def test_fractions_become_steps_once() -> None:
    hooks = TrainingHooks(30)
    assert hooks.steps("warm", 0.1) == 3 and hooks.steps("late", 7) == 7
    assert hooks.schedule == {"warm": 3, "late": 7}
    assert hooks.steps("all", 1.0) == 30 and hooks.steps("one", 1) == 1
    for bad, text in ((1.5, "fraction"), (-0.1, "fraction"), (31, "0 to"), (float("nan"), "frac")):
        with pytest.raises(ValueError, match=text):
            hooks.steps("warm", bad)
    with pytest.raises(TypeError, match="warm='x'"):
        hooks.steps("warm", "x")
    hooks.t = 15
    assert hooks.fraction == 0.5
    hooks.t = 31
    assert hooks.fraction == 1.0


def test_past_the_end() -> None:
    model = toy()
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    hooks = attach(model, optimizer, total_steps=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for i in range(4):
            step(model, optimizer, i)
    before = masks(model).clone()
    with pytest.warns(UserWarning, match="past total_steps=4"):
        step(model, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        step(model, optimizer)
    assert hooks.t == 6 and hooks.finished and torch.equal(masks(model), before)


def test_prepare_is_required_once() -> None:
    model = toy(look_first=True)
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    hooks = attach(model, optimizer, total_steps=5)
    with pytest.raises(RuntimeError, match="ToyModel looks at data before its first step"):
        step(model, optimizer)
    optimizer.zero_grad()
    seen: list[float] = []

    def loss(batch: Tensor) -> Tensor:
        seen.append(1.0)
        return model(batch).square().mean()

    with pytest.raises(TypeError, match="a list_iterator is used up after once"):
        hooks.prepare(iter([torch.ones(2, 6)]), loss)
    hooks.prepare(lambda: iter([torch.ones(2, 6)] * 3), loss)
    hooks.prepare([torch.ones(2, 6)] * 3, loss)
    assert len(seen) == 3 and hooks.prepared
    step(model, optimizer)

    resumed = toy(look_first=True)
    other = torch.optim.SGD(trainable(resumed), lr=0.1)
    fresh = attach(resumed, other, total_steps=5)
    fresh.load_state_dict(hooks.state_dict())
    step(resumed, other)
    assert fresh.t == 2 and fresh.parts[0].looked == hooks.parts[0].looked


def test_state_is_of_this_schedule(tmp_path: Any) -> None:
    model = toy()
    hooks = attach(model, torch.optim.SGD(trainable(model), lr=0.1), total_steps=20)
    save_hooks_state(tmp_path, hooks.state_dict(), token="of this checkpoint")
    state = load_hooks_state(tmp_path)
    assert saved_token(tmp_path) == "of this checkpoint" and state["finished"] is False
    assert state["parts"][0]["schedule"] == {"every": 3, "until": 15}
    assert [p.name for p in tmp_path.iterdir()] == ["hooks.safetensors"]
    hooks.load_state_dict(state)

    longer = attach(model, torch.optim.SGD(trainable(model), lr=0.1), total_steps=30)
    with pytest.raises(ValueError, match="total_steps=20, but these hooks were attached with 30"):
        longer.load_state_dict(state)
    other = toy(every=5)
    with pytest.raises(ValueError, match="resume with the same options"):
        attach(other, torch.optim.SGD(trainable(other), lr=0.1), 20).load_state_dict(state)
    plain = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"those of \['ToyModel'\]"):
        attach(plain, torch.optim.SGD(plain.parameters(), lr=0.1)).load_state_dict(state)


def test_state_files_refuse_what_they_cannot_hold(tmp_path: Any) -> None:
    with pytest.raises(TypeError, match="parts.0 is a set"):
        save_hooks_state(tmp_path, {"parts": [{1}]})
    with pytest.raises(FileNotFoundError, match="holds no state"):
        load_hooks_state(tmp_path)
    tied = torch.arange(3.0)
    save_hooks_state(tmp_path, {"a.b": tied, "a": {"b": tied + 1}, "c": [tied, None, 2, "x", 0.1]})
    state = load_hooks_state(tmp_path)
    assert torch.equal(state["a.b"] + 1, state["a"]["b"]) and state["c"][1:] == [None, 2, "x", 0.1]
    old = (tmp_path / "hooks.safetensors").read_bytes()
    (tmp_path / "hooks.safetensors").write_bytes(old[:20])
    with pytest.raises(ValueError, match="damaged"):
        load_hooks_state(tmp_path)
    save_file({"a": tied}, tmp_path / "hooks.safetensors")
    with pytest.raises(ValueError, match="no state of training hooks"):
        load_hooks_state(tmp_path)
    save_hooks_state(tmp_path, {"step": 0})
    assert load_hooks_state(tmp_path) == {"step": 0}


def test_regulariser_is_a_gradient_and_a_log_line_not_a_loss() -> None:
    model, free = toy(penalty=0.5), toy()
    x = torch.randn(4, 6)
    assert torch.equal(model(x), free(x))
    optimizer = torch.optim.SGD(trainable(model), lr=1.0)
    hooks = attach(model, optimizer, total_steps=50, seed=1)
    A = dict(model.named_parameters())["base_model.model.0.toy.default.A"]
    start = A.detach().clone()
    expected = 0.25 * sum(
        p.detach().square().sum() for n, p in model.named_parameters() if n.endswith("default.A")
    )
    assert hooks.losses()["penalty"] == pytest.approx(expected.item(), rel=1e-6)
    model(x).sum().backward()  # B = 0, so the task's gradient of A is 0
    optimizer.step()
    torch.testing.assert_close(A.detach(), 0.5 * start)


def test_pefts_manual_call_works_only_where_nothing_is_attached() -> None:
    model = toy(every=2)
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    for t in range(6):
        (model(torch.ones(2, 6)) - 1.0).square().mean().backward()
        optimizer.step()
        model.base_model.update_and_allocate(t)
        optimizer.zero_grad()
    assert masks(model).sum() == 4  # of 2 layers × r = 4 components
    attach(model, optimizer, total_steps=10)
    with pytest.raises(RuntimeError, match="update_and_allocate was called, but the optimiser"):
        model.base_model.update_and_allocate(6)
    attached_hooks(model).remove()
    model(torch.ones(2, 6)).sum().backward()
    model.base_model.update_and_allocate(6)


def test_saving_says_whether_the_schedule_has_ended(tmp_path: Any) -> None:
    model = toy()
    with pytest.warns(UserWarning, match="no optimiser has driven it"):
        model.save_pretrained(tmp_path / "never")
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    attach(model, optimizer, total_steps=4)
    step(model, optimizer)
    with pytest.warns(UserWarning, match="at step 1 of 4"):
        model.save_pretrained(tmp_path / "middle")
    assert json.loads((tmp_path / "middle/adapter_config.json").read_text())["finished"] is False
    for _ in range(2):
        step(model, optimizer)
    attached_hooks(model).remove()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path / "end")
        assert "finished" not in json.loads((tmp_path / "end/adapter_config.json").read_text())
        base = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
        loaded = PeftModel.from_pretrained(base, tmp_path / "end")
        loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(masks(loaded), masks(model))
    base = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    unfinished = PeftModel.from_pretrained(base, tmp_path / "middle")
    assert not schedule_finished(unfinished.base_model)


def test_a_copied_model_is_not_driven() -> None:
    model = toy()
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    attach(model, optimizer, total_steps=4)
    step(model, optimizer)
    twin = copy.deepcopy(model)
    assert attached_hooks(twin) is None and attached_hooks(model) is not None
    assert not schedule_finished(twin.base_model)


def test_two_models_two_optimizers() -> None:
    both = nn.ModuleDict({"a": toy(), "b": toy()})
    one, two = (torch.optim.SGD(trainable(both[k]), lr=0.1) for k in "ab")
    first, second = attach(both["a"], one, 5, seed=1), attach(both["b"], two, 5, seed=2)
    step(both["a"], one)
    assert (first.t, second.t) == (1, 0)
    together = attach(both, torch.optim.SGD(trainable(both), lr=0.1), 5)
    assert sorted(together.log()) == ["0.density", "1.density"] and len(together.parts) == 2
