"""A schedule is an adapter's: whether it has ended, what it drives, and its lengths in steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from peft_custom import (
    AdaLoraConfig,
    BimLoraConfig,
    DyLoraConfig,
    PeftModel,
    TrainingHooks,
    attach,
    get_peft_model,
)
from peft_custom.hook_files import load_hooks_state, save_hooks_state
from peft_custom.hooks import schedule_finished

T = 6
TARGETS: dict[str, Any] = {"target_modules": ["0", "2"]}
ADALORA = {"init_r": 4, "target_r": 2, "tfinal": 2, "orth_reg_weight": 0.0, **TARGETS}
KINDS: dict[str, Any] = {
    "adalora": lambda: AdaLoraConfig(**ADALORA),
    "bim": lambda: BimLoraConfig(r=2, block_size=2, mask_init="constant", **TARGETS),
    "dylora": lambda: DyLoraConfig(r=4, **TARGETS),
}


def base() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def two(kind: str) -> PeftModel:
    """Adapters a (active) and b, both starting away from the base."""
    model = get_peft_model(base(), KINDS[kind](), "a")
    model.add_adapter("b", KINDS[kind]())
    return model.train()


def sgd(model: PeftModel) -> torch.optim.Optimizer:
    """Of both adapters, as a user has it who switches between them."""
    both = [p for n, p in model.named_parameters() if "lora_" in n or "bim" in n]
    return torch.optim.SGD(both, lr=0.1)


def train(model: PeftModel, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        (model(torch.ones(2, 6)) - 1.0).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def saved(model: PeftModel, folder: Path) -> dict[str, bool]:
    """What the files say: adapter -> finished."""
    model.save_pretrained(folder)
    return {
        name: json.loads((folder / name / "adapter_config.json").read_text()).get("finished", True)
        for name in model.peft_config
    }


def kept(model: PeftModel, adapter: str) -> list[int]:
    return [int(layer.mask(adapter).sum()) for _, layer in model.base_model.svd_layers()]


# --- finished ------------------------------------------------------------------------------------
@pytest.mark.parametrize("first", ["whole", "stopped"])
def test_finished_belongs_to_the_adapter(first: str, tmp_path: Path) -> None:
    model, optimizer = two("adalora"), None
    for adapter, whole in (("a", first == "whole"), ("b", first != "whole")):
        model.set_adapter(adapter)
        optimizer = sgd(model)
        attach(model, optimizer, T)
        train(model, optimizer, T if whole else 3)
    tuner = model.base_model
    want = {"a": first == "whole", "b": first != "whole"}
    assert {name: schedule_finished(tuner, name) for name in "ab"} == want
    with pytest.warns(UserWarning, match="has not its final form"):
        assert saved(model, tmp_path) == want
    loaded = PeftModel.from_pretrained(base(), tmp_path / "a", "a")
    loaded.load_adapter(tmp_path / "b", "b")
    assert {name: schedule_finished(loaded.base_model, name) for name in "ab"} == want
    with pytest.warns(UserWarning, match="no optimiser has driven it"):
        assert saved(loaded, tmp_path / "again") == want
    stopped = "b" if first == "whole" else "a"
    with pytest.raises(ValueError, match=f"adapter '{stopped}' has not its final ranks"):
        tuner.export(stopped, format="lora")
    tuner.export("ab".replace(stopped, ""), format="lora")


@pytest.mark.parametrize("kind", ["bim", "dylora"])
def test_an_adapter_beside_the_driven_one_was_never_driven(kind: str, tmp_path: Path) -> None:
    model = two(kind)
    optimizer = sgd(model)
    attach(model, optimizer, T)
    train(model, optimizer, T)
    with pytest.warns(UserWarning, match="no optimiser has driven it"):
        assert saved(model, tmp_path) == {"a": True, "b": False}


def test_a_loaded_file_says_whether_it_is_finished(tmp_path: Path) -> None:
    model = two("adalora")
    with pytest.warns(UserWarning, match="has not its final form"):
        assert saved(model, tmp_path) == {"a": False, "b": False}
    optimizer = sgd(model)
    hooks = attach(model, optimizer, T)
    train(model, optimizer, T)
    hooks.remove()
    assert schedule_finished(model.base_model, "a")
    model.load_adapter(tmp_path / "a", "a")
    assert not schedule_finished(model.base_model, "a")


def test_what_is_frozen_is_neither_driven_nor_finished() -> None:
    for kind in ("adalora", "bim"):
        model = two(kind)
        model.set_adapter("a", inference_mode=True)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        assert not attach(model, optimizer, T).adapts
        assert not schedule_finished(model.base_model, "a")
        model.set_adapter(["a", "b"])
        with pytest.raises(ValueError, match="are all trainable"):
            attach(model, optimizer, T)


# --- switching under live hooks ------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_of_an_adapter_without_a_schedule_is_refused(kind: str) -> None:
    model = two(kind)
    optimizer = sgd(model)
    hooks = attach(model, optimizer, T)
    train(model, optimizer, 2)
    model.set_adapter("b")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.raises(RuntimeError, match=r"drive adapter 'a'.* set to train are now 'b'"):
        train(model, optimizer, 1)
    optimizer.zero_grad()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    model.set_adapter("a")  # evaluating another in between is allowed
    train(model, optimizer, 1)
    assert hooks.t == 3
    model.set_adapter(["a", "b"])
    with pytest.raises(RuntimeError, match="set to train are now 'a', 'b'"):
        train(model, optimizer, 1)
    model.set_adapter("b")
    again = attach(model, optimizer, T)
    optimizer.zero_grad()
    train(model, optimizer, T)
    assert again.t == T and hooks.t == 3
    if kind == "adalora":
        assert sum(kept(model, "b")) == 4 and sum(kept(model, "a")) == 8


def test_an_adapter_made_anew_under_the_same_name_has_no_schedule() -> None:
    model = two("adalora")
    optimizer = sgd(model)
    attach(model, optimizer, T)
    train(model, optimizer, T)
    model.delete_adapter("a")
    model.add_adapter("a", KINDS["adalora"]())
    model.set_adapter("a")
    assert not schedule_finished(model.base_model, "a") and model.base_model.history("a") == []
    with pytest.raises(RuntimeError, match="drive adapter 'a'"):
        train(model, optimizer, 1)


def test_pefts_manual_call_drives_the_adapter_that_trains() -> None:
    model = get_peft_model(base(), AdaLoraConfig(total_step=T, **ADALORA), "a")
    model.add_adapter("b", AdaLoraConfig(total_step=T, **ADALORA))
    for adapter in ("a", "b"):
        model.set_adapter(adapter)
        optimizer = sgd(model)
        for t in range(T if adapter == "b" else 3):
            (model(torch.ones(2, 6)) - 1.0).square().mean().backward()
            optimizer.step()
            model.base_model.update_and_allocate(t)
            optimizer.zero_grad()
    assert sum(kept(model, "a")) == 8 and sum(kept(model, "b")) == 4
    finished = [schedule_finished(model.base_model, name) for name in "ab"]
    assert finished == [False, True]


def test_a_saved_schedule_is_taken_up_by_its_own_adapter_alone(tmp_path: Path) -> None:
    model = two("adalora")
    optimizer = sgd(model)
    hooks = attach(model, optimizer, T)
    train(model, optimizer, 2)
    save_hooks_state(tmp_path, hooks.state_dict())
    state = load_hooks_state(tmp_path)
    model.set_adapter("b")
    with pytest.raises(ValueError, match="the saved hooks drove adapter a, these drive b"):
        attach(model, optimizer, T).load_state_dict(state)
    model.set_adapter("a")
    del state["parts"][0]["adapters"]  # as older files are
    attach(model, optimizer, T).load_state_dict(state)


# --- fractions of a schedule ---------------------------------------------------------------------
def test_a_small_fraction_is_at_least_one_where_none_makes_no_sense() -> None:
    hooks = TrainingHooks(20)
    assert hooks.steps("warm", 0.01) == 0
    assert hooks.steps("often", 0.5, least=1) == 10 and hooks.steps("every", 0.01, least=1) == 1
    assert hooks.schedule == {"warm": 0, "often": 10, "every": 1}
    with pytest.raises(ValueError, match="every=0: must be from 1 to total_steps=20"):
        hooks.steps("every", 0, least=1)


@pytest.mark.parametrize("options", [{}, {"tinit": 0.01}])
def test_small_fractions_are_saved_so_that_they_load(options: Any, tmp_path: Path) -> None:
    config = AdaLoraConfig(**{**ADALORA, "deltaT": 0.01, "tfinal": 0.01, **options})
    model = get_peft_model(base(), config)
    optimizer = sgd(model)
    hooks = attach(model, optimizer, 20)
    assert hooks.parts[0].schedule["deltaT"] == 1 == hooks.parts[0].allocator.schedule.deltaT
    train(model, optimizer, 20)
    model.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (values["deltaT"], values["tinit"], values["tfinal"]) == (1, 0, 0)
    loaded = PeftModel.from_pretrained(base(), tmp_path, is_trainable=True)
    attach(loaded, sgd(loaded), 20)
    peft = pytest.importorskip("peft")
    model.save_pretrained(tmp_path / "stock", format="adalora")
    x = torch.ones(2, 6)
    theirs = peft.PeftModel.from_pretrained(base(), str(tmp_path / "stock")).eval()
    torch.testing.assert_close(theirs(x), model.eval()(x))
    (tmp_path / "adapter_config.json").write_text(json.dumps({**values, "deltaT": 0}))
    assert PeftModel.from_pretrained(base(), tmp_path).peft_config["default"].deltaT == 1


def test_a_file_for_peft_counts_in_steps(tmp_path: Path) -> None:
    fractions = {"tinit": 0.1, "tfinal": 0.2, "deltaT": 0.01, "total_step": 20}
    model = get_peft_model(base(), AdaLoraConfig(**{**ADALORA, **fractions}))
    with pytest.warns(UserWarning, match="has not its final form"):
        model.save_pretrained(tmp_path, format="adalora", force=True)
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    assert [values[name] for name in fractions] == [2, 4, 1, 20]


def test_a_fraction_of_collection_steps_can_be_resumed(tmp_path: Path) -> None:
    def made(steps: Any = 0.01) -> tuple[PeftModel, torch.optim.Optimizer]:
        options = {"r": 2, "block_size": 2, "mask_init": "features", **TARGETS}
        model = get_peft_model(base(), BimLoraConfig(**options, collection_steps=steps))
        return model, sgd(model)

    def forward_loss(model: PeftModel) -> Any:
        return lambda x: (model(x) - 1.0).square().mean()

    model, optimizer = made()
    hooks = attach(model, optimizer, 20)
    assert hooks.parts[0].schedule["collection_steps"] == 1
    hooks.prepare([torch.randn(2, 6)] * 3, forward_loss(model))
    train(model, optimizer, 2)
    save_hooks_state(tmp_path, hooks.state_dict())
    resumed, other = made()
    attach(resumed, other, 20).load_state_dict(load_hooks_state(tmp_path))
    train(resumed, other, 1)
